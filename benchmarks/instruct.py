"""Quality on instruction tasks with SmolLM2-135M: NeuroAda against PEFT's LoRA on the same batches, in PyTorch.

    make bench-instruct        (or: python -m benchmarks.instruct --tasks sst2 --methods neuroada-1 --seeds 42)

The settings are those of configs/smollm2-135m-sst2-k1.yaml and configs/smollm2-135m-commonsense-k20.yaml, except for k,
the learning rate and the number of steps. Every method sees the same batches: rows, order, tokens and shapes are this
library's, as is the scoring of the merged weights. AdamW without decay, linear schedule with warm-up, clipping at 1,
float32 unless `--dtype` says otherwise (on a GPU both libraries multiply in TF32); LoRA adapts the same linear maps with
alpha = 2 r and no dropout.
Ranks 1, 4 and 10 train about as many values as k = 1, 8 and 20 (rank 1, the smallest, trains twice as many as k = 1).

256 of the training rows are held out and choose among learning rates (sweep.py). Needs the rows that the configs name (or
`--config sst2=MINE.yaml`), and the extra `torch`.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import sweep
from benchmarks.common import MODEL, Row
from benchmarks.sweep import Job
from neuroada_jax import console
from neuroada_jax.cli import one_line_errors
from neuroada_jax.data.batches import Batch
from neuroada_jax.data.rows import load_rows
from neuroada_jax.errors import UserError
from neuroada_jax.models.llama import LLAMA_TARGETS
from neuroada_jax.pretrained.load import load_model
from neuroada_jax.training import config_file, run
from neuroada_jax.training.config import RunConfig

CONFIGS = {"sst2": "configs/smollm2-135m-sst2-k1.yaml", "commonsense": "configs/smollm2-135m-commonsense-k20.yaml"}
# The grids of learning rates by method.
RATES = {
    "neuroada-1": [2e-2, 4e-2],
    "neuroada-8": [4e-3, 8e-3],
    "neuroada-20": [3e-3, 6e-3],
    "lora-1": [3e-3, 1e-2],
    "lora-4": [1e-3, 3e-3],
    "lora-10": [1e-3, 3e-3],
}
CHOOSING = 256  # held-out rows that choose the learning rate


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and score, print the table of means and save benchmarks/results/instruct.json."""
    made = sweep.parser(__doc__, list(CONFIGS), list(RATES))
    made.add_argument("--model", default=MODEL, help="a decoder: directory, hub id, package:NAME/FILE")
    made.add_argument("--config", nargs="*", default=[], metavar="TASK=FILE", help="configs in place of the built-in ones")
    made.add_argument("--steps", type=int, default=60)
    made.add_argument("--limit", type=int, help="rows of every scored set")
    made.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base; LoRA: float32 alone"
    )
    settings = sweep.parse(made, RATES, arguments)
    if settings.dtype != "float32" and not all(map(sweep.is_ours, settings.methods)):
        raise UserError(f"--dtype {settings.dtype}: LoRA trains in float32; choose neuroada methods with --methods")
    files = CONFIGS | dict(text.split("=", 1) for text in settings.config)
    fields = {"steps": settings.steps, "limit": settings.limit, "dtype": settings.dtype}
    sweep.run(
        "instruct",
        f"accuracy in %, {settings.steps} steps",
        settings,
        fields,
        lambda job: _run(job, files[job["task"]], settings),
    )


def _run(job: Job, file: str, settings: argparse.Namespace) -> Row:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = _settled(job, file, settings, folder)
        began = time.perf_counter()
        results = _ours(chosen) if sweep.is_ours(job["method"]) else _theirs(chosen, job, folder)
        scores = results.pop("after")
        choosing = scores.pop("choosing")
        values = {name: score["value"] for name, score in scores.items()}
        return results | {
            "metric": "accuracy",
            "value": float(np.mean(list(values.values()))),
            "values": values,
            "n": sum(score["n"] for score in scores.values()),
            "choosing_value": choosing["value"],
            "shape": [chosen.training.batch_size, chosen.data.max_length],
            "seconds": time.perf_counter() - began,
        }


