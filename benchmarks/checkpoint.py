"""What a checkpoint costs a run: the time that training waits for it, and how much slower the steps beside its writing are.

    make bench-checkpoint  (or: python -m benchmarks.checkpoint --model MODEL --k 1 20)

A few steps alone and the same with a save before them take turns; the difference is what a save costs. `share` is that
cost over `--every` steps, with which it comes once.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import common
from benchmarks.common import Column, Row
from benchmarks.jax_methods import to_batch, training_step
from benchmarks.methods import random_tokens
from neuroada_jax import console
from neuroada_jax.models import Remat
from neuroada_jax.pretrained.load import load_model
from neuroada_jax.training import checkpoint

COLUMNS = (
    Column("method", "method"),
    Column("k", "k"),
    Column("dtype", "dtype"),
    common.SECONDS,
    Column("bytes", "bytes", console.size),
    Column("share of step time", "share", lambda share: f"{100 * share:.2f} %"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and saves benchmarks/results/checkpoint.json."""
    parser = common.parser(__doc__, repeats=5)
    parser.add_argument("--model", default=common.MODEL)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 20])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4, help="after a save, in which it is written (default: 4)")
    parser.add_argument("--every", type=int, default=100, help="steps between two saves of a run (default: 100)")
    settings = parser.parse_args(arguments)
    rows = [row for k in settings.k for row in _rows(k, settings)]
    common.report("checkpoint", "what a checkpoint costs", COLUMNS, rows, settings)


def _rows(k: int, settings: argparse.Namespace) -> list[Row]:
    base = load_model(settings.model, settings.dtype)
    first_state, run = training_step(base.model, k, Remat.NONE)
    batch = to_batch(random_tokens(settings.batch, settings.length, base.model.config.vocab_size))
    state: Any = first_state(base.params)
    del base
    waited: list[float] = []
    written: list[float] = []

    with tempfile.TemporaryDirectory() as folder, checkpoint.Checkpoints(Path(folder)) as checkpoints:

        def steps() -> None:
            nonlocal state
            for _ in range(settings.steps):
                state, _ = run(state, batch)
            jax.block_until_ready(state.step)

        def save_and_steps() -> None:
            began = time.perf_counter()
            checkpoints.save(state)
            waited.append(time.perf_counter() - began)
            steps()
            checkpoints.wait()

        runs = {"steps": steps, "save and steps": save_and_steps}
        times = common.alternate(runs, settings.repeats, warmups=1, title=f"checkpoints, k = {k}")
        for _ in range(settings.repeats):
            state, _ = run(state, batch)
            jax.block_until_ready(state.step)
            began = time.perf_counter()
            checkpoints.save(state)
            checkpoints.wait()
            written.append(time.perf_counter() - began)
        newest = max((path for path in Path(folder).iterdir()), key=lambda path: int(path.name))
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    step = statistics.median(times["steps"]) / settings.steps
    more = statistics.median(b - a for a, b in zip(times["steps"], times["save and steps"], strict=True))
    about = {"k": k, "dtype": settings.dtype, "shape": [settings.batch, settings.length], "peak_bytes": None}
    return [
        {"method": "step", "seconds": step, **about},
        {"method": "save: training waits", "seconds": statistics.median(waited[1:]), **about},
        {"method": "save: until written", "seconds": statistics.median(written), "bytes": size, **about},
        {
            "method": "save: in all, beside steps",
            "seconds": max(more, 1e-9),
            "share": more / settings.every / step,
            **about,
        },
    ]


if __name__ == "__main__":
    main()
