"""The feed-forward block of a mixture of experts: a router chooses the experts of every token, whose outputs are summed."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from neuroada_jax.core import experts, quantised
from neuroada_jax.core.entries import wide_dtype
from neuroada_jax.models import remat
from neuroada_jax.models.layers import ACTIVATIONS, BypassDense, factors_of


@dataclasses.dataclass(frozen=True)
class Experts:
    """Description of a mixture of experts.

    Attributes:
      count: of experts, E.
      chosen: experts of a token.
      width: F of an expert.
      normalised: whether the weights of a token's experts sum to 1.
      block: the name of the feed-forward block in checkpoints.
      maps: the names of an expert's gate, up and down maps in checkpoints.
    """

    count: int
    chosen: int
    width: int
    normalised: bool
    block: str = "mlp"
    maps: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


class ExpertMap(nn.Module):
    """One linear map of every expert, on rows in blocks; parameter kernel (E, O, I), with forms as in `BypassDense`."""

    count: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N b I"], of_blocks: Array) -> Float[Array, "N b O"]:
        placement = remat.placement()
        x = x if placement is None else placement.inputs(x)
        shape = (self.count, self.features, x.shape[-1])
        kernel: Any = self.get_variable("params", "kernel")  # a quantised one has no array of the kernel's shape
        if not quantised.is_quantised(kernel):
            kernel = self.param("kernel", nn.initializers.normal(0.02), shape, self.dtype)
        form = next((name for name in ("bypass", "resident") if self.has_variable(name, "values")), None)
        if form is not None:
            columns: Array = self.get_variable("columns", "columns")
            values: Array = self.get_variable(form, "values")
            y = experts.bypass_experts(x, kernel, of_blocks, columns, values, resident=form == "resident")
        elif self.has_variable("observed", "squares"):
            y = experts.observed(x, kernel, of_blocks, cast(Array, self.get_variable("observed", "squares")))
        else:
            y = experts.plain(x, kernel, of_blocks)
        factors = factors_of(self)
        if factors is not None:
            y = y + experts.low_rank_experts(x, of_blocks, *factors)
        return remat.kept_activation(y)


class ExpertMaps(nn.Module):
    """The experts: a gated feed-forward block each."""

    config: Experts
    features: int
    activation: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "R D"], chosen: Array) -> Float[Array, "R D"]:
        c = self.config
        gate_name, up_name, down_name = c.maps
        held: Any = [self.get_variable("params", name) for name in c.maps]
        blocks = experts.blocks_of(chosen, c.count, dequantised=quantised.holds(held))
        rows = experts.into_blocks(x, blocks)
        gate = ExpertMap(c.count, c.width, self.dtype, name=gate_name)(rows, blocks.experts)
        up = ExpertMap(c.count, c.width, self.dtype, name=up_name)(rows, blocks.experts)
        hidden = ACTIVATIONS[self.activation](gate) * up
        y = ExpertMap(c.count, self.features, self.dtype, name=down_name)(hidden, blocks.experts)
        return experts.out_of_blocks(y, blocks)


class MixtureOfExperts(nn.Module):
    """The router, and the weighted sum of the outputs of the experts that it chooses for every token."""

    config: Experts
    activation: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        c, width = self.config, x.shape[-1]
        tokens = x.reshape(-1, width)
        logits = BypassDense(c.count, False, self.dtype, name="gate")(tokens)
        wide = wide_dtype(logits.dtype)
        weights, chosen = lax.top_k(jax.nn.softmax(logits.astype(wide), axis=-1), c.chosen)
        if c.normalised:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        rows = jnp.repeat(tokens, c.chosen, axis=0)
        own = ExpertMaps(c, width, self.activation, self.dtype, name="experts")(rows, chosen.reshape(-1).astype(jnp.int32))
        outputs = own.reshape(-1, c.chosen, width).astype(wide) * weights[:, :, None]
        return jnp.sum(outputs, axis=1).astype(x.dtype).reshape(x.shape)
