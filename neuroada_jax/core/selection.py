"""Selection of the connections that get a bypass: the k highest-scoring inputs of every neuron (the method: by |W|).

The algorithm is a knock-out tournament among the inputs of each neuron. The first round, the maximum of every eight
neighbouring scores, is the only one that reads the complete kernel; each further round does the same with the winners.
Then, k times, the winner is traced from the last round down to its column, and the rounds it took part in are replayed
without it. On a CPU this costs little more than reading the weights. `lax.top_k` costs up to thirty times that, and
hundreds of times in bfloat16.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from neuroada_jax.core import quantised
from neuroada_jax.core.entries import Layout, wide_dtype
from neuroada_jax.core.scores import Score, magnitude
from neuroada_jax.errors import UserError

_BLOCK = 8  # entries of a match: the most whose maximum XLA computes in one vectorised pass on a CPU
_FINAL = 16  # the largest width of the last round


def select(
    kernel: Float[Array, "*L _ _"] | quantised.QuantisedKernel,
    k: int,
    score: Score = magnitude,
    statistic: Any = None,
    *,
    layout: Layout = Layout.OI,
    shared: bool = False,
    name: str = "kernel",
) -> Int[Array, "*L _ k"]:
    """Return the columns of the k largest scores of every neuron, ascending.

    Ties go to the lowest column, as in `jax.lax.top_k`. Neurons with k or fewer inputs get all of them. Temporaries are a
    fraction of one layer's kernel for |W| where I is a multiple of 8, and otherwise a few float32 copies of one layer's
    kernel, of which (I, O) kernels need one more for its transpose.

    Args:
      kernel: float (*L, O, I), or (*L, I, O) for `Layout.IO`; or quantised (*L, O, I).
      k: connections per neuron, at least 1.
      score: (O, I) -> finite scores of the same shape, called with one layer's kernel in float32 or float64; with a
        statistic, (kernel, statistic) -> scores.
      statistic: a pytree of arrays with the axes *L in front, of which `score` gets one layer; None for none.
      layout: axis order of the kernel; the score always gets (O, I).
      shared: one set of columns for all neurons of a map: those that most neurons would select, see `most_selected`.
      name: of the linear map, for messages.

    Returns:
      int32 (*L, O, min(k, I)), or (*L, 1, min(k, I)) if `shared`.

    Raises:
      ValueError: k < 1.
      UserError: scores of another shape, or NaN or infinite ones (not noticed while `select` is traced by jit).
    """
    if not callable(score):
        raise UserError(f"score: expected a function (kernel) -> scores, such as scores.magnitude, found {score!r}")
    columns, finite = search(kernel, k, score, statistic, layout=layout, name=name)
    check_finite(finite, name)
    inputs = kernel.shape[-1 if Layout(layout) is Layout.OI else -2]
    return most_selected(columns, inputs) if shared else columns


def check_finite(finite: Bool[Array, "*L O"] | None, name: str) -> None:
    """Check what `search` found about the scores of a map; does nothing while it is traced by jit.

    Raises:
      UserError: a neuron has NaN or infinite scores.
    """
    if finite is None or isinstance(finite, jax.core.Tracer) or np.all(finite):
        return
    neuron = tuple(int(index) for index in np.argwhere(~np.asarray(finite))[0])
    raise UserError(f"score: {name} has NaN or infinite scores, first at neuron {neuron}; expected finite numbers")


@functools.partial(jax.jit, static_argnames=("k", "score", "layout", "name"))
def search(
    kernel: Float[Array, "*L _ _"] | quantised.QuantisedKernel,
    k: int,
    score: Score = magnitude,
    statistic: Any = None,
    *,
    layout: Layout = Layout.OI,
    name: str = "kernel",
) -> tuple[Int[Array, "*L O k"], Bool[Array, "*L O"] | None]:
    """Return the columns of the best k scores of every neuron, and whether all are finite (None: none was computed).

    Arguments and errors as in `select`, which this function is without its check of the scores.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, found {k}")
    if isinstance(kernel, quantised.QuantisedKernel):
        of_layer = lambda own, mine: search(quantised.dequantise(own), k, score, mine, name=name)  # noqa: E731
        return quantised.by_layer(of_layer, kernel, statistic)
    *leading, outputs, inputs = kernel.shape if Layout(layout) is Layout.OI else kernel.swapaxes(-1, -2).shape
    if k >= inputs:
        return jnp.broadcast_to(jnp.arange(inputs, dtype=jnp.int32), (*leading, outputs, inputs)), None
    rows = kernel.reshape(-1, kernel.shape[-1])
    in_parts = statistic is None and score is magnitude  # a layer's scores are never in memory
    per_layer = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(leading) :]), statistic)

    def matrix_of(layer: Array) -> Array:
        if Layout(layout) is Layout.OI:
            return lax.dynamic_slice(_bound(rows, layer), (layer * outputs, jnp.int32(0)), (outputs, inputs))
        return lax.dynamic_slice(_bound(rows, layer), (layer * inputs, jnp.int32(0)), (inputs, outputs)).T

    def select_layer(of_layer: tuple[Array, Any]) -> tuple[Array, Array | None]:
        layer, own = of_layer
        if in_parts:
            if Layout(layout) is Layout.OI:
                return _select(rows, layer * outputs, outputs, k, score)
            return _select(matrix_of(layer), jnp.int32(0), outputs, k, score)
        matrix = matrix_of(layer).astype(wide_dtype(kernel.dtype))
        scores = _scores(score, (matrix,) if statistic is None else (matrix, own), name)
        if scores.shape != matrix.shape or not jnp.issubdtype(scores.dtype, jnp.floating):
            expected = f"{matrix.dtype} {matrix.shape}"
            raise UserError(f"score: {name} has scores {scores.dtype} {scores.shape}, expected {expected} (O, I)")
        found, _ = _select(_padded(scores.astype(matrix.dtype)), jnp.int32(0), outputs, k, lambda each: each)
        return found, jnp.all(jnp.isfinite(scores), axis=1)

    layers = jnp.arange(math.prod(leading), dtype=jnp.int32)
    columns, finite = lax.map(select_layer, (layers, per_layer))
    return columns.reshape(*leading, outputs, k), None if finite is None else finite.reshape(*leading, outputs)


