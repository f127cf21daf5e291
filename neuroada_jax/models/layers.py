"""Building blocks that the model files share: the linear map with its bypass, normalisation, dropout, embedding.

The collections that the caller passes to `apply` decide the form of a linear map, and nothing else does:

    params                                   a plain frozen linear map (base, merged or resident weights alike)
    params, bypass, columns                  W + D formed on the fly from the values in `bypass`
    params, resident, columns                params hold W + D already; `resident` has the values, for their gradient
    params, bypass or resident, columns      where these hold low-rank factors, their product is added; params hold W
    params                                   the same where params hold them beside W, as `low_rank.beside` puts them
    params, observed                         a plain one; the gradient of `observed` is the sum of squares of every input
"""

import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from neuroada_jax.core import low_rank, ops, platform, quantised
from neuroada_jax.core.entries import wide_dtype
from neuroada_jax.models import remat

_FEW_TOKENS = 16


class BypassDense(nn.Module):
    """Frozen linear map y = x W^T + b that carries a bypass where the caller passes one.

    Parameters: kernel (O, I) as in a Hugging Face checkpoint, bias (O,) if `use_bias`.
    """

    features: int
    use_bias: bool = False
    dtype: Any = jnp.float32
    vocabulary: bool = False  # whether it is an output layer, whose quantised kernel is dequantised in parts

    @nn.compact
    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        placement = remat.placement()
        x = x if placement is None else placement.inputs(x)
        shape = (self.features, x.shape[-1])
        kernel: Any = self.get_variable("params", "kernel")  # a quantised one has no array of the kernel's shape
        if not quantised.is_quantised(kernel):
            kernel = self.param("kernel", nn.initializers.normal(0.02), shape, self.dtype)
        form = next((name for name in ("bypass", "resident") if self.has_variable(name, "values")), None)
        if form is not None:
            columns: Array = self.get_variable("columns", "columns")
            # Without a placement, the op asks by itself. Shared columns need no choice.
            split = placement is not None and columns.shape[0] == self.features
            y = ops.bypass_dense(
                x,
                kernel,
                columns,
                self.get_variable(form, "values"),
                resident=form == "resident",
                algorithm=ops.choose_algorithm(columns.shape[1], x.shape[-1], split=True) if split else None,
            )
        elif self.has_variable("observed", "squares"):
            y = ops.observed_dense(x, kernel, self.get_variable("observed", "squares"))
        else:
            y = _frozen(x, kernel, in_parts=self.vocabulary)
        factors = factors_of(self)
        if factors is not None:
            y = y + low_rank.low_rank_dense(x, *factors)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.dtype)
            y = y + jnp.broadcast_to(bias, y.shape)
        return remat.kept_activation(y)


def factors_of(module: nn.Module) -> tuple[Array, Array, Array] | None:
    """Return the low-rank factors A and B of a bound linear map, and their scale; None where it has none."""
    form = next((name for name in ("bypass", "resident", "params") if module.has_variable(name, "lora_a")), None)
    if form is None:
        return None
    a, b = (cast(Array, module.get_variable(form, name)) for name in low_rank.LEAVES)
    return a, b, cast(Array, module.get_variable("params" if form == "params" else "columns", "scale"))


def _frozen(x: Array, kernel: Any, *, in_parts: bool) -> Array:
    """Return x W^T for a frozen kernel, quantised or not; `in_parts` dequantises a part of it at a time."""
    if not quantised.is_quantised(kernel):
        return _product(x, kernel)
    # Devices that split the neurons would exchange parts.
    return ops.vocabulary_dense(x, kernel) if in_parts and remat.placement() is None else ops.quantised_dense(x, kernel)


def _product(x: Any, kernel: Any) -> Array:
    """Return x W^T of (*B, I) and (O, I).

    On a CPU, x of few tokens is the right operand: XLA takes a fifth less time for W x^T than for x W^T.
    """
    if platform.name() == "cpu" and 1 < math.prod(x.shape[:-1]) <= _FEW_TOKENS:
        y = lax.dot_general(kernel, x.reshape(-1, x.shape[-1]), (((1,), (1,)), ((), ())))
        # Without the barrier XLA turns this into x W^T again.
        return lax.optimization_barrier(y).T.reshape(*x.shape[:-1], kernel.shape[0])
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (1,)), ((), ())))


