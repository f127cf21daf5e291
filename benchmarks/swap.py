"""Another adapter in a live model: putting one in, swapping, overwriting and taking it out, against a full merge.

    make bench-swap        (or: python -m benchmarks.swap --model MODEL --k 1 20)

All but the merge work in place, on donated parameters. A full merge makes a new tree, a copy of all parameters. A swap is
between two adapters of the same k that were chosen by different rules; where columns are equal, overwriting is enough.
`allocated_bytes` is what the compiled call needs besides its arguments.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common
from benchmarks.common import Column, Row
from benchmarks.methods import targets
from neuroada_jax import console
from neuroada_jax.core import bypass
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.core.trees import ModulePath, Tree
from neuroada_jax.pretrained.load import load_model

MERGE = "full merge"
COLUMNS = (
    Column("method", "method"),
    Column("k", "k"),
    Column("dtype", "dtype"),
    Column("entries", "entries", "{:,}".format),
    Column("ms", "seconds", lambda seconds: f"{1e3 * seconds:.4g}"),
    Column("/full merge", "ratio_to_floor", "{:.4f}".format),
    Column("allocates", "allocated_bytes", console.size),
)


class Live:
    """The parameters that all runs change in place, and the base entries of the adapter that is in them."""

    def __init__(self, params: Tree) -> None:
        self.params = params
        self.base: Tree = {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and saves benchmarks/results/swap.json."""
    parser = common.parser(__doc__, repeats=15)
    parser.add_argument("--model", default=common.MODEL)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 20])
    settings = parser.parse_args(arguments)

    base = load_model(settings.model, settings.dtype)
    live, paths = Live(base.params), targets(base.params, base.model)
    del base
    runs: dict[tuple[str, int], Callable[[], object]] = {}
    about: dict[tuple[str, int], Row] = {}
    for k in settings.k:
        first, other = (_adapter(live.params, paths, k, score) for score in (jnp.abs, lambda kernel: -jnp.abs(kernel)))
        for name, run, allocated in _operations(live, first, other):
            runs[name, k] = run
            about[name, k] = {"entries": bypass.count(first.values), "allocated_bytes": allocated}
    # In the order of the dict: every turn begins and ends with the original weights.
    times = common.alternate(runs, settings.repeats, warmups=1, title="adapters in a live model")
    common.report("swap", "another adapter in a live model", COLUMNS, list(_rows(times, about, settings)), settings)


def _adapter(params: Tree, paths: Sequence[ModulePath], k: int, score: Callable[[jax.Array], jax.Array]) -> Bypass:
    built = bypass.build(params, paths, k, score=score)
    return built._replace(values=jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-3), built.values))


def _operations(live: Live, first: Bypass, other: Bypass) -> Iterator[tuple[str, Callable[[], None], int]]:
    """(name, call, bytes it allocates) of every operation, compiled, each from the state that the one before leaves."""
    in_place = functools.partial(jax.jit, donate_argnums=0)
    swap = in_place(bypass.swap)
    overwrite = in_place(lambda params, base: (bypass.make_resident(params, other, base), base))
    remove = in_place(lambda params, base: (bypass.unmerge(params, other.columns, base), {}))
    stages: list[tuple[str, Any, Callable[[], tuple]]] = [
        (MERGE, jax.jit(bypass.merge), lambda: (live.params, first)),
        ("put in", swap, lambda: (live.params, {}, {}, first)),
        ("swap", swap, lambda: (live.params, first.columns, live.base_entries, other)),
        ("overwrite, equal columns", overwrite, lambda: (live.params, live.base_entries)),
        ("removal", remove, lambda: (live.params, live.base_entries)),
    ]
    for name, function, arguments in stages:
        compiled = function.lower(*arguments()).compile()

        def run(name: str = name, compiled: Any = compiled, arguments: Callable[[], tuple] = arguments) -> None:
            result = jax.block_until_ready(compiled(*arguments()))
            if name != MERGE:
                live.params, live.base_entries = result

        run()
        memory = compiled.memory_analysis()
        yield name, run, memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def _rows(
    times: dict[tuple[str, int], list[float]], about: dict[tuple[str, int], Row], settings: argparse.Namespace
) -> Iterator[Row]:
    for (name, k), seconds in times.items():
        yield {
            "method": name,
            "k": k,
            "dtype": settings.dtype,
            "shape": None,
            "seconds": statistics.median(seconds),
            "peak_bytes": None,
            "ratio_to_floor": common.ratio(seconds, times[MERGE, k]),
            **about[name, k],
        }


if __name__ == "__main__":
    main()
