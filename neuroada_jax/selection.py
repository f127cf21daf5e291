"""Which connections of each neuron get a bypass: a score, and the k best entries of every row."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def magnitude(kernel: Float[Array, "*L O I"]) -> Float[Array, "*L O I"]:
    """The method's score: |W|, chosen once from the pretrained weights."""
    return jnp.abs(kernel)


@functools.partial(jax.jit, static_argnames="k")
def select(scores: Float[Array, "*L O I"], k: int) -> Int[Array, "*L O k"]:
    """The columns of the k largest scores of every row, ascending within a row.

    Ties go to the lowest column, as in `jax.lax.top_k`. Rows with k or fewer inputs get all of them: the last axis of the
    result is min(k, I).

    Args:
      scores: float (..., O, I), one row per neuron.
      k: connections per neuron, at least 1.

    Returns: int32 (..., O, min(k, I)).

    Raises:
      ValueError: k < 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, found {k}")
    if scores.ndim > 2:  # layer by layer, so that the temporaries stay those of one layer
        return lax.map(lambda layer: select(layer, k), scores)
    if k >= scores.shape[-1]:
        return jnp.broadcast_to(jnp.arange(scores.shape[-1], dtype=jnp.int32), scores.shape)
    if k == 1:
        return jnp.argmax(scores, axis=-1, keepdims=True).astype(jnp.int32)
    return jnp.sort(lax.top_k(scores, k)[1], axis=-1).astype(jnp.int32)
