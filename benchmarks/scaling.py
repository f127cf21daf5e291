"""What one training step costs as k, depth, width and tokens grow, and how long it takes to compile at any depth.

    make bench-scaling     (or: python -m benchmarks.scaling --k 1 20 --layers 2 16)

The library's step (AdamW, clipping and resident write included; no remat) on LLaMAs with random weights, in float32,
every token labelled. One thing changes at a time from `--base`; where k does not, it is the first of `--k`. Each shape has
its own frozen floor, and all take turns. `peak_bytes` are the temporaries of the compiled step, `compile_seconds` its
tracing and compiling with nothing cached. The last rows compile LLaMA-7B's step and never run it: their seconds are those
of compiling.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import common
from benchmarks.check_h100 import LLAMA_7B
from benchmarks.common import Column, Row
from benchmarks.jax_methods import floor_gradient, to_batch, training_step
from benchmarks.methods import FLOOR, OURS, random_tokens
from neuroada_jax import console, models
from neuroada_jax.core import bypass
from neuroada_jax.core.trees import Tree
from neuroada_jax.models import Model, Remat

COMPILED = "LLaMA-7B, compiled only"
COMPILED_TOKENS = (2, 512)  # rows, tokens in each
VOCABULARY = 4096
AXES = {"k": "k", "layers": "layers", "width": "width D", "tokens": "tokens"}  # field of a row: how a picture names it
COLUMNS = (
    Column("method", "method"),
    Column("k", "k"),
    Column("layers", "layers"),
    Column("D", "width"),
    Column("tokens", "tokens"),
    Column("trained", "trained", "{:,}".format),
    common.SECONDS,
    common.RATIO,
    Column("temporaries", "peak_bytes", common.PEAK.write),
    Column("compile s", "compile_seconds", "{:.1f}".format),
)


class Shape(NamedTuple):
    """What a model and its batch look like; F = 8/3 D, up to a multiple of 64, and heads of 64."""

    layers: int
    width: int
    tokens: int

    @property
    def model(self) -> Model:
        """The architecture."""
        return models.from_hf_config(
            {
                "model_type": "llama",
                "vocab_size": VOCABULARY,
                "hidden_size": self.width,
                "intermediate_size": -(-8 * self.width // (3 * 64)) * 64,
                "num_hidden_layers": self.layers,
                "num_attention_heads": max(1, self.width // 64),
                "max_position_embeddings": 2048,
                "tie_word_embeddings": True,
            }
        )


class Case(NamedTuple):
    """One row: a method on a shape; `k` is None for the floor."""

    shape: Shape
    k: int | None

    def __str__(self) -> str:
        layers, width, tokens = self.shape
        return f"{FLOOR if self.k is None else f'k={self.k}'}, {layers} layers, D={width}, {tokens} tokens"


class Built(NamedTuple):
    """A case that is ready to run, and what is known of it before it does."""

    run: Callable[[], None]
    row: Row


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and saves benchmarks/results/scaling.json and scaling.png."""
    parser = common.parser(__doc__, repeats=5)
    parser.add_argument("--base", type=int, nargs=3, default=[4, 512, 1024], metavar=("LAYERS", "WIDTH", "TOKENS"))
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4, 20, 64])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--width", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096], help="multiples of --length")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--compiled-layers", type=int, nargs="*", default=[2, 8, 32, 80], help="depths of LLaMA-7B's step")
    settings = parser.parse_args(arguments)
    base = Shape(*settings.base)
    if wrong := [tokens for tokens in (base.tokens, *settings.tokens) if tokens % settings.length]:
        parser.error(f"--tokens: {wrong[0]} is no multiple of --length {settings.length}")

    rows = _measure(_cases(base, settings), settings) + _compile_only(settings.compiled_layers, settings.k[0])
    common.report("scaling", "one training step, float32, and compiling it", COLUMNS, rows, settings)
    _draw(settings.out / "scaling.png", rows, base, settings.k[0])


def _cases(base: Shape, settings: argparse.Namespace) -> list[Case]:
    """Every shape behind its floor; the base with every k, the others with the first."""
    shapes = [base]
    for field in Shape._fields:
        shapes += [base._replace(**{field: value}) for value in getattr(settings, field)]
    found = []
    for shape in dict.fromkeys(shapes):
        found += [Case(shape, k) for k in (None, *(settings.k if shape == base else settings.k[:1]))]
    return found


def _measure(cases: Sequence[Case], settings: argparse.Namespace) -> list[Row]:
    built: dict[Case, Built] = {}
    with console.bar("compiling", len(cases)) as shown:
        for done, case in enumerate(cases):
            shown.update(done, len(cases), str(case))
            built[case] = _build(case, settings.length)
        shown.update(len(cases), len(cases))
    runs = {case: built[case].run for case in cases}
    times = common.alternate(runs, settings.repeats, warmups=1, title="measuring")
    return [
        built[case].row
        | {
            "seconds": statistics.median(times[case]),
            "ratio_to_floor": common.ratio(times[case], times[Case(case.shape, None)]),
        }
        for case in cases
    ]


