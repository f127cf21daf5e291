"""The building blocks that the model files share: the linear map with its bypass, normalisation, attention, remat.

Which form a linear map takes is decided by the collections that the caller passes to `apply`, nothing else:

    params                           a plain frozen linear map (base, merged or resident weights alike)
    params, bypass, columns          W + D formed on the fly (ops.bypass_dense without base)
    params, bypass, columns, base    params hold W + D already, values are the gradient tap (resident; training)
"""

import contextlib
import contextvars
import enum
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from neuroada_jax.core import ops, platform

BYPASS_COLLECTIONS = ("bypass", "columns", "base")
_SAVED = "saved_output"
_PART_TOKENS = 2048  # fewer would leave a GPU idle
_FEW_TOKENS = 16


class Remat(enum.StrEnum):
    """What a layer keeps for the backward pass.

    Norms, gated products and attention probabilities are computed a second time under all three: cheaper than keeping them.
    """

    NONE = "none"  # the inputs and outputs of linear maps, and what fused attention wants to keep
    NAMES = "names"  # the outputs of linear maps and of attention
    FULL = "full"  # the layer's input only: one more forward pass


_KEEP_NAMED = jax.checkpoint_policies.save_only_these_names(_SAVED)


class Placement(NamedTuple):
    """Where arrays have to be while a layer computes, on devices that share the weights.

    Attributes:
      weights: the variables of one layer, by collection, as the layer needs them.
      inputs: what a linear map reads.
    """

    weights: Callable[[Any], Any]
    inputs: Callable[[Array], Array]


_placement: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement", default=None)


@contextlib.contextmanager
def placed(placement: Placement) -> Iterator[None]:
    """Models that are applied inside gather the weights of one layer at a time, in the forward and the backward pass."""
    token = _placement.set(placement)
    try:
        yield
    finally:
        _placement.reset(token)


def remat_module(module: type[nn.Module], remat: Remat) -> type[nn.Module]:
    """The module class under the given remat policy, for use as the body of a layer scan.

    Where weights are gathered (`placed`), `Remat.NONE` keeps what `Remat.NAMES` does: what a linear map keeps for its
    backward pass would be all gathered weights.
    """
    placement = _placement.get()
    if placement is not None:
        module = nn.map_variables(module, ("params", *BYPASS_COLLECTIONS), placement.weights)
    elif remat is Remat.NONE:
        return module
    policy = None if remat is Remat.FULL else _KEEP_NAMED
    # The scan already keeps XLA from merging the recomputation with the forward pass.
    return nn.remat(module, policy=policy, prevent_cse=False)


