"""Decoders in Flax Linen with stacked layers, composed of the parts that a `DecoderConfig` names.

One scan body serves every depth: a stacked leaf is (L, O, I), so compile time and dispatch do not grow with the number of
layers. Module names are those of the Hugging Face checkpoint without the layer number.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from neuroada_jax.models import attention, unrolled
from neuroada_jax.models.decoder_config import DecoderConfig, LayerKind, QkNorm
from neuroada_jax.models.experts import MixtureOfExperts
from neuroada_jax.models.layers import ACTIVATIONS, BypassDense, Embedding, RMSNorm, in_turn, scaled
from neuroada_jax.models.remat import (
    BYPASS_COLLECTIONS,
    Remat,
    kept_activation,
    outside_scan,
    remat_module,
    token_wise,
)
from neuroada_jax.models.rope import rotate, rotations


class Cache(NamedTuple):
    """Keys and values of past tokens, (L, B, K, S, N) or for one layer (B, K, S, N), and the next free slot, int32."""

    keys: Array
    values: Array
    slot: Array


def empty_cache(config: DecoderConfig, batch: int, slots: int) -> Cache:
    """Return an empty cache of `slots` positions for `batch` sequences, in the model's dtype."""
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype), jnp.zeros((), jnp.int32))


class Surroundings(NamedTuple):
    """What all layers of a kind share.

    Attributes:
      cos: cosines of the positions (B, T, N), None in layers without positions.
      sin: sines of the positions.
      mask: bool (B, 1, T, S), None for causal attention.
    """

    cos: Array | None
    sin: Array | None
    mask: Array | None


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: DecoderConfig
    window: int | None = None  # of causal attention without a mask

    @nn.compact
    def __call__(
        self, x: Array, around: Surroundings, cache: Cache | None, layer: Array | None
    ) -> tuple[Array, Cache | None]:
        c = self.config
        query, key, value = self._projected(x, cache is not None)
        if around.cos is not None and around.sin is not None:
            query, key = rotate(query, around.cos, around.sin), rotate(key, around.cos, around.sin)
        scaling = attention.Scaling(c.attention_scale, c.attention_cap)
        if cache is not None and around.mask is not None:  # a cache always comes with a mask
            cache, key, value = _write(cache, jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2), layer)
            y = attention.cached_attention(query, key, value, mask=around.mask, scaling=scaling)
        else:
            window = self.window if around.mask is None else None
            y = attention.attention(query, key, value, mask=around.mask, causal=True, window=window, scaling=scaling)
        y = kept_activation(y.reshape(*x.shape[:2], c.num_heads * c.head_dim))
        return BypassDense(c.hidden_size, c.output_bias, c.dtype, name="o_proj")(y), cache

    def _projected(self, x: Array, decoding: bool) -> list[Array]:
        """Return queries, keys and values (B, T, H or K, N), normalised where the model does that."""
        c, own = self.config, x
        heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
        if c.fused:
            together = BypassDense(sum(heads.values()) * c.head_dim, c.qkv_bias, c.dtype, name="qkv_proj")(x)
            ends = (c.num_heads * c.head_dim, (c.num_heads + c.num_kv_heads) * c.head_dim)
            each = dict(zip(heads, jnp.split(together, ends, axis=-1), strict=True))
        else:
            each = {}
            for name, count in heads.items():
                each[name] = BypassDense(count * c.head_dim, c.qkv_bias, c.dtype, name=f"{name}_proj")(own)
                if decoding:
                    own, each[name] = in_turn(own, each[name])
        found = []
        for name, count in heads.items():
            y = each[name]
            norm = None if c.qk_norm is None or name == "v" else _norm(c, f"{name}_norm")
            if norm is not None and c.qk_norm is QkNorm.WIDTH:
                y = norm(y)
            y = y.reshape(*x.shape[:2], count, c.head_dim)
            found.append(norm(y) if norm is not None and c.qk_norm is QkNorm.HEAD else y)
        return found


