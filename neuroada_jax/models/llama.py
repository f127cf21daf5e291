"""The LLaMA family in Flax Linen with stacked layers: LLaMA 1 to 3.x, SmolLM2, Mistral, Qwen2, Qwen3.

One scan body serves every depth: a stacked leaf is (L, O, I), so compile time and dispatch do not grow with the number of
layers. Module names are those of the Hugging Face checkpoint without the layer number.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from neuroada_jax.errors import UserError
from neuroada_jax.models import attention, unrolled
from neuroada_jax.models.config_fields import LARGEST_DEPTH, LARGEST_POSITION, Fields
from neuroada_jax.models.layers import ACTIVATIONS, BypassDense, Embedding, RMSNorm, in_turn
from neuroada_jax.models.remat import (
    BYPASS_COLLECTIONS,
    Remat,
    kept_activation,
    outside_scan,
    remat_module,
    token_wise,
)
from neuroada_jax.models.rope import Rope, rotate, rotations

# Every linear map of a layer, as in the published scripts.
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Static description of a decoder; the comments give the letters of docs/design.md."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # N
    rope: Rope
    norm_epsilon: float = 1e-6
    activation: str = "silu"
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()  # sliding window of each layer, None where attention is full
    max_positions: int = 2048
    dtype: Any = jnp.float32

    @classmethod
    def from_hf(cls, fields: Fields, dtype: Any = jnp.float32) -> "LlamaConfig":
        """Read the config.json of a model_type llama, mistral, qwen2 or qwen3.

        Raises:
          UserError: a field is missing or has a value that is not supported.
        """
        kind, defaults = fields.kind, _DEFAULTS[fields.kind]
        hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        integer = fields.integer if kind == "mistral" else fields.integer_or_none  # null is no value of Mistral's
        kv_heads = integer("num_key_value_heads", defaults.kv_heads) or heads
        if heads % kv_heads:
            raise UserError(f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
        if kind == "llama" and hidden % heads:
            raise UserError(f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
        integer = fields.integer_or_none if kind in ("llama", "mistral") else fields.integer
        head_dim = integer("head_dim", defaults.head_dim or hidden // heads) or hidden // heads
        if not head_dim:
            raise UserError(f"config.json: hidden_size {hidden} is less than num_attention_heads {heads}")
        if head_dim % 2:
            raise UserError(f"config.json: head_dim must be even, found {head_dim}")
        layers, max_positions = (
            fields.integer("num_hidden_layers", most=LARGEST_DEPTH),
            fields.integer("max_position_embeddings", defaults.max_positions, most=LARGEST_POSITION),
        )
        # transformers' Mistral and Qwen2 ignore `attention_bias`, and all but LLaMA `mlp_bias`.
        biased = kind in ("llama", "qwen3") and fields.flag("attention_bias", False)
        return cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rope=Rope.from_hf(fields, head_dim, max_positions),
            norm_epsilon=fields.number("rms_norm_eps", 1e-6),
            activation=fields.choice("hidden_act", "silu", list(ACTIVATIONS)),
            tied=fields.flag("tie_word_embeddings", False),
            qkv_bias=biased or kind == "qwen2",
            output_bias=biased,
            mlp_bias=kind == "llama" and fields.flag("mlp_bias", False),
            qk_norm=kind == "qwen3",
            windows=_windows(fields, layers),
            max_positions=max_positions,
            dtype=dtype,
        )


class _Defaults(NamedTuple):
    """transformers' values of fields that a config.json leaves out, where they depend on the model_type."""

    max_positions: int
    kv_heads: int | None = None  # as many as heads
    head_dim: int | None = None  # D / H
    window: int | None = 4096


_DEFAULTS = {
    "llama": _Defaults(2048, window=None),
    "mistral": _Defaults(131072, 8),
    "qwen2": _Defaults(32768, 32),
    "qwen3": _Defaults(32768, 32, 128),
}


