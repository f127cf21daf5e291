"""Which connections of each neuron get a bypass: the k best entries of every row, by a score (for the method: |W|).

A knock-out tournament in each row. Its first round, the best score of every eight neighbours, is the only one that reads
all of the kernel; further rounds do the same with the winners. Then the best entry is followed from the last round down
to its column k times, and each time the rounds it won are replayed without it. On a CPU this costs little more than reading
the weights, where `lax.top_k` costs up to thirty times that, and hundreds of times in bfloat16.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from neuroada_jax.core.ops import Layout, wide_dtype

_BLOCK = 8  # entries of a match: the most whose maximum XLA computes in one vectorised pass on a CPU
_FINAL = 16  # entries that the last round may leave over

Score = Callable[[jax.Array], jax.Array]


def magnitude(kernel: Float[Array, "*L O I"]) -> Float[Array, "*L O I"]:
    """The method's score: |W|, chosen once from the pretrained weights."""
    return jnp.abs(kernel)


def reverse(kernel: Float[Array, "*L O I"]) -> Float[Array, "*L O I"]:
    """-|W|, which selects the smallest entries: the ablation that shows what magnitude is worth."""
    return -jnp.abs(kernel)


@functools.partial(jax.jit, static_argnames=("k", "score", "layout"))
def select(
    kernel: Float[Array, "*L _ _"], k: int, score: Score = magnitude, *, layout: Layout = Layout.OI
) -> Int[Array, "*L O k"]:
    """The columns of the k largest scores of every neuron, ascending.

    Ties go to the lowest column, as in `jax.lax.top_k`. Neurons with k or fewer inputs get all of them: the last axis of
    the result is min(k, I). Temporaries are a fraction of one layer's kernel where I is a multiple of 8; for (I, O) kernels
    add two copies of one layer's kernel, to transpose it.

    Args:
      kernel: float (..., O, I), one row per neuron, or (..., I, O) as `layout` says.
      k: connections per neuron, at least 1.
      score: elementwise, array -> finite scores of the same shape; it sees pieces of the kernel, in float32 at least.
      layout: where the kernel has its neurons.

    Returns: int32 (..., O, min(k, I)).

    Raises:
      ValueError: k < 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, found {k}")
    *leading, outputs, inputs = kernel.shape if layout is Layout.OI else kernel.swapaxes(-1, -2).shape
    if k >= inputs:
        return jnp.broadcast_to(jnp.arange(inputs, dtype=jnp.int32), (*leading, outputs, inputs))
    rows = kernel.reshape(-1, kernel.shape[-1])

    def select_layer(layer: Array) -> Array:
        if layout is Layout.OI:
            return _select(rows, layer * outputs, outputs, k, score)
        of_layer = lax.dynamic_slice(_bound(rows, layer), (layer * inputs, jnp.int32(0)), (inputs, outputs))
        return _select(of_layer.T, jnp.int32(0), outputs, k, score)

    layers = jnp.arange(math.prod(leading), dtype=jnp.int32)
    return lax.map(select_layer, layers).reshape(*leading, outputs, k)


def _select(rows: Float[Array, "R I"], first: Int[Array, ""], count: int, k: int, score: Score) -> Int[Array, "O k"]:
    """The best columns of `count` rows from `first` on."""
    inputs = rows.shape[1]
    wide = wide_dtype(rows.dtype)

    def cut(column: int, width: int) -> Array:
        # Rows are cut out where they are read: a cut that two readers share is a copy. They are widened before they are
        # scored, which is exact: XLA's CPU backend would widen and round again for every operation.
        part = lax.dynamic_slice(_bound(rows, first), (first, jnp.int32(column)), (count, width))
        return score(part.astype(wide))

    if inputs % _BLOCK:
        return _select(_padded(cut(0, inputs)), jnp.int32(0), count, k, lambda scores: scores)

    rounds = [_winners(cut, inputs)]
    while rounds[-1].shape[1] > _FINAL:
        rounds[-1] = _padded(rounds[-1])
        rounds.append(_winners(lambda column, width: rounds[-1][:, column : column + width], rounds[-1].shape[1]))

    every = jnp.arange(count, dtype=jnp.int32)
    within = jnp.arange(_BLOCK, dtype=jnp.int32)[None, :]

    def next_best(state: tuple[list[Array], Array, Array], _: None) -> tuple[tuple[list[Array], Array, Array], Array]:
        rounds, last_score, last_column = state
        block = _argmax(rounds[-1])
        matches = []  # of the winner, from the final down
        for winners in rounds[-2::-1]:
            entries = _block(winners, every, block)
            matches.append((block, _argmax(entries), entries))
            block = block * _BLOCK + matches[-1][1]
        entries = score(_block(_bound(rows, block), every + first, block).astype(wide))
        # What came before is out: scores fall, and columns rise among equal ones.
        columns = block[:, None] * _BLOCK + within
        later = (entries == last_score[:, None]) & (columns > last_column[:, None])
        entries = jnp.where((entries < last_score[:, None]) | later, entries, -jnp.inf)
        place = _argmax(entries)
        matches.append((block, place, entries))

        replaced = jnp.full(count, -jnp.inf, wide)
        replayed = []
        for winners, (block, winner, entries) in zip(rounds, reversed(matches), strict=True):
            replaced = jnp.max(jnp.where(within == winner[:, None], replaced[:, None], entries), axis=1)
            at = winners.at[every, block]
            replayed.append(at.set(replaced, unique_indices=True, mode="promise_in_bounds"))
        column = matches[-1][0] * _BLOCK + place
        return (replayed, jnp.max(matches[-1][2], axis=1), column), column

    start = (rounds, jnp.full(count, jnp.inf, wide), jnp.full(count, -1, jnp.int32))
    return jnp.sort(lax.scan(next_best, start, length=k)[1].T, axis=1)


def _winners(cut: Callable[[int, int], Array], width: int) -> Array:
    """(O, width / _BLOCK): the maximum of every block of neighbours. `cut(column, width)` gives scores."""
    return functools.reduce(jnp.maximum, [cut(column, width - _BLOCK + 1)[:, ::_BLOCK] for column in range(_BLOCK)])


def _padded(scores: Float[Array, "O I"]) -> Float[Array, "O _"]:
    """The scores, filled up to whole blocks with what never wins."""
    return jnp.pad(scores, ((0, 0), (0, -scores.shape[1] % _BLOCK)), constant_values=-jnp.inf)


def _argmax(entries: Float[Array, "O _"]) -> Int[Array, "O"]:
    return jnp.argmax(entries, axis=1).astype(jnp.int32)


def _block(rows: Float[Array, "R I"], row: Int[Array, "O"], block: Int[Array, "O"]) -> Float[Array, "O _"]:
    """One block of each of the given rows, (O, _BLOCK)."""
    dimensions = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0, 1))
    return lax.gather(rows, jnp.stack([row, block * _BLOCK], axis=1), dimensions, (1, _BLOCK), mode="clip")


def _bound(rows: Array, to: Array) -> Array:
    """The rows, made to depend on something inside a loop: XLA would else widen all of a bfloat16 kernel before it."""
    return lax.optimization_barrier((rows, to))[0]