def _norm(config: DecoderConfig, name: str) -> RMSNorm:
    c = config
    return RMSNorm(c.norm_epsilon, c.dtype, c.norm_offset, c.wide_norm, name=name)


def _write(cache: Cache, key: Array, value: Array, layer: Array | None) -> tuple[Cache, Array, Array]:
    """Write (B, K, T, N) keys and values at the next slot of a layer; return the cache and the layer's keys and values.

    Under jit the write is in place: a stacked cache is the scan's carry, and the cache of a single layer (`layer` None) has
    no layer axis to index, which XLA would fuse into a copy of the complete cache.
    """
    zero = jnp.int32(0)
    if layer is None:
        keys = lax.dynamic_update_slice(cache.keys, key, (zero, zero, cache.slot, zero))
        values = lax.dynamic_update_slice(cache.values, value, (zero, zero, cache.slot, zero))
        return cache._replace(keys=keys, values=values), keys, values
    at = (layer, zero, zero, cache.slot, zero)
    keys = lax.dynamic_update_slice(cache.keys, key[None], at)
    values = lax.dynamic_update_slice(cache.values, value[None], at)
    own_keys, own_values = (lax.dynamic_index_in_dim(kept, layer, keepdims=False) for kept in (keys, values))
    return cache._replace(keys=keys, values=values), own_keys, own_values