def token_wise(block: Callable[..., Any], remat: Remat, shape: tuple[int, ...]) -> Callable[..., Any]:
    """A layer's block that treats every token by itself, under what its policy asks beyond `remat_module`.

    Under `Remat.NONE` it keeps its input and its linear maps' outputs alone. Under `Remat.FULL` memory goes into weights,
    the layers' inputs and one layer's recomputation: of that, a part of the batch at a time is enough, and nothing is
    computed more often for it.

    Args:
      block: maps (module, (B, T, D)) to (B, T, D).
      remat: the layer's policy.
      shape: (B, T, D).
    """
    if remat is Remat.NONE:
        return nn.remat(block, policy=_KEEP_NAMED, prevent_cse=False)
    rows, tokens = shape[0], shape[0] * shape[1]
    fitting = [parts for parts in range(1, rows + 1) if rows % parts == 0 and tokens // parts <= _PART_TOKENS]
    parts = min(fitting, default=rows)
    if remat is Remat.NAMES or parts == 1:
        return block

    def one_part(module: nn.Module, carry: None, part: Array) -> tuple[None, Array]:
        return carry, block(module, part)

    run = nn.scan(
        nn.remat(one_part, prevent_cse=False),
        variable_broadcast=("params", *BYPASS_COLLECTIONS),
        split_rngs={"params": False, "dropout": True},
    )
    return lambda module, x: run(module, None, x.reshape(parts, rows // parts, *shape[1:]))[1].reshape(shape)


def saved(x: Array) -> Array:
    """Marks an activation that the policies other than `Remat.FULL` keep."""
    return checkpoint_name(x, _SAVED)


class BypassDense(nn.Module):
    """A frozen linear map y = x W^T + b that carries a bypass where the caller passes one.

    Parameters: kernel (O, I) as in a Hugging Face checkpoint, bias (O,) if `use_bias`.
    """

    features: int
    use_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        placement = _placement.get()
        x = x if placement is None else placement.inputs(x)
        shape = (self.features, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape, self.dtype)
        if self.has_variable("bypass", "values"):
            columns: Array = self.get_variable("columns", "columns")
            y = ops.bypass_dense(
                x,
                kernel,
                columns,
                self.get_variable("bypass", "values"),
                self.get_variable("base", "base", None),
                algorithm=ops.choose_algorithm(columns.shape[1], x.shape[-1], split=None if placement is None else True),
            )
        else:
            y = _product(x, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.dtype)
            y = y + jnp.broadcast_to(bias, y.shape)
        return saved(y)


def _product(x: Any, kernel: Any) -> Array:
    """x W^T of (*B, I) and (O, I). On a CPU few tokens go on the right: XLA takes a fifth less time for that product."""
    if platform.platform() == "cpu" and 1 < math.prod(x.shape[:-1]) <= _FEW_TOKENS:
        y = lax.dot_general(kernel, x.reshape(-1, x.shape[-1]), (((1,), (1,)), ((), ())))
        # Without the barrier XLA turns the product back again.
        return lax.optimization_barrier(y).T.reshape(*x.shape[:-1], kernel.shape[0])
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (1,)), ((), ())))


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last axis, in float32; parameter scale (D,)."""

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)

        def normalise(x: Array, scale: Array) -> Array:
            wide = x.astype(ops.wide_dtype(x.dtype))
            variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
            normed = (wide * lax.rsqrt(variance + self.epsilon)).astype(x.dtype)
            return normed * jnp.broadcast_to(scale, normed.shape)

        # Else the backward pass keeps x in float32, and its normalised form a second time.
        return jax.checkpoint(normalise, prevent_cse=False)(x, scale)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, in float32; parameters scale (D,) and bias (D,)."""

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.dtype)

        def normalise(x: Array, scale: Array, bias: Array) -> Array:
            wide = x.astype(ops.wide_dtype(x.dtype))
            centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
            variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
            scale, bias = (jnp.broadcast_to(leaf.astype(wide.dtype), wide.shape) for leaf in (scale, bias))
            return (centred * lax.rsqrt(variance + self.epsilon) * scale + bias).astype(x.dtype)

        # As in RMSNorm: else the backward pass keeps x in float32.
        return jax.checkpoint(normalise, prevent_cse=False)(x, scale, bias)


class Dropout(nn.Module):
    """Zeroes entries at random, where the caller of `apply` passes a "dropout" key; otherwise there is none."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        if not self.rate or not self.has_rng("dropout"):
            return x
        return dropped(x, self.rate, self.make_rng("dropout"))


def dropped(x: Float[Array, "*B D"], rate: float, key: Array) -> Float[Array, "*B D"]:
    """x with a share `rate` of its entries zero and the others divided by 1 - rate.

    16 random bits decide on an entry (the rate is met to 2^-17), since drawing them takes longest: a fifth of a step of
    MiniLM on a CPU went into 32 bits for each.
    """
    width = x.shape[-1]
    pairs = jax.random.bits(key, (*x.shape[:-1], -(-width // 2)), jnp.uint32)
    drawn = lax.bitcast_convert_type(pairs, jnp.uint16).reshape(*x.shape[:-1], -1)[..., :width]
    drop = drawn < jnp.asarray(min(round(rate * 2**16), 2**16 - 1), jnp.uint16)
    return jnp.where(drop, jnp.zeros_like(x), x / jnp.asarray(1.0 - rate, x.dtype))


class Embedding(nn.Module):
    """Token embedding, parameter embedding (V, D); `attend` is the tied output layer."""

    vocabulary: int
    features: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        shape = (self.vocabulary, self.features)
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), shape, self.dtype)

    def __call__(self, ids: Array) -> Array:
        return jnp.take(self.embedding, ids, axis=0, mode="clip")

    def attend(self, x: Array) -> Array:
        return _product(x, self.embedding)


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


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
}