@functools.partial(jax.jit, static_argnames="inputs")
def most_selected(columns: Int[Array, "*L O k"], inputs: int) -> Int[Array, "*L 1 k"]:
    """Return the k columns that most neurons of a map have, ascending; ties go to the lowest column."""
    *leading, outputs, k = columns.shape

    def of_layer(own: Array) -> Array:
        votes = jnp.zeros(inputs, jnp.int32).at[own.reshape(-1)].add(1, mode="promise_in_bounds")
        return jnp.sort(lax.top_k(votes, k)[1].astype(jnp.int32))

    return lax.map(of_layer, columns.reshape(-1, outputs, k)).reshape(*leading, 1, k)


def _scores(score: Score, arguments: tuple[Any, ...], name: str) -> Array:
    """Return what a score returns for a layer of a map.

    Raises:
      UserError: it returns no array, or is a function that JAX cannot trace.
    """
    try:
        found = score(*arguments)
    except jax.errors.TracerArrayConversionError as error:
        raise UserError(f"score: the function needs the numbers of {name} in NumPy; write it with jax.numpy") from error
    if found is None:
        raise UserError(f"score: the function returns None for {name}, expected an array of the kernel's shape")
    return jnp.asarray(found)


def _select(
    rows: Float[Array, "R I"], first: Int[Array, ""], count: int, k: int, score: Score
) -> tuple[Int[Array, "O k"], Bool[Array, "O"]]:
    """Return the columns of the best entries in `count` rows from `first` on, and whether a row has no NaN and no inf."""
    inputs = rows.shape[1]
    wide = wide_dtype(rows.dtype)

    def scores_of(column: int, width: int) -> Array:
        # Sliced at every use: a slice with two users would be materialised as a copy. Widened before scoring, which is
        # exact: XLA's CPU backend would widen and round again for every bfloat16 operation.
        part = lax.dynamic_slice(_bound(rows, first), (first, jnp.int32(column)), (count, width))
        return score(part.astype(wide))

    if inputs % _BLOCK:
        return _select(_padded(scores_of(0, inputs)), jnp.int32(0), count, k, lambda scores: scores)

    rounds = [_winners(scores_of, inputs)]
    while rounds[-1].shape[1] > _FINAL:
        rounds[-1] = _padded(rounds[-1])
        rounds.append(_winners(lambda column, width: rounds[-1][:, column : column + width], rounds[-1].shape[1]))

    neurons = jnp.arange(count, dtype=jnp.int32)
    within = jnp.arange(_BLOCK, dtype=jnp.int32)[None, :]

    def next_best(state: tuple[list[Array], Array, Array], _: None) -> tuple[tuple[list[Array], Array, Array], Array]:
        rounds, last_score, last_column = state
        block = _argmax(rounds[-1])
        matches = []  # those of the winner, from the last round to the first: (block, place in it, entries)
        for winners in rounds[-2::-1]:
            entries = _block(winners, neurons, block)
            matches.append((block, _argmax(entries), entries))
            block = block * _BLOCK + matches[-1][1]
        entries = score(_block(_bound(rows, block), neurons + first, block).astype(wide))
        # Mask the entries selected so far: scores descend, and columns ascend among equal scores.
        columns = block[:, None] * _BLOCK + within
        later = (entries == last_score[:, None]) & (columns > last_column[:, None])
        entries = jnp.where((entries < last_score[:, None]) | later, entries, -jnp.inf)
        place = _argmax(entries)
        matches.append((block, place, entries))

        replaced = jnp.full(count, -jnp.inf, wide)
        replayed = []
        for winners, (block, winner, entries) in zip(rounds, reversed(matches), strict=True):
            replaced = jnp.max(jnp.where(within == winner[:, None], replaced[:, None], entries), axis=1)
            at = winners.at[neurons, block]
            replayed.append(at.set(replaced, unique_indices=True, mode="promise_in_bounds"))
        column = matches[-1][0] * _BLOCK + place
        return (replayed, jnp.max(matches[-1][2], axis=1), column), column

    finite = jnp.all(jnp.isfinite(rounds[-1]), axis=1)  # a maximum passes NaN and inf on
    start = (rounds, jnp.full(count, jnp.inf, wide), jnp.full(count, -1, jnp.int32))
    return jnp.sort(lax.scan(next_best, start, length=k)[1].T, axis=1), finite


