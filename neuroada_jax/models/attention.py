"""Scaled dot-product attention: causal, masked, cached and with dropout."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from neuroada_jax.core import platform
from neuroada_jax.core.entries import wide_dtype
from neuroada_jax.models.layers import dropout
from neuroada_jax.models.remat import prevent_cse


class Scaling(NamedTuple):
    """How the products of queries and keys become logits.

    Attributes:
      factor: of the products; None: 1 / sqrt(N).
      cap: the logits are cap * tanh(logits / cap); None: as they are.
    """

    factor: float | None = None
    cap: float | None = None

    def logits(self, products: Array, size: int) -> Array:
        """Return the logits of products for heads of width `size`."""
        scaled = products * (size**-0.5 if self.factor is None else self.factor)
        return scaled if self.cap is None else capped(scaled, self.cap)


PLAIN = Scaling()


def capped(logits: Float[Array, "*B"], cap: float) -> Float[Array, "*B"]:
    """Return cap * tanh(logits / cap)."""
    return jnp.tanh(logits / cap) * cap


def attention(
    query: Float[Array, "B T H N"],
    key: Float[Array, "B S K N"],
    value: Float[Array, "B S K N"],
    *,
    mask: Bool[Array, "B 1 T S"] | None,
    causal: bool,
    window: int | None = None,
    scaling: Scaling = PLAIN,
) -> Float[Array, "B T H N"]:
    """Compute scaled dot-product attention, grouped-query where K < H; the softmax is float32.

    Causal attention without a mask or a cap runs as cuDNN flash attention on a GPU in half precision, where the GPU and the
    size of the heads allow it. Attention with a mask (decoding, packing, encoders) takes XLA's implementation on every
    platform, which forms the float32 logits (B, H, T, S): packed rows should be no longer than their examples need.

    Args:
      query: queries of T tokens.
      key: keys of S slots.
      value: values of the same slots.
      mask: the slots that each query attends to.
      causal: token t attends to slots up to t only, in addition to the mask; S equals T.
      window: for causal attention, the largest number of slots that a query attends to, its own included.
      scaling: of the logits.
    """
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if causal and mask is None and scaling.cap is None and half and platform.has_flash_attention(query.shape[-1]):
        sliding = None if window is None else (window - 1, 0)
        options: dict[str, Any] = {"local_window_size": sliding, "implementation": "cudnn", "scale": scaling.factor}
        return _attend(query, key, value, is_causal=True, **options)
    if not causal:
        return _attend_with_remat(query, key, value, mask, scaling)
    # Blocks of queries, each with the slots that it can attend to: nearly half of the logits are never formed. On a CPU
    # two blocks of 128 queries take 0.4 of the time of one product of 256. At most eight blocks bound the compile time.
    tokens = query.shape[1]
    count = 1 if tokens < 96 else min(max(-(-tokens // 128), 2), 8)
    block = -(-tokens // count)
    parts = []
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        first = 0 if window is None else max(start + 1 - window, 0)
        distance = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)[None, :]
        visible = (distance >= 0 if window is None else (distance >= 0) & (distance < window))[None, None]
        if mask is not None:
            visible = visible & mask[:, :, start:stop, first:stop]
        own = (query[:, start:stop], key[:, first:stop], value[:, first:stop])
        parts.append(_attend_with_remat(*own, visible, scaling))
    return jnp.concatenate(parts, axis=1)


def _attend(query: Array, key: Array, value: Array, **options: Any) -> Array:
    with jax.numpy_dtype_promotion("standard"):  # JAX's own code mixes half and float32 in there
        return jax.nn.dot_product_attention(query, key, value, **options)


def _attend_capped(query: Array, key: Array, value: Array, mask: Array | None, scaling: Scaling) -> Array:
    """Compute attention whose logits are capped, for which JAX has no function."""
    batch, tokens, heads, size = query.shape
    grouped = query.reshape(batch, tokens, key.shape[2], heads // key.shape[2], size)
    products = jnp.einsum("btkgn,bskn->bkgts", grouped, key, preferred_element_type=wide_dtype(query.dtype))
    logits = scaling.logits(products, size)
    if mask is not None:
        logits = jnp.where(mask[:, :, None], logits, jnp.finfo(logits.dtype).min)
    probabilities = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    return jnp.einsum("bkgts,bskn->btkgn", probabilities, value).reshape(query.shape)


def _attend_with_remat(query: Array, key: Array, value: Array, mask: Array | None, scaling: Scaling) -> Array:
    """Compute attention with XLA and recompute the probabilities in the backward pass, as flash attention does.

    On a CPU this is also faster than keeping them.
    """
    attend: Callable[..., Array]
    if scaling.cap is None:
        attend = functools.partial(_attend, mask=mask, implementation="xla", scale=scaling.factor)
    else:
        attend = functools.partial(_attend_capped, mask=mask, scaling=scaling)
    return jax.checkpoint(attend, prevent_cse=prevent_cse())(query, key, value)


def cached_attention(
    query: Float[Array, "B T H N"],
    key: Float[Array, "B K S N"],
    value: Float[Array, "B K S N"],
    *,
    mask: Bool[Array, "B 1 T S"],
    scaling: Scaling = PLAIN,
) -> Float[Array, "B T H N"]:
    """Compute `attention` with a mask on keys and values in the layout of a cache, so that no step transposes them."""
    batch, tokens, heads, size = query.shape
    wide = wide_dtype(query.dtype)
    grouped = query.reshape(batch, tokens, key.shape[1], heads // key.shape[1], size)
    products = jnp.einsum("btkgn,bksn->bkgts", grouped, key, preferred_element_type=wide)
    logits = scaling.logits(products, size)
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
    rng: Array | None,
    bias: Float[Array, "1 H T S"] | None = None,
) -> Float[Array, "B T H N"]:
    """Compute `attention` with dropout of rate `rate` on the probabilities where there is a key `rng`.

    Args:
      query: queries of T tokens.
      key: keys of S tokens.
      value: values of the same tokens.
      mask: the tokens that each query attends to.
      rate: of the dropout.
      rng: its key.
      bias: added to the logits, in every example.
    """

    def attend(query: Array, key: Array, value: Array, bias: Array | None, rng: Array | None) -> Array:
        logits = jnp.einsum("bthn,bshn->bhts", query, key).astype(wide_dtype(query.dtype)) * query.shape[-1] ** -0.5
        logits = logits if bias is None else logits + jnp.broadcast_to(bias.astype(logits.dtype), logits.shape)
        return attended_values(logits, value, mask, rate, rng)

    return jax.checkpoint(attend, prevent_cse=prevent_cse())(query, key, value, bias, rng)


def attended_values(logits: Array, value: Array, mask: Array, rate: float, rng: Array | None) -> Array:
    """Return the values (B, S, H, N) in the mean that their logits (B, H, T, S) give, with dropout as above."""
    logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    probabilities = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    if rng is not None:
        probabilities = dropout(probabilities, rate, rng)
    return jnp.einsum("bhts,bshn->bthn", probabilities, value)


def bidirectional(
    query: Float[Array, "B T H N"],
    key: Float[Array, "B S H N"],
    value: Float[Array, "B S H N"],
    *,
    mask: Bool[Array, "B 1 T S"],
    rate: float,
    rng: Array | None,
    bias: Float[Array, "1 H T S"] | None = None,
) -> Float[Array, "B T H N"]:
    """Compute an encoder's attention, with dropout where there is a key `rng`; arguments of `attention_with_dropout`."""
    if rng is None and bias is None:
        return attention(query, key, value, mask=mask, causal=False)
    return attention_with_dropout(query, key, value, mask=mask, rate=rate, rng=rng, bias=bias)


def packed_mask(positions: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Return the causal mask of packed rows, in which a token attends to its own example only.

    Args:
      positions: int32, counted from 0 in every example. A token attends to itself and to as many slots before it as its
        position; a padding slot with position 0 attends to itself only, which keeps its softmax finite.
    """
    slots = jnp.arange(positions.shape[1], dtype=positions.dtype)
    distance = slots[:, None] - slots[None, :]
    return (distance >= 0)[None] & (distance[None] <= positions[:, :, None])