def _windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Return the sliding window of each layer, None where attention is full."""
    kind, windowed = fields.kind, fields.windowed_layers(num_layers)
    window = fields.integer_or_none("sliding_window", _DEFAULTS[kind].window, most=LARGEST_POSITION)
    if kind == "llama" and window is not None:
        raise UserError(f"config.json: sliding_window {window} is not supported for model_type 'llama'; supported: null")
    if kind in ("qwen2", "qwen3"):
        first = fields.integer("max_window_layers", 28, least=0)
        window = window if fields.flag("use_sliding_window", False) else None
        if windowed is None:  # as configs had it before `layer_types`: the first layer with a window
            windowed = [window is not None and layer >= first for layer in range(num_layers)]
    if windowed is None:
        windowed = [window is not None] * num_layers  # Mistral; with `layer_types` it is transformers' Ministral
    if window is None and any(windowed):
        raise UserError("config.json: layer_types names 'sliding_attention', but no sliding_window is in use")
    return tuple(window if is_windowed else None for is_windowed in windowed)


class Cache(NamedTuple):
    """Keys and values of past tokens, (L, B, K, S, N) or for one layer (B, K, S, N), and the next free slot, int32."""

    keys: Array
    values: Array
    slot: Array


def empty_cache(config: LlamaConfig, batch: int, slots: int) -> Cache:
    """Return an empty cache of `slots` positions for `batch` sequences, in the model's dtype."""
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype), jnp.zeros((), jnp.int32))


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self, x: Array, cos: Array, sin: Array, mask: Array | None, cache: Cache | None, layer: Array | None
    ) -> tuple[Array, Cache | None]:
        c = self.config

        projected = []
        for name, heads in (("q_proj", c.num_heads), ("k_proj", c.num_kv_heads), ("v_proj", c.num_kv_heads)):
            y = BypassDense(heads * c.head_dim, c.qkv_bias, c.dtype, name=name)(x)
            if cache is not None:
                x, y = in_turn(x, y)
            projected.append(y.reshape(*x.shape[:2], heads, c.head_dim))
        query, key, value = projected
        if c.qk_norm:
            query = RMSNorm(c.norm_epsilon, c.dtype, name="q_norm")(query)
            key = RMSNorm(c.norm_epsilon, c.dtype, name="k_norm")(key)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if cache is not None and mask is not None:  # a cache always comes with a mask
            cache, key, value = _write(cache, jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2), layer)
            y = attention.cached_attention(query, key, value, mask=mask)
        else:
            window = c.windows[0] if mask is None else None  # without a mask all layers have the same window
            y = attention.attention(query, key, value, mask=mask, causal=True, window=window)
        y = kept_activation(y.reshape(*x.shape[:2], c.num_heads * c.head_dim))
        return BypassDense(c.hidden_size, c.output_bias, c.dtype, name="o_proj")(y), cache


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

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Array, decoding: bool = False) -> Array:
        c = self.config
        gate = BypassDense(c.intermediate_size, c.mlp_bias, c.dtype, name="gate_proj")(x)
        if decoding:
            x, gate = in_turn(x, gate)
        up = BypassDense(c.intermediate_size, c.mlp_bias, c.dtype, name="up_proj")(x)
        return BypassDense(c.hidden_size, c.mlp_bias, c.dtype, name="down_proj")(ACTIVATIONS[c.activation](gate) * up)


class Layer(nn.Module):
    """One decoder layer, written as the body of a scan.

    The carry is (x, cache); scanned are the layer's index, None outside of a scan, and whether its attention has a window.
    """

    config: LlamaConfig
    remat: Remat = Remat.NONE

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Cache | None],
        scanned: tuple[Array | None, Array],
        cos: Array,
        sin: Array,
        masks: tuple[Array, Array] | None,
    ) -> tuple[tuple[Array, Cache | None], None]:
        c = self.config
        x, cache = carry
        layer, windowed = scanned
        mask = None if masks is None else jnp.where(windowed, masks[1], masks[0])
        normed = RMSNorm(c.norm_epsilon, c.dtype, name="input_layernorm")(x)
        y, cache = SelfAttention(c, name="self_attn")(normed, cos, sin, mask, cache, layer)
        x = x + y

        def feed_forward(_: nn.Module, x: Array) -> Array:
            normed = RMSNorm(c.norm_epsilon, c.dtype, name="post_attention_layernorm")(x)
            return FeedForward(c, name="mlp")(normed, decoding=cache is not None)

        return (x + token_wise(feed_forward, self.remat, x.shape)(self, x), cache), None