class FeedForward(nn.Module):
    """Gated feed-forward block (SwiGLU)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array, decoding: bool = False) -> Array:
        c = self.config
        if c.fused:
            gate, up = jnp.split(self._map("gate_up_proj", 2 * c.intermediate_size)(x), 2, axis=-1)
        else:
            gate = self._map("gate_proj", c.intermediate_size)(x)
            if decoding:
                x, gate = in_turn(x, gate)
            up = self._map("up_proj", c.intermediate_size)(x)
        return self._map("down_proj", c.hidden_size)(ACTIVATIONS[c.activation](gate) * up)

    def _map(self, name: str, outputs: int) -> BypassDense:
        return BypassDense(outputs, self.config.mlp_bias, self.config.dtype, name=name)


class Layer(nn.Module):
    """One decoder layer, written as the body of a scan.

    The carry is (x, cache); scanned are the layer's index, None outside of a scan, and the number of its kind.

    Attributes:
      config: the decoder.
      remat: its policy.
      kind: of the layer; None in a scan over layers of several kinds, which are then scanned.
    """

    config: DecoderConfig
    remat: Remat = Remat.NONE
    kind: LayerKind | None = None

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Cache | None], scanned: tuple[Array | None, Array], kinds: Sequence[Surroundings]
    ) -> tuple[tuple[Array, Cache | None], None]:
        c = self.config
        x, cache = carry
        layer, number = scanned
        around = kinds[0] if self.kind is not None else _chosen(number, kinds)
        window = None if self.kind is None else self.kind.window
        before, behind, before_second, behind_second = c.norms.value

        def attend(x: Array) -> tuple[Array, Cache | None]:
            return SelfAttention(c, window, name="self_attn")(x, around, cache, layer)

        def optional(name: str | None, x: Array) -> Array:
            return x if name is None else _norm(c, name)(x)

        y, cache = attend(optional(before, x))
        x = x + scaled(optional(behind, y), c.residual_scale)

        def feed_forward(_: nn.Module, x: Array) -> Array:
            normed = optional(before_second, x)
            if c.experts is None:
                y = FeedForward(c, name="mlp")(normed, decoding=cache is not None)
            else:
                y = MixtureOfExperts(c.experts, c.activation, c.dtype, name=c.experts.block)(normed)
            return scaled(optional(behind_second, y), c.residual_scale)

        return (x + token_wise(feed_forward, self.remat, x.shape)(self, x), cache), None


def _chosen(number: Array, kinds: Sequence[Surroundings]) -> Surroundings:
    """Return what belongs to the kind of layer that is scanned; its arrays have the same shapes for all kinds."""

    def choose(each: Sequence[Any]) -> Any:
        return each[0] if all(one is each[0] for one in each) else lax.select_n(number, *each)

    return Surroundings(*(choose(each) for each in zip(*kinds, strict=True)))


class DecoderModel(nn.Module):
    """Embedding, layers and final norm."""

    config: DecoderConfig
    remat: Remat = Remat.NONE

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, c.dtype)
        scanned_layers = nn.scan(
            remat_module(Layer, self.remat),
            variable_axes={"params": 0, **dict.fromkeys(BYPASS_COLLECTIONS, 0)},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.num_layers,
        )
        self.layers = scanned_layers(c, self.remat, c.kinds[0] if len(self._kinds()) == 1 else None)
        self.norm = _norm(c, "norm")

    def __call__(self, ids: Array, positions: Array, mask: Array | None, cache: Cache | None) -> tuple[Array, Cache | None]:
        c, kinds = self.config, self._kinds()
        x, layers = self._embedded(ids), unrolled.variables_of_layers(self, "layers", c.num_layers)
        if layers is not None and cache is None:
            around = self._surroundings(positions, mask)
            return self.norm(self._each_layer(x, layers, [None] * c.num_layers, around)[0]), None
        if mask is None and len({kind.window for kind in kinds}) > 1:  # one scan body needs masks for that
            mask = jnp.broadcast_to(positions[:, :, None] >= positions[:, None, :], (*positions.shape, ids.shape[1]))
        numbers = jnp.asarray([kinds.index(kind) for kind in c.kinds], jnp.int32)
        scanned = (jnp.arange(c.num_layers, dtype=jnp.int32), numbers)
        (x, cache), _ = self.layers((x, cache), scanned, _alike(self._surroundings(positions, mask)))
        return self.norm(x), cache

    def one_by_one(
        self, ids: Array, positions: Array, mask: Array, caches: Sequence[Cache], params: Sequence[Any]
    ) -> tuple[Array, list[Cache]]:
        """Apply the model as `__call__` does, without the scan: each layer has its own arrays and its own cache."""
        layers = [{"params": own} for own in params]
        around = self._surroundings(positions, mask)
        x, filled = self._each_layer(self._embedded(ids), layers, caches, around)
        return self.norm(x), filled

    def _embedded(self, ids: Array) -> Array:
        return scaled(self.embed_tokens(ids), self.config.embedding_scale)

    def _kinds(self) -> list[LayerKind]:
        return list(dict.fromkeys(self.config.kinds))

    def _each_layer(
        self, x: Array, layers: Sequence[Any], caches: Sequence[Cache | None], around: Sequence[Surroundings]
    ) -> tuple[Array, list[Any]]:
        """Apply one layer after the other, each with its own variables and cache; return the filled caches, too."""
        c, kinds, filled = self.config, self._kinds(), []
        with outside_scan():
            layer = remat_module(Layer, self.remat)
            for variables, cache, kind in zip(layers, caches, c.kinds, strict=True):
                number = kinds.index(kind)
                scanned = (None, jnp.int32(number))
                own = layer(c, self.remat, kind, parent=None)
                (x, cache), _ = own.apply(variables, (x, cache), scanned, (around[number],))
                filled.append(cache)
        return x, filled

    def _surroundings(self, positions: Array, mask: Array | None) -> list[Surroundings]:
        """Return what the layers of each kind share, with masks for their windows where there is a mask."""
        c = self.config
        turns = [rotations(rope, c.head_dim, positions) for rope in c.ropes]
        masks = {window: None if mask is None else _windowed(mask, window) for window in c.windows}

        def of(kind: LayerKind) -> Surroundings:
            cos, sin = (None, None) if kind.rope is None else turns[kind.rope]
            return Surroundings(cos, sin, masks[kind.window])

        return [of(kind) for kind in self._kinds()]


def _alike(kinds: list[Surroundings]) -> list[Surroundings]:
    """Return the kinds with angles of 0 in the place of none, where other layers of the same scan have angles."""
    cos = next((kind.cos for kind in kinds if kind.cos is not None), None)
    if cos is None:
        return kinds
    still = {"cos": jnp.ones_like(cos), "sin": jnp.zeros_like(cos)}
    return [kind._replace(**still) if kind.cos is None else kind for kind in kinds]


def _windowed(mask: Array, window: int | None) -> Array:
    """Return the mask (B, T, S) as that of layers with this window, (B, 1, T, S).

    Slots hold consecutive positions, so distances are differences of slot numbers; the slot of query t is the last one
    that its mask admits.
    """
    full = mask[:, None, :, :]
    if window is None:
        return full
    slots = jnp.arange(mask.shape[2], dtype=jnp.int32)
    own = jnp.max(jnp.where(mask, slots[None, None, :], -1), axis=2)
    near = own[:, :, None] - slots[None, None, :] < window
    return full & near[:, None, :, :]


class DecoderForCausalLM(nn.Module):
    """Decoder with its output layer.

    `__call__` returns hidden states and `unembed` turns some of them into logits, so that a training step never forms
    logits of positions without a label.
    """

    config: DecoderConfig
    remat: Remat = Remat.NONE

    def setup(self) -> None:
        c = self.config
        self.model = DecoderModel(c, self.remat)
        if not c.tied:
            self.lm_head = BypassDense(c.vocab_size, False, c.dtype, vocabulary=True)

    def __call__(
        self,
        ids: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T S"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Compute the final hidden states.

        Args:
          ids: int32 tokens.
          positions: int32 rotary positions; None: 0, 1, 2 ..., or with a cache the slot numbers.
          mask: the slots that each query attends to, before any sliding window; without a cache S is T, and a query
            attends to slots up to its own only. None: all of these. Right padding needs no mask, since no real token
            attends to later ones.
          cache: keys and values of past tokens; S is its number of slots, and T are written from `cache.slot` on.

        Returns: hidden states in the model's dtype, and the cache with T more slots filled.
        """
        own = jnp.arange(ids.shape[1], dtype=jnp.int32) + (0 if cache is None else cache.slot)
        if positions is None:
            positions = jnp.broadcast_to(own[None], ids.shape)
        if mask is None and cache is not None:
            slots = jnp.arange(cache.keys.shape[3], dtype=jnp.int32)
            causal = slots[None, None, :] <= own[None, :, None]
            mask = jnp.broadcast_to(causal, (*ids.shape, slots.size))
        hidden, cache = self.model(ids, positions, mask, cache)
        if cache is not None:
            cache = cache._replace(slot=cache.slot + ids.shape[1])
        return hidden, cache

    def one_by_one(
        self, ids: Array, positions: Array, mask: Array, caches: Sequence[Cache], params: Sequence[Any]
    ) -> tuple[Array, list[Cache]]:
        """Apply the model as `__call__` does, without the scan, which would copy each layer's weights in every call.

        Args:
          ids: int32 tokens (B, T).
          positions: int32 (B, T).
          mask: bool (B, T, S), as in `__call__`.
          caches: the cache of each layer, (B, K, S, N).
          params: the parameters of each layer; everything outside the layers takes the module's own.
        """
        hidden, filled = self.model.one_by_one(ids, positions, mask, caches, params)
        return hidden, [cache._replace(slot=cache.slot + ids.shape[1]) for cache in filled]

    def unembed(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Return logits in the model's dtype."""
        c = self.config
        logits = self.model.embed_tokens.attend(hidden) if c.tied else self.lm_head(hidden)
        logits = scaled(logits, 1.0 / c.logit_divisor)
        return logits if c.logit_cap is None else attention.capped(logits, c.logit_cap)

    def initialise(self, ids: Array) -> Array:
        """Use every parameter; for `init` only."""
        return self.unembed(self(ids)[0])
