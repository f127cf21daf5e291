"""The decoder with a key/value cache as the loops see it: logits after a prompt, and logits after one more token.

Prompts are padded on the left, so that every row writes its next token to the same slot.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from neuroada_jax.core import platform
from neuroada_jax.core.trees import Tree
from neuroada_jax.models.llama import Cache, empty_cache

# Of all layers together, or one (B, K, S, N) for each.
Caches = tuple[Cache, ...]


def one_by_one() -> bool:
    """Whether a step goes through layers that lie apart, rather than scanning stacked ones.

    On a CPU a scan copies every layer's weights out of the stack before it multiplies by them, in every step: the matrix
    products of SmolLM2-135M took 115 ms that way and 61 ms without. The price is one copy of the layers' weights while
    decoding, and a program that grows with the depth. A GPU's products read from the stack.
    """
    return platform.platform() == "cpu"


class Decoder(NamedTuple):
    """A model with its parameters, for rows whose prompts begin at slot `start` (R,)."""

    module: nn.Module
    params: Tree
    start: Array
    layers: tuple[Tree, ...] | None  # the parameters of each layer, for `step` one by one

    @classmethod
    def make(cls, module: nn.Module, params: Tree, start: Int[Array, "R"]) -> "Decoder":
        """Call it outside of the loop: here the layers are copied out of the stack."""
        if not one_by_one():
            return cls(module, params, start, None)
        stacked = params["model"]["layers"]
        number: int = module.config.num_layers
        layers = tuple(jax.tree.map(lambda leaf, at=at: leaf[at], stacked) for at in range(number))
        return cls(module, params, start, layers)

    def step(self, token: Int[Array, "R"], end: Int[Array, ""], caches: Caches) -> tuple[Float[Array, "R V"], Caches]:
        """Logits after one more token, which is written to the caches' slot `end` - 1."""
        mask = present(self.start, caches[0].keys.shape[-2], end)[:, None, :]
        positions = (end - 1 - self.start)[:, None]
        caches = tuple(cache._replace(slot=end - 1) for cache in caches)
        module: Any = self.module
        if self.layers is None:
            hidden, cache = module.apply({"params": self.params}, token[:, None], positions, mask, caches[0])
            return last_logits(module, self.params, hidden), (cache,)
        arguments = (token[:, None], positions, mask, caches, self.layers)
        hidden, filled = module.apply({"params": self.params}, *arguments, method="one_by_one")
        return last_logits(module, self.params, hidden), tuple(filled)


def prefill(
    module: nn.Module, params: Tree, ids: Int[Array, "R T"], lengths: Int[Array, "R"], slots: int
) -> tuple[Float[Array, "R V"], Caches]:
    """Reads left-padded prompts.

    Returns: the logits after them, in float32 or wider, and caches of `slots` slots that hold them.
    """
    rows, width = ids.shape
    query = jnp.arange(width, dtype=jnp.int32)
    start = width - lengths
    mask = present(start, width, jnp.int32(width))[:, None, :] & (query[None, None, :] <= query[None, :, None])
    positions = jnp.maximum(query[None, :] - start[:, None], 0)
    applied: Any = module
    cache = empty_cache(applied.config, rows, width)
    hidden, cache = applied.apply({"params": params}, ids, positions, mask, cache)
    more = [(0, 0), (0, 0), (0, 0), (0, slots - width), (0, 0)]
    cache = cache._replace(keys=jnp.pad(cache.keys, more), values=jnp.pad(cache.values, more))
    caches: Caches = (cache,)
    if one_by_one():
        layers = range(applied.config.num_layers)
        caches = tuple(cache._replace(keys=cache.keys[at], values=cache.values[at]) for at in layers)
    return last_logits(module, params, hidden), caches


def last_logits(module: nn.Module, params: Tree, hidden: Float[Array, "R T D"]) -> Float[Array, "R V"]:
    """The logits after the last of T tokens, in float32 or wider."""
    applied: Any = module
    logits: Array = applied.apply({"params": params}, hidden[:, -1, :], method="unembed")
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def present(start: Int[Array, "R"], slots: int, end: Int[Array, ""]) -> Bool[Array, "R S"]:
    """Which slots of each row hold a token: those from `start` up to and without `end`."""
    slot = jnp.arange(slots, dtype=jnp.int32)
    return (slot[None, :] >= start[:, None]) & (slot < end)[None, :]


def is_end(token: Int[Array, "*R"], eos_ids: tuple[int, ...]) -> Bool[Array, "*R"]:
    """Whether a token ends its row."""
    ended = jnp.zeros(token.shape, bool)
    for stop in eos_ids:
        ended |= token == stop
    return ended


def repeat_rows(caches: Caches, times: int) -> Caches:
    """Every row of the caches `times` times in a row."""
    repeat = lambda kept: jnp.repeat(kept, times, axis=-4)  # noqa: E731
    return tuple(cache._replace(keys=repeat(cache.keys), values=repeat(cache.values)) for cache in caches)


def reorder_rows(caches: Caches, rows: Int[Array, "R"], width: int) -> Caches:
    """The caches with row `rows[r]` in row r from slot `width` on; up to there those rows must be equal."""

    def reorder(kept: Array) -> Array:
        return kept.at[..., width:, :].set(jnp.take(kept[..., width:, :], rows, axis=-4, mode="clip"))

    return tuple(cache._replace(keys=reorder(cache.keys), values=reorder(cache.values)) for cache in caches)
