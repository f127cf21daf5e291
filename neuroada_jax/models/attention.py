"""Attention: causal, masked, cached and with dropout."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from neuroada_jax.core import ops, platform
from neuroada_jax.models.layers import dropped


def attention(
    query: Float[Array, "B T H N"],
    key: Float[Array, "B S K N"],
    value: Float[Array, "B S K N"],
    *,
    mask: Bool[Array, "B 1 T S"] | None,
    causal: bool,
    window: int | None = None,
) -> Float[Array, "B T H N"]:
    """Scaled dot-product attention with grouped keys and values; the softmax is float32.

    Causal attention without a mask runs as cuDNN flash attention on a GPU in half precision. With a mask (decoding,
    packing, encoders) XLA's own form is used, on a GPU too: it forms the float32 logits (B, H, T, S), so packed rows should
    be no longer than the examples need.

    Args:
      query: of T tokens.
      key: of S slots.
      value: of the same slots.
      mask: which slots each query may see.
      causal: token t sees the slots up to t alone, whatever the mask says; S is T.
      window: the most slots that a query sees, itself among them; for causal attention.
    """
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if causal and mask is None and half and platform.has_flash_attention():
        sliding = None if window is None else (window - 1, 0)
        return _attend(query, key, value, is_causal=True, local_window_size=sliding, implementation="cudnn")
    if not causal:
        return _attend_again(query, key, value, mask)
    # Block after block of queries, each with the slots that it can see: nearly half of the logits are never formed. On a
    # CPU two blocks of 128 queries take 0.4 of the time of one product of 256. The eight blocks of long rows bound what
    # there is to compile.
    tokens = query.shape[1]
    count = 1 if tokens < 96 else min(max(-(-tokens // 128), 2), 8)
    block = -(-tokens // count)
    parts = []
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        first = 0 if window is None else max(start + 1 - window, 0)
        distance = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)[None, :]
        seen = (distance >= 0 if window is None else (distance >= 0) & (distance < window))[None, None]
        if mask is not None:
            seen = seen & mask[:, :, start:stop, first:stop]
        parts.append(_attend_again(query[:, start:stop], key[:, first:stop], value[:, first:stop], seen))
    return jnp.concatenate(parts, axis=1)


def _attend(query: Array, key: Array, value: Array, **options: Any) -> Array:
    with jax.numpy_dtype_promotion("standard"):  # JAX's own code mixes half and float32 in there
        return jax.nn.dot_product_attention(query, key, value, **options)


def _attend_again(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """XLA's attention that keeps no probabilities: as flash attention does, it forms them again in the backward pass.

    On a CPU that is faster than keeping them, too.
    """
    attend: Callable[..., Array] = functools.partial(_attend, mask=mask, implementation="xla")
    return jax.checkpoint(attend, prevent_cse=False)(query, key, value)


def cached_attention(
    query: Float[Array, "B T H N"],
    key: Float[Array, "B K S N"],
    value: Float[Array, "B K S N"],
    *,
    mask: Bool[Array, "B 1 T S"],
) -> Float[Array, "B T H N"]:
    """As `attention` with a mask, on keys and values that lie as a cache has them, so that no step transposes them."""
    batch, tokens, heads, size = query.shape
    wide = ops.wide_dtype(query.dtype)
    grouped = query.reshape(batch, tokens, key.shape[1], heads // key.shape[1], size)
    logits = jnp.einsum("btkgn,bksn->bkgts", grouped, key, preferred_element_type=wide) * size**-0.5
    logits = jnp.where(mask[:, :, None], logits, jnp.finfo(wide).min)
    probabilities = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    return jnp.einsum("bkgts,bksn->btkgn", probabilities, value).reshape(query.shape)


def attention_with_dropout(
    query: Float[Array, "B T H N"],
    key: Float[Array, "B S H N"],
    value: Float[Array, "B S H N"],
    *,
    mask: Bool[Array, "B 1 T S"],
    rate: float,
    rng: Array,
) -> Float[Array, "B T H N"]:
    """As `attention`, with a share `rate` of the probabilities dropped; `rng` says which."""

    def attend(query: Array, key: Array, value: Array, rng: Array) -> Array:
        wide = ops.wide_dtype(query.dtype)
        logits = jnp.einsum("bthn,bshn->bhts", query, key).astype(wide) * query.shape[-1] ** -0.5
        logits = jnp.where(mask, logits, jnp.finfo(wide).min)
        probabilities = dropped(jax.nn.softmax(logits, axis=-1).astype(query.dtype), rate, rng)
        return jnp.einsum("bhts,bshn->bthn", probabilities, value)

    return jax.checkpoint(attend, prevent_cse=False)(query, key, value, rng)


def packed_mask(positions: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Which slots each query may see where rows hold several examples end to end: its own example's, up to itself.

    Args:
      positions: int32, counted from 0 in every example. A token sees as many slots before its own as its position says,
        so a slot with position 0 between or behind the examples sees itself alone, and its softmax is finite.
    """
    slots = jnp.arange(positions.shape[1], dtype=positions.dtype)
    distance = slots[:, None] - slots[None, :]
    return (distance >= 0)[None] & (distance[None] <= positions[:, :, None])
