"""ModernBERT with its sequence classifier: rotary positions, windows by layer, norms before the blocks, gated blocks."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array

from neuroada_jax.models import attention, layers, rope
from neuroada_jax.models.config_fields import Fields
from neuroada_jax.models.encoder_parts import (
    EncoderConfig,
    ForSequenceClassification,
    applied_layers,
    attended,
    sizes,
)
from neuroada_jax.models.layers import BypassDense, Dropout, Embedding, LayerNorm
from neuroada_jax.models.remat import Remat, kept_activation, token_wise

MODERNBERT_TARGETS = ("Wqkv", "attn.Wo", "Wi", "mlp.Wo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModernBertConfig(EncoderConfig):
    """Static description of a ModernBERT; `hidden_dropout` is that of the embeddings.

    Attributes:
      windowed: for each layer, whether its tokens attend to near ones only.
      reach: the largest distance of these.
      ropes: of layers without and with a window.
      mlp_dropout: within the feed-forward block.
      norm_bias: whether norms have a bias; the following ones for the maps.
      attention_bias: of attention.
      mlp_bias: of the feed-forward block.
      classifier_bias: of the map before the classifier.
      classifier_activation: behind that map.
      pooling: "cls", the first token, or "mean".
    """

    windowed: tuple[bool, ...]
    reach: int
    ropes: tuple[rope.Rope, rope.Rope]
    mlp_dropout: float
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    classifier_bias: bool
    classifier_activation: str
    pooling: str


def read_config(fields: Fields, dtype: Any) -> ModernBertConfig:
    """Read the config.json of a model_type modernbert.

    Raises:
      UserError: a field is missing or has a value that is not supported.
    """
    own = sizes(fields)
    fields.number("initializer_range", 0.02, positive=True)  # with 0 transformers makes no ModernBERT
    head_dim = own["hidden_size"] // own["num_heads"]
    if head_dim % 2 or fields.integer("head_dim", head_dim) != head_dim:
        raise fields.wrong("head_dim", f"hidden_size / num_attention_heads, which is {head_dim}, and even")
    every, windowed = fields.integer("global_attn_every_n_layers", 3), fields.windowed_layers(own["num_layers"])
    positions = fields.integer("max_position_embeddings", 8192)
    full, sliding = _ropes(fields, head_dim, positions)
    return ModernBertConfig(
        **own,
        num_positions=positions,
        norm_epsilon=fields.number("norm_eps", 1e-5),
        activation=fields.choice("hidden_activation", "gelu", list(layers.ACTIVATIONS)),
        hidden_dropout=fields.number("embedding_dropout", 0.0, below=1.0),
        attention_dropout=fields.number("attention_dropout", 0.0, below=1.0),
        classifier_dropout=fields.number("classifier_dropout", 0.0, below=1.0),
        dtype=dtype,
        windowed=tuple(windowed or (layer % every != 0 for layer in range(own["num_layers"]))),
        reach=_reach(fields),
        ropes=(full, sliding),
        mlp_dropout=fields.number("mlp_dropout", 0.0, below=1.0),
        norm_bias=fields.flag("norm_bias", False),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        classifier_bias=fields.flag("classifier_bias", False),
        classifier_activation=fields.choice("classifier_activation", "gelu", list(layers.ACTIVATIONS)),
        pooling=fields.choice("classifier_pooling", "cls", ["cls", "mean"]),
    )


def _ropes(fields: Fields, head_dim: int, positions: int) -> list[rope.Rope]:
    """Return the ropes of layers without and with a window."""
    thetas = {
        "full_attention": ("global_rope_theta", 160_000.0),
        "sliding_attention": ("local_rope_theta", 10_000.0),
    }
    given = fields.get("rope_parameters", {})
    if isinstance(given, Mapping) and not all(key in thetas and isinstance(each, Mapping) for key, each in given.items()):
        raise fields.wrong("rope_parameters", f"an object with an object for each of {', '.join(thetas)}")
    return rope.by_attention(fields, head_dim, positions, thetas, thetas)


def _reach(fields: Fields) -> int:
    """Return the largest distance within a window; a `sliding_window` is that distance, and comes first."""
    reach = fields.integer("local_attention", 128, least=0) // 2
    return fields.integer("sliding_window", reach, least=0)


def _norm(c: ModernBertConfig, name: str) -> LayerNorm:
    return LayerNorm(c.norm_epsilon, c.dtype, c.norm_bias, name=name)


class Attention(nn.Module):
    """Attention with rotary positions; queries, keys and values come from one map."""

    config: ModernBertConfig

    @nn.compact
    def __call__(self, x: Array, cos: Array, sin: Array, mask: Array) -> Array:
        c, width = self.config, self.config.hidden_size // self.config.num_heads
        together = BypassDense(3 * c.hidden_size, c.attention_bias, c.dtype, name="Wqkv")(x)
        query, key, value = jnp.moveaxis(together.reshape(*x.shape[:2], 3, c.num_heads, width), 2, 0)
        query, key = rope.rotate(query, cos, sin), rope.rotate(key, cos, sin)
        rng = self.make_rng("dropout") if c.attention_dropout and self.has_rng("dropout") else None
        y = attention.bidirectional(query, key, value, mask=mask, rate=c.attention_dropout, rng=rng)
        y = BypassDense(c.hidden_size, c.attention_bias, c.dtype, name="Wo")(kept_activation(y.reshape(x.shape)))
        return Dropout(c.attention_dropout)(y)


class FeedForward(nn.Module):
    """Gated feed-forward block; its first two maps are one."""

    config: ModernBertConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        together = BypassDense(2 * c.intermediate_size, c.mlp_bias, c.dtype, name="Wi")(x)
        x, gate = jnp.split(together, 2, axis=-1)
        x = Dropout(c.mlp_dropout)(layers.ACTIVATIONS[c.activation](x) * gate)
        return BypassDense(c.hidden_size, c.mlp_bias, c.dtype, name="Wo")(x)


class Layer(nn.Module):
    """One layer, written as the body of a scan; the first one has no norm before attention."""

    config: ModernBertConfig
    remat: Remat = Remat.NONE

    @nn.compact
    def __call__(self, x: Array, around: tuple[Array, Array, Array], scanned: tuple[Array, Array]) -> tuple[Array, None]:
        c, (number, windowed) = self.config, scanned
        own = (lax.dynamic_index_in_dim(each, windowed, keepdims=False) for each in around)
        normed = jnp.where(number == 0, x, _norm(c, "attn_norm")(x))
        x = x + Attention(c, name="attn")(normed, *own)

        def feed_forward(_: nn.Module, x: Array) -> Array:
            return x + FeedForward(c, name="mlp")(_norm(c, "mlp_norm")(x))

        return token_wise(feed_forward, self.remat, x.shape)(self, x), None


class Embeddings(nn.Module):
    """Embeddings of tokens, normalised."""

    config: ModernBertConfig

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        c = self.config
        x = Embedding(c.vocab_size, c.hidden_size, c.dtype, name="tok_embeddings")(ids)
        return Dropout(c.hidden_dropout)(_norm(c, "norm")(x))


class ModernBert(nn.Module):
    """Embeddings, layers and final norm."""

    config: ModernBertConfig
    remat: Remat = Remat.NONE

    @nn.compact
    def __call__(self, ids: Array, mask: Array | None, token_types: Array | None) -> Array:
        c, places = self.config, jnp.arange(ids.shape[1], dtype=jnp.int32)
        turns = [rope.rotations(each, c.hidden_size // c.num_heads, places[None]) for each in c.ropes]
        cos, sin = (jnp.stack(each) for each in zip(*turns, strict=True))
        full = attended(ids, mask)
        near = jnp.abs(places[:, None] - places[None, :]) <= c.reach
        around = (cos, sin, jnp.stack([full, full & near[None, None]]))
        scanned = (np.arange(c.num_layers, dtype=np.int32), np.array(c.windowed, np.int32))
        x = Embeddings(c, name="embeddings")(ids)
        x = applied_layers(self, "layers", Layer, x, around, scanned, not_in_first=["attn_norm"])
        return _norm(c, "final_norm")(x)


class Head(nn.Module):
    """The map before the classifier, its activation and a norm."""

    config: ModernBertConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        act: Callable[[Array], Array] = layers.ACTIVATIONS[c.classifier_activation]
        return _norm(c, "norm")(act(BypassDense(c.hidden_size, c.classifier_bias, c.dtype, name="dense")(x)))


class ModernBertForSequenceClassification(ForSequenceClassification):
    """ModernBERT with a classifier on its first token, or on the mean of all."""

    encoder_name = "model"

    def setup(self) -> None:
        c = self.config
        self.model = ModernBert(c, self.remat)
        self.head = Head(c)
        self.drop = Dropout(c.classifier_dropout)
        self.classifier = BypassDense(c.num_labels, True, c.dtype)

    def _classify(self, hidden: Array, mask: Array | None) -> Array:
        if self.config.pooling == "cls":
            pooled = hidden[:, 0]
        elif mask is None:
            pooled = jnp.mean(hidden, axis=1)
        else:
            wide, real = hidden.astype(jnp.float32), mask.astype(jnp.float32)
            total = jnp.einsum("btd,bt->bd", wide, real)
            pooled = (total / jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1.0)).astype(hidden.dtype)
        return self.classifier(self.drop(self.head(pooled)))
