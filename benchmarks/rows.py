"""Reading and tokenising chats: this library's encode against `datasets.map` with a batched fast tokenizer.

    make bench-rows         (or: python -m benchmarks.rows --rows 100000)

Both read the same .jsonl file in one process and take turns. `datasets` applies the chat template and tokenises, which is
all that it can do without knowing what is learnt; encode also finds every turn's border, checks it against the prompt of a
generation, and labels tokens. `peak_bytes` is the growth of the process's resident memory during the first turn.
"""

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common, process_memory
from benchmarks.common import Column, Row
from neuroada_jax.data.examples import encode
from neuroada_jax.data.rows import load_rows
from neuroada_jax.pretrained import source
from neuroada_jax.pretrained.tokenizer import load_tokenizer

PAGES = Path(__file__).resolve().parents[1] / "docs"  # whose words the chats are made of
LENGTH = 4096
COLUMNS = (
    Column("method", "method"),
    Column("rows, tokens", "shape", lambda shape: " x ".join(map(str, shape))),
    common.SECONDS,
    Column("speed", "speed", "{:.2f}".format),
    common.PEAK,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and save benchmarks/results/rows.json."""
    parser = common.parser(__doc__, repeats=5)
    parser.add_argument("--rows", type=int, default=10_000, help="chats of one to three turns")
    parser.add_argument("--model", default=common.MODEL, help="model whose tokenizer is used")
    settings = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="neuroada-") as folder:
        rows = _measure(Path(folder), load_tokenizer(source.resolve(settings.model)), settings)
    common.report("rows", "reading and tokenising chats", COLUMNS, rows, settings)


def write_chats(path: Path, count: int) -> None:
    """Write chats of one to three turns with random words of this library's pages."""
    rng = random.Random(0)
    words = " ".join(page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md"))).split()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            messages = [
                {"role": role, "content": " ".join(rng.choices(words, k=rng.randint(5, longest)))}
                for _ in range(rng.randint(1, 3))
                for role, longest in (("user", 40), ("assistant", 150))
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def _measure(folder: Path, tokenizer: Any, settings: argparse.Namespace) -> list[Row]:
    import datasets

    datasets.disable_progress_bars()
    path = folder / "chats.jsonl"
    write_chats(path, settings.rows)

    def with_datasets() -> int:
        def tokenise(batch: dict[str, list]) -> dict[str, list]:
            texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in batch["messages"]]
            return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

        with tempfile.TemporaryDirectory(dir=folder) as cache:
            data = datasets.Dataset.from_json(str(path), cache_dir=cache)
            done = data.map(tokenise, batched=True, remove_columns=data.column_names, load_from_cache_file=False)
            return sum(map(len, done["input_ids"]))

    def ours() -> int:
        return len(encode(load_rows(str(path)), "chat", tokenizer, LENGTH).token_ids)

    runs: dict[str, Callable[[], int]] = {"datasets.map": with_datasets, "encode": ours}
    peaks, tokens = {}, {}
    for name, run in runs.items():
        before = process_memory.resident() if process_memory.available() else 0
        if before:
            process_memory.mark()
        tokens[name] = run()
        peaks[name] = process_memory.peak() - before if before else None
    times = common.alternate(runs, settings.repeats, warmups=0, title="tokenising")
    return [
        {
            "method": name,
            "k": None,
            "dtype": None,
            "shape": [settings.rows, tokens[name]],
            "seconds": statistics.median(seconds),
            "speed": common.ratio(times["datasets.map"], seconds),
            "peak_bytes": peaks[name],
        }
        for name, seconds in times.items()
    ]


if __name__ == "__main__":
    main()
