"""The decoder with a key/value cache as the loops see it: logits after a prompt, and logits after one more token.

Prompts are padded on the left, so that every row writes its next token to the same slot.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from neuroada_jax.bypass import Tree
from neuroada_jax.models.llama import Cache, empty_cache


class Decoder(NamedTuple):
    """A model with its parameters, on prompts of `width` slots that begin at slot `start` (R,) of each row."""

    module: nn.Module
    params: Tree
    start: Array
    width: int

    def prefill(self, ids: Int[Array, "R T"], slots: int) -> tuple[Float[Array, "R V"], Cache]:
        """Logits after the prompts, in float32 or wider, and a cache of `slots` slots that holds them."""
        query = jnp.arange(self.width, dtype=jnp.int32)
        mask = self.present(self.width)[:, None, :] & (query[None, None, :] <= query[None, :, None])
        positions = jnp.maximum(query[None, :] - self.start[:, None], 0)
        module: Any = self.module
        cache = empty_cache(module.config, ids.shape[0], self.width)
        hidden, cache = module.apply({"params": self.params}, ids, positions, mask, cache)
        more = [(0, 0), (0, 0), (0, 0), (0, slots - self.width), (0, 0)]
        return self._logits(hidden), cache._replace(keys=jnp.pad(cache.keys, more), values=jnp.pad(cache.values, more))

    def step(self, token: Int[Array, "R"], end: Int[Array, ""], cache: Cache) -> tuple[Float[Array, "R V"], Cache]:
        """Logits after one more token, which is written to the cache's slot `end` - 1."""
        mask = self.present(cache.keys.shape[3], end)[:, None, :]
        positions = (end - 1 - self.start)[:, None]
        module: Any = self.module
        hidden, cache = module.apply({"params": self.params}, token[:, None], positions, mask, cache)
        return self._logits(hidden), cache

    def present(self, slots: int, end: Int[Array, ""] | int | None = None) -> Bool[Array, "R S"]:
        """Which slots of each row, up to and without `end`, hold a token."""
        slot = jnp.arange(slots, dtype=jnp.int32)
        real = slot[None, :] >= self.start[:, None]
        return real if end is None else real & (slot < end)[None, :]

    def _logits(self, hidden: Array) -> Array:
        module: Any = self.module
        logits: Array = module.apply({"params": self.params}, hidden[:, -1, :], method="unembed")
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def is_end(token: Int[Array, "*R"], eos_ids: tuple[int, ...]) -> Bool[Array, "*R"]:
    """Whether a token ends its row."""
    ended = jnp.zeros(token.shape, bool)
    for stop in eos_ids:
        ended |= token == stop
    return ended


def repeat_rows(cache: Cache, times: int) -> Cache:
    """Every row of the cache `times` times in a row."""
    return cache._replace(keys=jnp.repeat(cache.keys, times, axis=1), values=jnp.repeat(cache.values, times, axis=1))


def reorder_rows(cache: Cache, rows: Int[Array, "R"], width: int) -> Cache:
    """The cache with row `rows[r]` in row r from slot `width` on; up to there those rows must be equal."""

    def reorder(kept: Array) -> Array:
        return kept.at[:, :, :, width:].set(jnp.take(kept[:, :, :, width:], rows, axis=1, mode="clip"))

    return cache._replace(keys=reorder(cache.keys), values=reorder(cache.values))
