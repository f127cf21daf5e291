"""`make quickstart`: fine-tune SmolLM2-135M to answer questions about a short text, on this machine, in minutes.

The task is reasoning-gym's `needle_haystack` with a small haystack: four sentences that say who likes which things, and a
question who likes one of them. Problems are generated and can be verified; those for training and testing come from
different seeds, and no prompt is in both.
"""

import json
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path

from neuroada_jax import console
from neuroada_jax.cli import one_line_errors
from neuroada_jax.errors import UserError
from neuroada_jax.training import config, config_file, report, run

TASK = "needle_haystack"
SETTINGS = {"min_num_statements": 4, "max_num_statements": 4}
TRAIN_ROWS, TRAIN_SEED = 4000, 1
TEST_ROWS, TEST_SEED = 250, 1_000_000


def problems(rows: int, seed: int) -> Iterator[dict[str, str]]:
    """Yield problems as rows with prompt, completion and answer."""
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        if error.name != "pycosat":
            raise UserError(f"{error}; `make quickstart` installs what is needed") from error
        # A SAT solver that one other puzzle needs. It has no wheel, and the quickstart should not need a C compiler.
        sys.modules["pycosat"] = types.ModuleType("pycosat")
        import reasoning_gym
    for entry in reasoning_gym.create_dataset(TASK, size=rows, seed=seed, **SETTINGS):
        yield {"prompt": entry["question"], "completion": entry["answer"], "answer": entry["answer"]}


def write_data(directory: Path) -> None:
    """Write train.jsonl and test.jsonl; test problems whose prompt is also a training prompt are dropped."""
    directory.mkdir(parents=True, exist_ok=True)
    train = list(problems(TRAIN_ROWS, TRAIN_SEED))
    known = {row["prompt"] for row in train}
    test = {row["prompt"]: row for row in problems(TEST_ROWS, TEST_SEED) if row["prompt"] not in known}
    for name, rows in (("train", train), ("test", list(test.values()))):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    console.say(f"{TASK}: {len(train)} training problems, {len(test)} test problems")


def main() -> None:
    """Write the data, run configs/quickstart.yaml and print the next steps."""
    root = Path(__file__).resolve().parents[1]
    path = str(root / "configs" / "quickstart.yaml")
    data = config_file.load(path, sys.argv[1:]).directory / "data"
    files = [f"data.train={data}/train.jsonl", f"evaluation.sets.0.data={data}/test.jsonl"]
    settings = config_file.load(path, [*sys.argv[1:], *files])
    write_data(data)
    report.print_summary(run.train(settings, overwrite=True))
    print(next_steps(settings))


def next_steps(settings: config.RunConfig) -> str:
    """Return the files to look at and the commands to run after the quickstart, which can be pasted into a shell."""
    out, test = settings.directory, settings.evaluation.sets[0]
    question = json.loads(Path(str(test.data)).read_text(encoding="utf-8").splitlines()[0])["prompt"]
    return f"""
Look at    {out}/loss.png, {out}/predictions-{test.name}-after.jsonl
Ask it     .venv/bin/neuroada generate --model {out}/merged --prompt {shlex.quote(question)}
In PyTorch transformers.AutoModelForCausalLM.from_pretrained("{out}/merged")
Your data  cp configs/quickstart.yaml my.yaml, set name, model.path, data and evaluation;
           .venv/bin/neuroada train my.yaml
"""


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