class LlamaModel(nn.Module):
    """Embedding, layers and final norm."""

    config: LlamaConfig
    remat: Remat = Remat.NONE

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, c.dtype)
        scanned_layers = nn.scan(
            remat_module(Layer, self.remat),
            variable_axes={"params": 0, **dict.fromkeys(BYPASS_COLLECTIONS, 0)},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
        )
        self.layers = scanned_layers(c, self.remat)
        self.norm = RMSNorm(c.norm_epsilon, c.dtype)

    def __call__(self, ids: Array, positions: Array, mask: Array | None, cache: Cache | None) -> tuple[Array, Cache | None]:
        c = self.config
        cos, sin = rotations(c.rope, c.head_dim, positions)
        if (
            mask is None and len(set(c.windows)) > 1
        ):  # windows differ between layers, and one scan body needs masks for that
            mask = jnp.broadcast_to(positions[:, :, None] >= positions[:, None, :], (*positions.shape, ids.shape[1]))
        masks = None if mask is None else self._masks(mask)
        x, layers = self.embed_tokens(ids), unrolled.variables_of_layers(self, "layers", c.num_layers)
        if layers is not None and cache is None:
            return self.norm(self._each_layer(x, layers, [None] * c.num_layers, cos, sin, masks)[0]), None
        scanned = (jnp.arange(c.num_layers, dtype=jnp.int32), jnp.asarray([w is not None for w in c.windows]))
        (x, cache), _ = self.layers((x, cache), scanned, cos, sin, masks)
        return self.norm(x), cache

    def one_by_one(
        self, ids: Array, positions: Array, mask: Array, caches: Sequence[Cache], params: Sequence[Any]
    ) -> tuple[Array, list[Cache]]:
        """Apply the model as `__call__` does, without the scan: each layer has its own arrays and its own cache."""
        cos, sin = rotations(self.config.rope, self.config.head_dim, positions)
        layers = [{"params": own} for own in params]
        x, filled = self._each_layer(self.embed_tokens(ids), layers, caches, cos, sin, self._masks(mask))
        return self.norm(x), filled

    def _each_layer(
        self,
        x: Array,
        layers: Sequence[Any],
        caches: Sequence[Cache | None],
        cos: Array,
        sin: Array,
        masks: tuple[Array, Array] | None,
    ) -> tuple[Array, list[Any]]:
        """Apply one layer after the other, each with its own variables and cache; return the filled caches, too."""
        c, filled = self.config, []
        with outside_scan():
            layer = remat_module(Layer, self.remat)(c, self.remat, parent=None)
            for variables, cache, window in zip(layers, caches, c.windows, strict=True):
                scanned = (None, jnp.asarray(window is not None))
                (x, cache), _ = layer.apply(variables, (x, cache), scanned, cos, sin, masks)
                filled.append(cache)
        return x, filled

    def _masks(self, mask: Array) -> tuple[Array, Array]:
        """Return the mask (B, T, S) as that of full layers and that of windowed layers, each (B, 1, T, S).

        Slots hold consecutive positions, so distances are differences of slot numbers; the slot of query t is the last one
        that its mask admits.
        """
        window = next((w for w in self.config.windows if w is not None), None)
        full = mask[:, None, :, :]
        if window is None:
            return full, full
        slots = jnp.arange(mask.shape[2], dtype=jnp.int32)
        own = jnp.max(jnp.where(mask, slots[None, None, :], -1), axis=2)
        near = own[:, :, None] - slots[None, None, :] < window
        return full, full & near[:, None, :, :]


class LlamaForCausalLM(nn.Module):
    """Decoder with its output layer.

    `__call__` returns hidden states and `unembed` turns some of them into logits, so that a training step never forms
    logits of positions without a label.
    """

    config: LlamaConfig
    remat: Remat = Remat.NONE

    def setup(self) -> None:
        c = self.config
        self.model = LlamaModel(c, self.remat)
        if not c.tied:
            self.lm_head = BypassDense(c.vocab_size, False, c.dtype)

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
        return self.model.embed_tokens.attend(hidden) if self.config.tied else self.lm_head(hidden)

    def initialise(self, ids: Array) -> Array:
        """Use every parameter; for `init` only."""
        return self.unembed(self(ids)[0])
