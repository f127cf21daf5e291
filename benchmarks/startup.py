"""From the checkpoint to the first step: load, select, compile, run; and selection against a plain read of the same bytes.

    make bench-startup     (or: python -m benchmarks.startup --model MODEL --k 1 20)

A plain read is the largest |W| of every target kernel: the least that any selection must look at. `peak_bytes` is what
selecting holds over the loaded model, its result included, in a fresh process that has selected once before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common, process_memory
from benchmarks.common import Column, Row
from benchmarks.jax_methods import to_batch
from benchmarks.methods import LEARNING_RATE, random_tokens, targets
from neuroada_jax import console
from neuroada_jax.core import bypass, trees
from neuroada_jax.core.trees import ModulePath
from neuroada_jax.models import Remat
from neuroada_jax.pretrained.load import LoadedModel, load_model
from neuroada_jax.training import optimizer, step
from neuroada_jax.training.config import OptimizerSection

KERNEL = (11008, 4096)  # the largest of LLaMA-7B
READ = "plain read"
COLUMNS = (
    Column("method", "method"),
    Column("k", "k"),
    Column("dtype", "dtype"),
    Column("kernels", "shape", lambda shape: " x ".join(map(str, shape))),
    common.SECONDS,
    Column("GB/s", "gigabytes_per_second", "{:.2f}".format),
    Column("/plain read", "ratio_to_floor", "{:.2f}".format),
    common.PEAK,
    Column("largest tensor", "largest_tensor_bytes", console.size),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and saves benchmarks/results/startup.json."""
    parser = common.parser(__doc__, repeats=7)
    parser.add_argument("--model", default=common.MODEL)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4, 20])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--kernel", type=int, nargs=2, default=KERNEL, metavar=("O", "I"), help="of the selection alone")
    parser.add_argument("--no-memory", action="store_true", help="leave out the fresh processes that measure peak memory")
    parser.add_argument("--peak-of", type=int, metavar="K", help=argparse.SUPPRESS)
    settings = parser.parse_args(arguments)
    if settings.peak_of:
        print(json.dumps(_peak(settings)))
        return

    base, rows = _first_step(settings)
    paths = targets(base.params, base.model)
    rows += _selection(base.params, paths, settings.dtype, settings)
    if process_memory.available() and not settings.no_memory:
        _add_peaks([row for row in rows if row["method"] == "select"], settings)
    del base
    for dtype in ("float32", "bfloat16"):
        kernel = jax.random.normal(jax.random.key(0), tuple(settings.kernel)).astype(dtype)
        rows += _selection({"synthetic": {"kernel": kernel}}, [("synthetic",)], dtype, settings)
    common.report("startup", "from the checkpoint to the first step", COLUMNS, rows, settings)


def _row(method: str, seconds: float, dtype: str, **fields: Any) -> Row:
    return {"method": method, "k": None, "dtype": dtype, "shape": None, "seconds": seconds, "peak_bytes": None} | fields


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = function()
    jax.block_until_ready([leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)])
    return result, time.perf_counter() - began


def _first_step(settings: argparse.Namespace) -> tuple[LoadedModel, list[Row]]:
    """The loaded model, and what a user waits for until the first step is done, each stage once."""
    k, remat = settings.k[0], Remat.NONE
    seconds: dict[str, float] = {}
    stages = ("load", "select and its compilation", "compile the step", "first step", "second step")
    with console.bar("start-up", len(stages)) as shown:

        def stage(function: Callable[[], Any]) -> Any:
            name = stages[len(seconds)]
            shown.update(len(seconds), len(stages), name)
            result, seconds[name] = _timed(function)
            return result

        base: LoadedModel = stage(lambda: load_model(settings.model, settings.dtype))
        built = stage(lambda: bypass.build(base.params, targets(base.params, base.model), k))
        transformation = optimizer.build(OptimizerSection(learning_rate=LEARNING_RATE), 1000)
        batch = to_batch(random_tokens(settings.batch, settings.length, base.model.config.vocab_size))
        state = step.initial_state(jax.tree.map(jnp.copy, base.params), built, transformation)
        run = stage(lambda: step.make_step(base.model.module(remat), transformation).lower(state, batch).compile())
        state, _ = stage(lambda: run(state, batch))
        stage(lambda: run(state, batch))
        shown.update(len(stages), len(stages))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(base.params))
    rows = [_row(name, taken, settings.dtype, k=None if name == "load" else k) for name, taken in seconds.items()]
    rows[0]["gigabytes_per_second"] = size / 1e9 / seconds["load"]
    return base, rows


def _selection(
    params: Mapping[str, Any], paths: Sequence[ModulePath], dtype: str, settings: argparse.Namespace
) -> list[Row]:
    """A plain read of the kernels at `paths` and selection for every k, in turns."""
    kernels = [trees.get(params, path)["kernel"] for path in paths]
    read = jax.jit(lambda kernels: [jnp.max(jnp.abs(kernel)) for kernel in kernels])
    runs: dict[int | None, Callable[[], object]] = {None: lambda: jax.block_until_ready(read(kernels))}
    for k in settings.k:
        runs[k] = lambda k=k: jax.block_until_ready(bypass.build(params, paths, k))
    times = common.alternate(runs, settings.repeats, warmups=1, title=f"selection, {dtype}")
    gigabytes = sum(kernel.nbytes for kernel in kernels) / 1e9
    largest = max(kernel.nbytes // max(1, kernel.size // (kernel.shape[-2] * kernel.shape[-1])) for kernel in kernels)
    return [
        _row(
            READ if k is None else "select",
            statistics.median(seconds),
            dtype,
            k=k,
            shape=[len(kernels)] if len(kernels) > 1 else list(kernels[0].shape),
            gigabytes_per_second=gigabytes / statistics.median(seconds),
            ratio_to_floor=common.ratio(seconds, times[None]),
            largest_tensor_bytes=largest,
        )
        for k, seconds in times.items()
    ]


def _add_peaks(rows: Sequence[Row], settings: argparse.Namespace) -> None:
    """Fills in the memory of the model's selections, from a fresh process of this script for each k."""
    environment = {**os.environ, **process_memory.ALLOCATOR}
    arguments = ("--model", settings.model, "--dtype", settings.dtype)
    with console.bar("peak memory", len(rows)) as shown:
        for done, row in enumerate(rows):
            command = [sys.executable, "-m", "benchmarks.startup", *arguments, "--peak-of", str(row["k"])]
            result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            row.update(json.loads(result.stdout.splitlines()[-1]))
            shown.update(done + 1, len(rows))


def _peak(settings: argparse.Namespace) -> dict[str, int]:
    """Growth over the loaded model while it selects: the first time, which compiles, and again."""
    base = load_model(settings.model, settings.dtype)
    paths = targets(base.params, base.model)
    peaks = []
    for _ in range(2):
        before = process_memory.resident()
        process_memory.mark()
        built = jax.block_until_ready(bypass.build(base.params, paths, settings.peak_of))
        peaks.append(process_memory.peak() - before)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(built))
        del built
    return {"peak_bytes": peaks[1], "peak_bytes_with_compilation": peaks[0], "result_bytes": size}


if __name__ == "__main__":
    main()
