"""One linear map, forward and backward: the bypass against the frozen floor, plain autodiff, LoRA and the dense gradient.

    make bench-ops         (or: python -m benchmarks.ops --dtype float32 --k 1 20 --shapes llama-7b)

Each compiled function computes y and, for a given dy, the gradients that its method needs; the floor needs dx alone. The
methods of a shape take turns. LoRA has about as many trained parameters as the bypass. `peak_bytes` is what a function
allocates besides its arguments and results.
"""

import argparse
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import common
from benchmarks.baselines import product
from benchmarks.common import Column, Row
from neuroada_jax.core import cuda_kernels, low_rank, ops, selection
from neuroada_jax.core.entries import add_entries
from neuroada_jax.core.value_gradient import GradientAlgorithm

# By model: tokens, and the (O, I) of its linear maps.
SHAPES = {
    "smollm2": (1024, ((576, 576), (192, 576), (1536, 576), (576, 1536))),
    "llama-7b": (512, ((4096, 4096), (11008, 4096))),
}
CLOCK = 0.05  # seconds; calls shorter than this are repeated until they fill it
COLUMNS = (
    Column("method", "method"),
    Column("k", "k"),
    Column("dtype", "dtype"),
    Column("tokens, O, I", "shape", lambda shape: " x ".join(map(str, shape))),
    Column("trained", "trained", "{:,}".format),
    common.SECONDS,
    common.RATIO,
    Column("least", "least_ratio_to_floor", "{:.2f}".format),
    Column("temporaries", "peak_bytes", common.PEAK.write),
)


class Case(NamedTuple):
    """A function with its arguments, and the number of parameters that it trains."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    trained: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and save benchmarks/results/ops.json."""
    parser = common.parser(__doc__, repeats=7)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=[*SHAPES, "tiny"])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4, 20])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, help="in place of the model's own number")
    settings = parser.parse_args(arguments)

    rows = []
    for dtype, name in itertools.product(settings.dtype, settings.shapes):
        tokens, shapes = SHAPES.get(name, (16, ((24, 8),)))
        for outputs, inputs in shapes:
            rows += _measure(settings.tokens or tokens, outputs, inputs, dtype, settings)
    common.report("ops", "one linear map, forward and backward", COLUMNS, rows, settings)


def _measure(tokens: int, outputs: int, inputs: int, dtype: str, settings: argparse.Namespace) -> list[Row]:
    """Return the rows of one shape, the floor first."""
    keys = jax.random.split(jax.random.key(0), 3)
    normal = lambda key, *shape: jax.random.normal(key, shape, jnp.float32).astype(dtype)  # noqa: E731
    x, dy = normal(keys[0], tokens, inputs), normal(keys[1], tokens, outputs)
    kernel = (0.02 * normal(keys[2], outputs, inputs)).astype(dtype)
    cases = {("frozen floor", None): Case(_floor, (x, kernel, dy), 0)}
    for k in settings.k:
        cases |= {(name, k): case for name, case in _trained(x, kernel, dy, k).items()}
    cases["dense gradient", None] = Case(_dense, (x, kernel, dy), kernel.size)

    shape = f"{tokens} x {outputs} x {inputs}"
    compiled = {key: jax.jit(case.function).lower(*case.arguments).compile() for key, case in cases.items()}
    runs = {key: functools.partial(_run, compiled[key], case.arguments) for key, case in cases.items()}
    floor = next(iter(runs.values()))
    floor()
    began = time.perf_counter()
    floor()
    calls = max(1, math.ceil(CLOCK / (time.perf_counter() - began)))
    times = common.alternate(runs, settings.repeats, warmups=1, title=f"{dtype} {shape}", calls=calls)
    reference = times["frozen floor", None]
    return [
        {
            "method": name,
            "k": k,
            "dtype": dtype,
            "shape": [tokens, outputs, inputs],
            "seconds": statistics.median(seconds),
            "ratio_to_floor": common.ratio(seconds, reference),
            "least_ratio_to_floor": min(seconds) / min(reference),
            "peak_bytes": compiled[name, k].memory_analysis().temp_size_in_bytes,
            "trained": cases[name, k].trained,
            "calls": calls,
        }
        for (name, k), seconds in times.items()
    ]


def _run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    jax.block_until_ready(function(*arguments))


def _trained(x: Any, kernel: Any, dy: Any, k: int) -> dict[str, Case]:
    """Return the methods with a budget of k connections per neuron."""
    columns = selection.select(selection.magnitude(kernel), k)
    values = 1e-3 * jax.random.normal(jax.random.key(1), columns.shape)
    arguments = (x, add_entries(kernel, columns, values), dy, columns, values)
    found = {"bypass": Case(_bypass, arguments, values.size)}
    for algorithm in GradientAlgorithm:
        if algorithm is GradientAlgorithm.CUDA and cuda_kernels.why_not(x.shape[-1], x.dtype):
            continue  # it would be another one
        function = functools.partial(_bypass, algorithm=algorithm)
        found[f"bypass, {algorithm.value}"] = Case(function, arguments, values.size)
    found["autodiff scatter"] = Case(_scatter, (x, kernel, dy, columns, values.astype(kernel.dtype)), values.size)

    rank = max(1, round(values.size / sum(kernel.shape)))
    down = jax.random.normal(jax.random.key(2), (rank, kernel.shape[1])).astype(kernel.dtype)
    up = jax.random.normal(jax.random.key(3), (kernel.shape[0], rank)).astype(kernel.dtype)
    found["LoRA"] = Case(_lora, (x, kernel, dy, down, up), down.size + up.size)
    return found


def _with_gradients(function: Callable[..., Any], dy: Any, *inputs: Any) -> Any:
    """Return y and the gradients of the inputs."""
    y, pull = jax.vjp(function, *inputs)
    return y, pull(dy)


def _floor(x: Any, kernel: Any, dy: Any) -> Any:
    return _with_gradients(lambda x: product(x, kernel), dy, x)


def _dense(x: Any, kernel: Any, dy: Any) -> Any:
    return _with_gradients(product, dy, x, kernel)


def _bypass(x: Any, kernel: Any, dy: Any, columns: Any, values: Any, algorithm: GradientAlgorithm | None = None) -> Any:
    """Compute the resident form, as in training; without an algorithm the library chooses one."""
    function = lambda x, values: ops.bypass_dense(x, kernel, columns, values, resident=True, algorithm=algorithm)  # noqa: E731
    return _with_gradients(function, dy, x, values)


def _scatter(x: Any, kernel: Any, dy: Any, columns: Any, values: Any) -> Any:
    return _with_gradients(lambda x, values: product(x, add_entries(kernel, columns, values)), dy, x, values)


def _lora(x: Any, kernel: Any, dy: Any, down: Any, up: Any) -> Any:
    scale = jnp.float32(1)
    function = lambda x, down, up: product(x, kernel) + low_rank.low_rank_dense(x, down, up, scale)  # noqa: E731
    return _with_gradients(function, dy, x, down, up)


if __name__ == "__main__":
    main()