def _settled(job: Job, file: str, settings: argparse.Namespace, folder: Path) -> RunConfig:
    """Return the config of a job; its training rows and those that choose the rate become files in the folder."""
    plain = config_file.load(file)
    rows = load_rows(plain.data.train, plain.data.split)
    order = np.random.default_rng(0).permutation(len(rows))
    parts = {"choosing": order[:CHOOSING], "train": order[CHOOSING:]}
    for name, numbers in parts.items():
        lines = (json.dumps(rows.rows[number]) for number in numbers)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    scored = plain.evaluation.sets[0]
    sets = [
        {"name": each.name, "data": each.data, "task": each.task, "limit": job["limit"] or each.limit}
        for each in plain.evaluation.sets
    ]
    sets.append({"name": "choosing", "data": str(folder / "choosing.jsonl"), "limit": job["limit"]})
    for each in sets:
        each |= {"method": scored.method, "max_new_tokens": scored.max_new_tokens, "split": "train"}
    changes = {
        "model": {"path": settings.model, "dtype": job["dtype"]},
        "bypass.k": sweep.number(job["method"]),
        "data.train": str(folder / "train.jsonl"),
        "optimizer.learning_rate": job["rate"],
        "training.steps": job["steps"],
        "training.save_every": None,
        "evaluation.before": False,
        "evaluation.sets": sets,
        "output": str(folder / "run"),
        "seed": job["seed"],
    }
    return config_file.load(file, [f"{field}={json.dumps(value)}" for field, value in changes.items()])


def _ours(chosen: RunConfig) -> Row:
    results = run.train(chosen)
    kept = ("last_loss", "train_seconds", "rounded_to_nothing", "after")
    return {"trained": results["trainable"]} | {field: results[field] for field in kept}


def _theirs(chosen: RunConfig, job: Job, folder: Path) -> Row:
    """Train the same run with PEFT's LoRA in PyTorch; the merged weights are scored by this library."""
    import torch

    prepared = run.prepare(chosen)
    batches = prepared.batches
    model = sweep.torch_start(prepared, folder, "AutoModelForCausalLM")
    torch.manual_seed(job["seed"])
    model = sweep.torch_lora(model, sweep.number(job["method"]) or 1, list(LLAMA_TARGETS), "CAUSAL_LM")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = chosen.training.steps or 1
    run_step = sweep.torch_step([(job["rate"], parameters)], chosen.optimizer, total)
    last_loss = np.nan
    began = time.perf_counter()
    with console.bar("training", total) as shown:
        for step in range(total):
            loss = _loss(model.base_model.model, batches.batch(*divmod(step, batches.steps_per_epoch)))
            last_loss = run_step(step, loss)
            shown.update(step + 1, total, f"loss {last_loss:.4f}")
    seconds = time.perf_counter() - began
    model.merge_and_unload().save_pretrained(folder / "merged")
    params = load_model(str(folder / "merged"), "float32").params
    chosen.directory.mkdir()
    scores = prepared.score_sets(prepared.opened, params, "after")
    return {
        "trained": sum(parameter.numel() for parameter in parameters),
        "last_loss": last_loss,
        "train_seconds": seconds,
        "after": {name: {"value": score.value, "n": score.n} for name, score in scores.items()},
    }


def _loss(model: Any, batch: Batch) -> Any:
    """Return the mean over the labels, with logits at their positions only, as in our own loss."""
    import torch

    real = int((batch.lengths > 0).sum())  # rows that fill the batch come last
    mask = np.arange(batch.input_ids.shape[1])[None] < batch.lengths[:real, None]
    on_device = lambda array: torch.from_numpy(array.astype(np.int64)).to(model.device)  # noqa: E731
    ids, mask = on_device(batch.input_ids[:real]), on_device(mask)
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    rows, places = np.nonzero(batch.label_mask)
    positions, labels = (on_device(array[rows, places]) for array in (batch.label_positions, batch.label_ids))
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[on_device(rows), positions]), labels)


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