def _build(case: Case, length: int) -> Built:
    """Random weights, the compiled method and a batch."""
    model = case.shape.model

    def initial_params() -> Tree:
        return model.module().init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), method="initialise")["params"]

    batch = to_batch(random_tokens(case.shape.tokens // length, length, VOCABULARY))
    if case.k is None:
        params = jax.jit(initial_params)()
        scales, gradient = floor_gradient(model)
        compiled, seconds = _compiled(gradient, scales(params), params, batch)
        run = lambda: jax.block_until_ready(compiled(scales(params), params, batch))  # noqa: E731
        return Built(run, _row(FLOOR, None, case.shape.tokens, model, 0, compiled, seconds))

    first_state, train = training_step(model, case.k, Remat.NONE)
    state = jax.jit(lambda: first_state(initial_params()))()
    compiled, seconds = _compiled(train, state, batch)
    row = _row(OURS, case.k, case.shape.tokens, model, bypass.count(state.trainable), compiled, seconds)

    def run_step() -> None:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    return Built(run_step, row)


def _compile_only(depths: Sequence[int], k: int) -> list[Row]:
    """LLaMA-7B's step from shapes alone, with as many layers as it has and with fewer and more."""
    rows, (count, length) = [], COMPILED_TOKENS
    batch = to_batch(random_tokens(count, length, VOCABULARY))
    with console.bar("compiling LLaMA-7B", len(depths)) as shown:
        for done, layers in enumerate(depths):
            shown.update(done, len(depths), f"{layers} layers")
            model = models.from_hf_config({**LLAMA_7B, "num_hidden_layers": layers})
            first_state, train = training_step(model, k, Remat.NONE)
            state = jax.eval_shape(first_state, model.abstract_params())
            compiled, seconds = _compiled(train, state, batch)
            trained = bypass.count(state.trainable)
            row = _row(COMPILED, k, count * length, model, trained, compiled, seconds)
            rows.append(row | {"seconds": seconds, "ratio_to_floor": None})
        shown.update(len(depths), len(depths))
    return rows


def _compiled(function: Any, *arguments: Any) -> tuple[Any, float]:
    """A jitted function compiled for these arguments, and the seconds that tracing and compiling took."""
    jax.clear_caches()  # what was traced for one depth serves the next
    began = time.perf_counter()
    compiled = function.trace(*arguments).lower().compile()
    return compiled, time.perf_counter() - began


def _row(method: str, k: int | None, tokens: int, model: Model, trained: int, compiled: Any, seconds: float) -> Row:
    """What is known before a run; the time of a step is still missing."""
    config = model.config
    return {
        "method": method,
        "k": k,
        "dtype": jnp.dtype(config.dtype).name,
        "shape": [config.num_layers, config.hidden_size, config.intermediate_size, tokens],
        "layers": config.num_layers,
        "width": config.hidden_size,
        "tokens": tokens,
        "trained": trained,
        "peak_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_seconds": seconds,
    }


def _draw(path: Path, rows: Sequence[Row], base: Shape, k: int) -> None:
    """Seconds, temporaries and compile time (from top to bottom) against k, depth, width and tokens."""
    try:
        import matplotlib.figure
    except ImportError:
        console.say(f"no {path.name}: install matplotlib (pip install 'neuroada-jax[plots]') to have the curves drawn")
        return
    measures: Mapping[str, str] = {
        "seconds": "seconds a step; ratio to the floor",
        "peak_bytes": "bytes of temporaries",
        "compile_seconds": "seconds to compile",
    }
    figure = matplotlib.figure.Figure(figsize=(14, 9), layout="constrained")
    grid = figure.subplots(len(measures), len(AXES), sharey="row", sharex="col")
    for line, (measure, text) in zip(grid, measures.items(), strict=True):
        line[0].set_ylabel(text)
        for axes, axis in zip(line, AXES, strict=True):
            if measure != "compile_seconds":
                axes.set_yscale("log")
            _draw_curves(axes, axis, measure, rows, base, k)
    for axes, name in zip(grid[-1], AXES.values(), strict=True):
        axes.set_xlabel(name)
    grid[-1][0].set_ylim(bottom=0)
    handles, labels = grid[-1][1].get_legend_handles_labels()  # the depths: the one column with every curve
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)


def _draw_curves(axes: Any, axis: str, measure: str, rows: Sequence[Row], base: Shape, k: int) -> None:
    """Each method along one axis, the other three as they are in the base."""
    fixed = {name: value for name, value in {**base._asdict(), "k": k}.items() if name != axis}
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    ours = _along(axis, [row for row in rows if row["method"] == OURS], fixed)
    axes.plot([row[axis] for row in ours], [row[measure] for row in ours], "o-", label=OURS)
    if measure == "seconds":
        for row in ours:
            axes.annotate(
                f"{row['ratio_to_floor']:.2f}", (row[axis], row[measure]), (0, 6), textcoords="offset points", ha="center"
            )
    floor = _along(axis, [row | {"k": k} for row in rows if row["method"] == FLOOR], fixed)
    if axis == "k":
        axes.axhline(floor[0][measure], color="tab:orange", linestyle="--")
    else:
        axes.plot([row[axis] for row in floor], [row[measure] for row in floor], "s--", label=FLOOR)
    if axis == "layers" and measure == "compile_seconds":
        deep = [row for row in rows if row["method"] == COMPILED]
        axes.plot([row[axis] for row in deep], [row[measure] for row in deep], "^:", label=COMPILED)


def _along(axis: str, rows: Sequence[Row], fixed: Mapping[str, int]) -> list[Row]:
    chosen = [row for row in rows if all(row[name] == value for name, value in fixed.items())]
    return sorted(chosen, key=lambda row: row[axis])


if __name__ == "__main__":
    main()
