"""Decoding with a key/value cache: the logits after a prompt, and the logits after one more token.

Prompts are padded on the left, so that every sequence writes its next token to the same slot.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from neuroada_jax.core import platform
from neuroada_jax.core.trees import Tree
from neuroada_jax.models import unrolled
from neuroada_jax.models.decoder import Cache, empty_cache

# One cache of all layers (L, B, K, S, N), or one (B, K, S, N) for each layer.
Caches = tuple[Cache, ...]


def one_by_one(depth: int) -> bool:
    """Return whether a decoding step goes through the layers one by one instead of scanning the stacked parameters.

    A scan copies every layer's weights out of the stacked parameters before it multiplies by them, in every step. On a CPU
    the matrix products of SmolLM2-135M took 115 ms that way and 61 ms with unstacked layers; the price is a second copy of
    the layers' weights while decoding, and a program that grows with the depth. On a GPU nothing is copied where the layers
    lie apart (`models.unrolled`), and the slices of stacked ones are part of XLA's own products.
    """
    return platform.name() == "cpu" or unrolled.preferred(depth)


class Decoder(NamedTuple):
    """A model with its parameters, for R sequences whose prompts begin at the slots `start` (R,)."""

    module: nn.Module
    params: Tree
    start: Array
    layers: tuple[Tree, ...] | None  # on a CPU, a copy of the parameters by layer

    @classmethod
    def make(cls, module: nn.Module, params: Tree, start: Int[Array, "R"]) -> "Decoder":
        """Return a decoder; call it outside of the decoding loop: on a CPU it copies the layers out of stacked leaves."""
        depth: int = module.config.num_layers
        layers = _layers(params, depth) if platform.name() == "cpu" and one_by_one(depth) else None
        return cls(module, params, start, layers)

    def step(self, token: Int[Array, "R"], end: Int[Array, ""], caches: Caches) -> tuple[Float[Array, "R V"], Caches]:
        """Return the logits after one more token, whose key and value are written to slot `end` - 1 of the caches."""
        mask = present(self.start, caches[0].keys.shape[-2], end)[:, None, :]
        positions = (end - 1 - self.start)[:, None]
        caches = tuple(cache._replace(slot=end - 1) for cache in caches)
        module: Any = self.module
        depth: int = module.config.num_layers
        if not one_by_one(depth):
            hidden, cache = module.apply({"params": self.params}, token[:, None], positions, mask, caches[0])
            return last_logits(module, self.params, hidden), (cache,)
        # On a GPU stacked layers are sliced here: outside of the decoding loop the slices would be a copy of all weights.
        layers = self.layers or _layers(self.params, depth)
        arguments = (token[:, None], positions, mask, caches, layers)
        hidden, filled = module.apply({"params": self.params}, *arguments, method="one_by_one")
        return last_logits(module, self.params, hidden), tuple(filled)


def prefill(
    module: nn.Module, params: Tree, ids: Int[Array, "R T"], lengths: Int[Array, "R"], slots: int
) -> tuple[Float[Array, "R V"], Caches]:
    """Process left-padded prompts.

    Args:
      module: the decoder.
      params: its parameters.
      ids: int32 prompts, padded on the left.
      lengths: tokens of each prompt; 0 for a sequence that only pads the batch.
      slots: slots of the caches, at least T.

    Returns: the logits after the prompts, in float32 or wider, and caches that hold their keys and values.
    """
    sequences, width = ids.shape
    query = jnp.arange(width, dtype=jnp.int32)
    start = width - lengths
    mask = present(start, width, jnp.int32(width))[:, None, :] & (query[None, None, :] <= query[None, :, None])
    positions = jnp.maximum(query[None, :] - start[:, None], 0)
    applied: Any = module
    depth: int = applied.config.num_layers
    stacked = empty_cache(applied.config, sequences, width)
    caches = tuple(stacked._replace(keys=stacked.keys[at], values=stacked.values[at]) for at in range(depth))
    if one_by_one(depth) and (platform.name() == "gpu" or unrolled.is_apart(params)):
        arguments = (ids, positions, mask, caches, _layers(params, depth))
        hidden, filled = applied.apply({"params": params}, *arguments, method="one_by_one")
        caches = tuple(filled)
    else:
        hidden, cache = applied.apply({"params": params}, ids, positions, mask, stacked)
        caches = (cache,)
        if one_by_one(depth):
            caches = tuple(cache._replace(keys=cache.keys[at], values=cache.values[at]) for at in range(depth))

    def widened(kept: Array) -> Array:
        return jnp.pad(kept, [(0, 0)] * (kept.ndim - 2) + [(0, slots - width), (0, 0)])

    caches = tuple(cache._replace(keys=widened(cache.keys), values=widened(cache.values)) for cache in caches)
    return last_logits(module, params, hidden), caches


def _layers(params: Tree, depth: int) -> tuple[Tree, ...]:
    return tuple(unrolled.layers_of(params["model"]["layers"], depth))


def last_logits(module: nn.Module, params: Tree, hidden: Float[Array, "R T D"]) -> Float[Array, "R V"]:
    """Return the logits after the last of T tokens, in float32 or wider."""
    applied: Any = module
    logits: Array = applied.apply({"params": params}, hidden[:, -1, :], method="unembed")
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def present(start: Int[Array, "R"], slots: int, end: Int[Array, ""]) -> Bool[Array, "R S"]:
    """Return which slots of each sequence hold a token: those from `start` up to, but not including, `end`."""
    slot = jnp.arange(slots, dtype=jnp.int32)
    return (slot[None, :] >= start[:, None]) & (slot < end)[None, :]


def is_end(token: Int[Array, "*R"], eos_ids: tuple[int, ...]) -> Bool[Array, "*R"]:
    """Return whether a token ends its sequence."""
    ended = jnp.zeros(token.shape, bool)
    for stop in eos_ids:
        ended |= token == stop
    return ended


def repeat_sequences(caches: Caches, times: int) -> Caches:
    """Return the caches with every sequence repeated `times` times."""
    repeat = lambda kept: jnp.repeat(kept, times, axis=-4)  # noqa: E731
    return tuple(cache._replace(keys=repeat(cache.keys), values=repeat(cache.values)) for cache in caches)


def reorder_sequences(caches: Caches, sources: Int[Array, "R"], width: int) -> Caches:
    """Return the caches with sequence `sources[r]` as sequence r; only slots from `width` on are copied.

    Before `width` the two sequences must be equal, as beams of the same prompt are.
    """

    def reorder(kept: Array) -> Array:
        return kept.at[..., width:, :].set(jnp.take(kept[..., width:, :], sources, axis=-4, mode="clip"))

    return tuple(cache._replace(keys=reorder(cache.keys), values=reorder(cache.values)) for cache in caches)