def _winners(scores_of: Callable[[int, int], Array], width: int) -> Array:
    """Return the maximum of every block of neighbours, (O, width / _BLOCK), of the scores scores_of(column, width)."""
    parts = [scores_of(column, width - _BLOCK + 1)[:, ::_BLOCK] for column in range(_BLOCK)]
    return functools.reduce(jnp.maximum, parts)


def _padded(scores: Float[Array, "O I"]) -> Float[Array, "O _"]:
    """Return the scores padded with -inf to a multiple of _BLOCK."""
    return jnp.pad(scores, ((0, 0), (0, -scores.shape[1] % _BLOCK)), constant_values=-jnp.inf)


def _argmax(entries: Float[Array, "O _"]) -> Int[Array, "O"]:
    return jnp.argmax(entries, axis=1).astype(jnp.int32)


def _block(rows: Float[Array, "R I"], row: Int[Array, "O"], block: Int[Array, "O"]) -> Float[Array, "O _"]:
    """Return one block of each of the given rows, (O, _BLOCK)."""
    dimensions = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0, 1))
    return lax.gather(rows, jnp.stack([row, block * _BLOCK], axis=1), dimensions, (1, _BLOCK), mode="clip")


def _bound(rows: Array, to: Array) -> Array:
    """Return the rows with a dependency on `to`, so that XLA cannot hoist the cast of a bfloat16 kernel out of the loop."""
    return lax.optimization_barrier((rows, to))[0]
