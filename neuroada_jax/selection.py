"""Which connections of each neuron get a bypass: the k best entries of every row, by a score (for the method: |W|).

Selecting reads every weight once. For that, a row is looked at in blocks: the k best entries lie in the k blocks with the
best maxima, and a maximum over blocks costs one pass at the speed of memory, where `lax.top_k` of whole rows takes many
times as long on a CPU. Of two equal blocks the left one counts as better, and so the rule for ties stays exact.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from neuroada_jax.ops import wide_dtype

_BLOCK = 8  # the longest block whose maxima XLA still computes in one vectorised pass on a CPU


def magnitude(kernel: Float[Array, "*L O I"]) -> Float[Array, "*L O I"]:
    """The method's score: |W|, chosen once from the pretrained weights."""
    return jnp.abs(kernel)


@functools.partial(jax.jit, static_argnames=("k", "score"))
def select(
    kernel: Float[Array, "*L O I"], k: int, score: Callable[[jax.Array], jax.Array] = magnitude
) -> Int[Array, "*L O k"]:
    """The columns of the k largest scores of every row, ascending within a row.

    Ties go to the lowest column, as in `jax.lax.top_k`. Rows with k or fewer inputs get all of them: the last axis of the
    result is min(k, I). Temporaries are a fraction of one layer's kernel.

    Args:
      kernel: float (..., O, I), one row per neuron.
      k: connections per neuron, at least 1.
      score: elementwise, array -> scores of the same shape; it sees pieces of the kernel, in float32 at least.

    Returns: int32 (..., O, min(k, I)).

    Raises:
      ValueError: k < 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, found {k}")
    *leading, outputs, inputs = kernel.shape
    if k >= inputs:
        return jnp.broadcast_to(jnp.arange(inputs, dtype=jnp.int32), kernel.shape)
    rows = kernel.reshape(-1, inputs)

    def select_layer(layer: Array) -> Array:
        # The barrier makes the rows depend on the layer: XLA would else widen all of a bfloat16 kernel before the loop.
        own_rows, layer = lax.optimization_barrier((rows, layer))
        return _select(own_rows, layer * outputs, outputs, k, score)

    layers = jnp.arange(math.prod(leading), dtype=jnp.int32)
    return lax.map(select_layer, layers).reshape(*leading, outputs, k)


def _select(
    rows: Float[Array, "R I"], first: Int[Array, ""], count: int, k: int, score: Callable[[Array], Array]
) -> Int[Array, "O k"]:
    """The best columns of `count` rows from `first` on.

    The rows are cut out where they are read, never before: a cut that two readers share is a copy.
    """
    inputs = rows.shape[1]
    # Widened before they are scored, which is exact: XLA's CPU backend would widen and round again for every operation.
    scored = lambda part: score(part.astype(wide_dtype(rows.dtype)))  # noqa: E731
    cut = lambda column, width: lax.dynamic_slice(rows, (first, jnp.int32(column)), (count, width))  # noqa: E731
    # Blocks pay where they are many more than k: each of the two searches below has a cost of its own for every k.
    if inputs % _BLOCK or inputs <= (_BLOCK if k == 1 else 10 * _BLOCK * k):
        return _largest(scored(cut(0, inputs)), k)
    every_eighth = [cut(column, inputs - _BLOCK + 1)[:, ::_BLOCK] for column in range(_BLOCK)]
    maxima = functools.reduce(jnp.maximum, [scored(part) for part in every_eighth])
    blocks = _select(maxima, jnp.int32(0), count, k, lambda scores: scores)
    best = _largest(scored(_take_blocks(rows, blocks, first)), k)
    return jnp.take_along_axis(blocks, best // _BLOCK, axis=1, mode="clip") * _BLOCK + best % _BLOCK


def _largest(scores: Float[Array, "O I"], k: int) -> Int[Array, "O k"]:
    """The best columns by a search of the whole rows. In half precision, XLA's CPU backend would sort them."""
    if k == 1:
        return jnp.argmax(scores, axis=1, keepdims=True).astype(jnp.int32)
    return jnp.sort(lax.top_k(scores, k)[1], axis=1).astype(jnp.int32)


def _take_blocks(rows: Float[Array, "R I"], blocks: Int[Array, "O k"], first: Int[Array, ""]) -> Float[Array, "O _"]:
    """The entries of each row's chosen blocks side by side, (O, k * _BLOCK); row 0 of `blocks` belongs to row `first`."""
    own = lax.broadcasted_iota(jnp.int32, blocks.shape, 0) + first
    dimensions = lax.GatherDimensionNumbers(offset_dims=(2,), collapsed_slice_dims=(0,), start_index_map=(0, 1))
    starts = jnp.stack([own, blocks * _BLOCK], axis=-1)
    return lax.gather(rows, starts, dimensions, (1, _BLOCK), mode="clip").reshape(len(blocks), -1)