def in_turn(x: Array, y: Array) -> tuple[Array, Array]:
    """Return x and y = x W^T such that XLA does not merge a further product of x with that of y.

    On a GPU XLA merges small products which share an operand: for q, k and v of a decoding step it would first write their
    three kernels into one, in every step.
    """
    return lax.optimization_barrier((x, y)) if platform.name() == "gpu" else (x, y)


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last axis, in float32; parameter scale (D,).

    Attributes:
      epsilon: added to the mean square.
      dtype: of the scale.
      offset: added to the scale.
      wide: multiply by the scale before the result is rounded to the dtype of x, not afterwards.
    """

    epsilon: float
    dtype: Any = jnp.float32
    offset: float = 0.0
    wide: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.initializers.constant(1.0 - self.offset), (x.shape[-1],), self.dtype)

        def normalise(x: Array, scale: Array) -> Array:
            wide = x.astype(wide_dtype(x.dtype))
            variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
            normed = wide * lax.rsqrt(variance + self.epsilon)
            if self.wide:
                scale = scale.astype(normed.dtype) + self.offset
                return (normed * jnp.broadcast_to(scale, normed.shape)).astype(x.dtype)
            normed = normed.astype(x.dtype)
            return normed * jnp.broadcast_to(scale, normed.shape)

        # Without this checkpoint the backward pass keeps x in float32, and the normalised x a second time.
        return jax.checkpoint(normalise, prevent_cse=remat.prevent_cse())(x, scale)


def scaled(x: Float[Array, "*B D"], factor: float) -> Float[Array, "*B D"]:
    """Return factor * x, multiplied in float32 and rounded once."""
    return x if factor == 1.0 else (x.astype(wide_dtype(x.dtype)) * factor).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, in float32; parameters scale (D,) and, if `use_bias`, bias (D,)."""

    epsilon: float
    dtype: Any = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        parameters = [self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)]
        if self.use_bias:
            parameters.append(self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.dtype))

        def normalise(x: Array, *parameters: Array) -> Array:
            wide = x.astype(wide_dtype(x.dtype))
            centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
            variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
            scale, *bias = (jnp.broadcast_to(leaf.astype(wide.dtype), wide.shape) for leaf in parameters)
            return sum(bias, centred * lax.rsqrt(variance + self.epsilon) * scale).astype(x.dtype)

        # As in RMSNorm: without this checkpoint the backward pass keeps x in float32.
        return jax.checkpoint(normalise, prevent_cse=remat.prevent_cse())(x, *parameters)


class Dropout(nn.Module):
    """Dropout where the caller of `apply` passes a "dropout" key, else the identity."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        if not self.rate or not self.has_rng("dropout"):
            return x
        return dropout(x, self.rate, self.make_rng("dropout"))


def dropout(x: Float[Array, "*B D"], rate: float, key: Array) -> Float[Array, "*B D"]:
    """Return x with a fraction `rate` of its entries set to zero and the others divided by 1 - rate.

    Each entry takes 16 random bits, which meets the rate to 2^-17. Generating the bits dominates the cost: with 32 bits for
    each entry it took a fifth of a training step of MiniLM on a CPU.
    """
    width = x.shape[-1]
    pairs = jax.random.bits(key, (*x.shape[:-1], -(-width // 2)), jnp.uint32)
    numbers = lax.bitcast_convert_type(pairs, jnp.uint16).reshape(*x.shape[:-1], -1)[..., :width]
    drop = numbers < jnp.asarray(min(round(rate * 2**16), 2**16 - 1), jnp.uint16)
    return jnp.where(drop, jnp.zeros_like(x), x / jnp.asarray(1.0 - rate, x.dtype))


class Embedding(nn.Module):
    """Embedding of ids, with parameter embedding (V, D); `attend` is the tied output layer of a decoder."""

    vocabulary: int
    features: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        own: Any = self.get_variable("params", "embedding")  # a quantised one has no array of this shape
        if not quantised.is_quantised(own):
            own = self.param("embedding", nn.initializers.normal(0.02), (self.vocabulary, self.features), self.dtype)
        self.embedding = own

    def __call__(self, ids: Array) -> Array:
        if quantised.is_quantised(self.embedding):
            return quantised.read_rows(self.embedding, ids)
        return jnp.take(self.embedding, ids, axis=0, mode="clip")

    def attend(self, x: Array) -> Array:
        return _frozen(x, self.embedding, in_parts=True)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "tanh": jnp.tanh,
}
