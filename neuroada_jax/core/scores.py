"""Scores of connections: functions of a weight and, for some, of a statistic; the k largest of every neuron are trained.

A score takes the kernel (O, I) of one linear map in float32 (float64 for a float64 kernel) and, where its entry in `RULES`
needs one, a statistic. It returns finite scores (O, I), each neuron's from this neuron's weights and statistic alone, since
the neurons of a map may be on several devices. docs/connections.md has the table, with the paper of each.

Statistics are dicts of arrays with the axes *L of stacked layers in front. Their names say how they are split over devices:
"kernel" and "by_neuron" by their neurons, "for_all" not at all.

    Needs.GRADIENT  {"kernel": (O, I)}                               the gradient of the loss by the kernel
    Needs.INPUTS    {"for_all": (I,)}                                the norm of every input over tokens
    Needs.FACTORS   {"by_neuron": (O, r), "for_all": (r, I)}         of `factors`: a rank-r approximation of the kernel
    Needs.SEEDS     {"by_neuron": uint32 (O, 1)}                     of `seeds`: a seed for every neuron

`positions` is no rule: it selects columns that were drawn elsewhere.
"""

import enum
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt

from neuroada_jax.core.entries import wide_dtype

Score = Callable[..., jax.Array]
Statistic = Mapping[str, jax.Array]

_SMALLEST = 1e-8  # added to |W| where it divides: a weight of 0 has no ratio
_OVERSAMPLING = 10  # columns of the random projection beyond the rank
_PASSES = 2  # of the power iteration, which separates singular values that lie close


class Needs(enum.Enum):
    """What a score is computed from besides the weights."""

    NOTHING = "nothing"
    GRADIENT = "gradient"
    INPUTS = "inputs"
    FACTORS = "factors"
    SEEDS = "seeds"


class Rule(NamedTuple):
    """A score, and the statistic that it takes."""

    score: Score
    needs: Needs = Needs.NOTHING


def magnitude(kernel: Float[Array, "*L O I"]) -> Float[Array, "*L O I"]:
    """Return |W|, the score of the method, applied once to the pretrained weights."""
    return jnp.abs(kernel)


def reverse(kernel: Float[Array, "*L O I"]) -> Float[Array, "*L O I"]:
    """Return -|W|, which selects the smallest entries: the ablation against `magnitude`."""
    return -jnp.abs(kernel)


def gradient(kernel: Float[Array, "O I"], statistic: Statistic) -> Float[Array, "O I"]:
    """Return |G|, where G is the gradient of the loss by W."""
    return jnp.abs(statistic["kernel"]).astype(kernel.dtype)


def gradient_over_magnitude(kernel: Float[Array, "O I"], statistic: Statistic) -> Float[Array, "O I"]:
    """Return |G| / |W|: the largest gradients at the smallest weights, after GaLLoP (arXiv 2510.19778)."""
    return jnp.abs(statistic["kernel"]).astype(kernel.dtype) / (jnp.abs(kernel) + _SMALLEST)


def activation(kernel: Float[Array, "O I"], statistic: Statistic) -> Float[Array, "O I"]:
    """Return |W| times the norm of its input, the score by which Wanda prunes (arXiv 2306.11695)."""
    return jnp.abs(kernel) * statistic["for_all"].astype(kernel.dtype)[None, :]


def lowrank(kernel: Float[Array, "O I"], statistic: Statistic) -> Float[Array, "O I"]:
    """Return |W_r|, where W_r is a rank-r approximation of W, as in LIFT (arXiv 2506.00772)."""
    left, right = statistic["by_neuron"], statistic["for_all"]
    return jnp.abs(jnp.matmul(left, right, precision=lax.Precision.HIGHEST)).astype(kernel.dtype)


def random(kernel: Float[Array, "O I"], statistic: Statistic) -> Float[Array, "O I"]:
    """Return uniform random numbers, each neuron's from its own seed."""
    inputs = kernel.shape[1]
    draw = lambda seed: jax.random.uniform(jax.random.key(seed), (inputs,), kernel.dtype)  # noqa: E731
    return jax.vmap(draw)(statistic["by_neuron"][:, 0])


def positions(kernel: Float[Array, "O I"], statistic: Statistic) -> Float[Array, "O I"]:
    """Return 1 at the columns {"by_neuron": int32 (O, k)} of every neuron, those from I on for none; else 0."""
    neurons = jnp.arange(kernel.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros_like(kernel).at[neurons, statistic["by_neuron"]].set(1, mode="drop")


RULES: dict[str, Rule] = {
    "magnitude": Rule(magnitude),
    "reverse": Rule(reverse),
    "gradient": Rule(gradient, Needs.GRADIENT),
    "gradient_over_magnitude": Rule(gradient_over_magnitude, Needs.GRADIENT),
    "activation": Rule(activation, Needs.INPUTS),
    "lowrank": Rule(lowrank, Needs.FACTORS),
    "random": Rule(random, Needs.SEEDS),
}


def seeds(key: jax.Array, neurons: tuple[int, ...]) -> dict[str, UInt[Array, "*L O 1"]]:
    """Return the statistic of `random`: a seed for each of the neurons (*L, O)."""
    return {"by_neuron": jax.random.bits(key, (*neurons, 1), jnp.uint32)}


def factors(kernel: Float[Array, "*L O I"], rank: int, key: jax.Array) -> dict[str, Float[Array, "..."]]:
    """Return the statistic of `lowrank` by a randomised SVD, for one layer after another.

    A random projection with power iterations (Halko, Martinsson and Tropp, arXiv 0909.4061). It is exact where `rank` + 10
    reaches min(O, I). Temporaries are a few float32 copies of one layer's kernel.

    Args:
      kernel: of stacked layers or of one.
      rank: r, at most min(O, I).
      key: of the projection, the same for all layers.
    """
    *leading, outputs, inputs = kernel.shape
    width, wide = min(rank + _OVERSAMPLING, outputs, inputs), wide_dtype(kernel.dtype)
    product = lambda a, b: jnp.matmul(a, b, precision=lax.Precision.HIGHEST)  # noqa: E731
    projection = jax.random.normal(key, (inputs, width), wide)

    stack = kernel.reshape(-1, outputs, inputs)

    def of_layer(number: Array) -> tuple[Array, Array]:
        # With the barrier XLA cannot hoist the cast of all layers out of the loop.
        bound = lax.optimization_barrier((stack, number))[0]
        layer = lax.dynamic_index_in_dim(bound, number, keepdims=False).astype(wide)
        basis = jnp.linalg.qr(product(layer, projection))[0]
        for _ in range(_PASSES):
            basis = jnp.linalg.qr(product(layer, jnp.linalg.qr(product(layer.T, basis))[0]))[0]
        left, scale, right = jnp.linalg.svd(product(basis.T, layer), full_matrices=False)
        return product(basis, left[:, :rank] * scale[None, :rank]), right[:rank]

    left, right = lax.map(of_layer, jnp.arange(stack.shape[0], dtype=jnp.int32))
    return {"by_neuron": left.reshape(*leading, outputs, rank), "for_all": right.reshape(*leading, rank, inputs)}
