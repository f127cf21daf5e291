"""DeBERTa-v2 and v3 with their sequence classifier: attention to contents and to relative positions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array

from neuroada_jax.core.entries import wide_dtype
from neuroada_jax.models import attention, layers
from neuroada_jax.models.config_fields import Fields
from neuroada_jax.models.encoder_parts import (
    BertLayer,
    Embeddings,
    EncoderConfig,
    ForSequenceClassification,
    Output,
    applied_layers,
    attended,
    sizes,
)
from neuroada_jax.models.layers import BypassDense, Dropout, Embedding, LayerNorm
from neuroada_jax.models.remat import Remat, kept_activation, prevent_cse

DEBERTA_TARGETS = ("query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", "output.dense")

LARGEST_CONVOLUTION = 2**10

_TYPES = ("c2p", "p2c")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DebertaConfig(EncoderConfig):
    """Static description of a DeBERTa-v2 or v3.

    Attributes:
      relative: what attends to relative positions: "c2p" (queries), "p2c" (keys).
      buckets: of distances on a logarithmic scale; 0: every distance has its own embedding.
      largest: the largest relative position.
      shares_maps: whether relative positions go through the maps of queries and keys.
      normed: whether the embeddings of relative positions are normalised.
      pooler_dropout: before the pooler.
      pooler_activation: behind it.
      convolved: tokens that the convolution beside the first layer joins; 0: there is none.
      convolution_groups: of its channels.
      convolution_activation: behind it.
    """

    relative: tuple[str, ...] = _TYPES
    buckets: int = 0
    largest: int = 512
    shares_maps: bool = True
    normed: bool = False
    pooler_dropout: float = 0.0
    pooler_activation: str = "gelu"
    convolved: int = 0
    convolution_groups: int = 1
    convolution_activation: str = "tanh"

    @property
    def span(self) -> int:
        """The number of embeddings of relative positions on each side."""
        return self.buckets or self.largest


def read_config(fields: Fields, dtype: Any) -> DebertaConfig:
    """Read the config.json of a model_type deberta-v2.

    Raises:
      UserError: a field is missing or has a value that is not supported.
    """
    own = sizes(fields)
    for name, only in (
        ("attention_head_size", own["hidden_size"] // own["num_heads"]),
        ("embedding_size", own["hidden_size"]),
        ("pooler_hidden_size", own["hidden_size"]),
    ):
        if fields.integer(name, only) != only:
            raise fields.wrong(name, str(only))
    if not fields.flag("relative_attention", False):
        raise fields.wrong("relative_attention", "true")
    convolved = fields.integer("conv_kernel_size", 0, least=0, most=LARGEST_CONVOLUTION)
    if convolved and convolved % 2 == 0:
        raise fields.wrong("conv_kernel_size", "an odd number, or 0 for no convolution")
    groups = fields.integer("conv_groups", 1)
    if own["hidden_size"] % groups:
        raise fields.wrong("conv_groups", f"a divisor of hidden_size {own['hidden_size']}")
    relative = fields.get("pos_att_type")
    relative = [part.strip() for part in relative.lower().split("|")] if isinstance(relative, str) else relative
    if not isinstance(relative, list) or not relative or any(each not in _TYPES for each in relative):
        raise fields.wrong("pos_att_type", "one or both of 'c2p' and 'p2c'")
    positions = fields.integer("max_position_embeddings", 512)
    largest = fields.integer("max_relative_positions", -1, least=-1)
    hidden_dropout = fields.number("hidden_dropout_prob", 0.1, below=1.0)
    own_dropout = fields.get("cls_dropout") is not None
    return DebertaConfig(
        **own,
        num_positions=positions,
        token_types=fields.integer("type_vocab_size", 0, least=0),
        norm_epsilon=fields.number("layer_norm_eps", 1e-7),
        activation=fields.choice("hidden_act", "gelu", list(layers.ACTIVATIONS)),
        hidden_dropout=hidden_dropout,
        attention_dropout=fields.number("attention_probs_dropout_prob", 0.1, below=1.0),
        classifier_dropout=fields.number("cls_dropout", below=1.0) if own_dropout else hidden_dropout,
        dtype=dtype,
        absolute_positions=fields.flag("position_biased_input", True),
        relative=tuple(name for name in _TYPES if name in relative),
        buckets=max(fields.integer("position_buckets", -1, least=-1), 0),
        largest=largest if largest > 0 else positions,
        shares_maps=fields.flag("share_att_key", False),
        normed=fields.choice("norm_rel_ebd", "none", ["none", "layer_norm"]) == "layer_norm",
        pooler_dropout=fields.number("pooler_dropout", 0.0, below=1.0),
        pooler_activation=fields.choice("pooler_hidden_act", "gelu", list(layers.ACTIVATIONS)),
        convolved=convolved,
        convolution_groups=groups,
        convolution_activation=fields.choice("conv_act", "tanh", list(layers.ACTIVATIONS)),
    )


def relative_positions(config: DebertaConfig, tokens: int) -> np.ndarray:
    """Return the relative position of every query (rows) and key, int32 (T, T), in float32 as transformers computes it."""
    distance = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
    if not config.buckets or config.largest < 1:
        return distance.astype(np.int32)
    middle = config.buckets // 2
    size = np.where(np.abs(distance) < middle, middle - 1, np.abs(distance)).astype(np.float32)
    whole = np.log(np.float32((config.largest - 1) / middle), dtype=np.float32)
    with np.errstate(divide="ignore"):
        scaled = np.log(size / np.float32(middle), dtype=np.float32) / whole * np.float32(middle - 1)
    far = np.ceil(scaled) + middle
    return np.where(size <= middle, distance, far * np.sign(distance)).astype(np.int32)


class SelfAttention(nn.Module):
    """Attention of contents to contents, and of contents to relative positions, without its output layer."""

    config: DebertaConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array, relative: Array) -> Array:
        c, size = self.config, self.config.hidden_size // self.config.num_heads
        maps = {name: BypassDense(c.hidden_size, True, c.dtype, name=f"{name}_proj") for name in ("query", "key", "value")}
        relative = Dropout(c.hidden_dropout)(relative)

        def heads(map_: BypassDense, of: Array) -> Array:
            return map_(of).reshape(*of.shape[:-1], c.num_heads, size)

        query, key, value = (heads(each, x) for each in maps.values())
        positions = {}
        for kind, name in (("c2p", "key"), ("p2c", "query")):
            if kind in c.relative:
                own = maps[name] if c.shares_maps else BypassDense(c.hidden_size, True, c.dtype, name=f"pos_{name}_proj")
                positions[kind] = heads(own, relative)
        key_dropout = self.make_rng("dropout") if c.attention_dropout and self.has_rng("dropout") else None
        attend = jax.checkpoint(self._attend, prevent_cse=prevent_cse())
        return kept_activation(attend(query, key, value, positions, mask, key_dropout).reshape(x.shape))

    def _attend(
        self, query: Array, key: Array, value: Array, positions: dict[str, Array], mask: Array, rng: Array | None
    ) -> Array:
        c, span, wide = self.config, self.config.span, wide_dtype(query.dtype)
        distance = relative_positions(c, query.shape[1])
        logits = jnp.einsum("bthn,bshn->bhts", query, key)
        if "c2p" in positions:
            at = jnp.asarray(np.clip(distance + span, 0, 2 * span - 1))[None, None]
            found = jnp.einsum("bthn,rhn->bhtr", query, positions["c2p"])
            logits = logits + jnp.take_along_axis(found, at, axis=-1, mode="clip")
        if "p2c" in positions:
            at = jnp.asarray(np.clip(span - distance, 0, 2 * span - 1))[None, None]
            found = jnp.einsum("bshn,rhn->bhsr", key, positions["p2c"])
            logits = logits + jnp.swapaxes(jnp.take_along_axis(found, at, axis=-1, mode="clip"), -1, -2)
        factor = (query.shape[-1] * (1 + len(positions))) ** -0.5
        return attention.attended_values(logits.astype(wide) * factor, value, mask, c.attention_dropout, rng)


class Attention(nn.Module):
    """Attention with its output layer and norm."""

    config: DebertaConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array, relative: Array) -> Array:
        y = SelfAttention(self.config, name="self")(x, mask, relative)
        return Output(self.config, name="output")(y, x)


class Convolution(nn.Module):
    """A convolution over neighbouring tokens; parameters weight (D, D / groups, K) and bias (D,)."""

    config: DebertaConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, size = self.config, self.config.convolved
        shape = (c.hidden_size, c.hidden_size // c.convolution_groups, size)
        weight = self.param("weight", nn.initializers.normal(0.02), shape, c.dtype)
        bias = self.param("bias", nn.initializers.zeros, (c.hidden_size,), c.dtype)
        y = lax.conv_general_dilated(
            x,
            weight.astype(x.dtype),
            window_strides=(1,),
            padding=[(size // 2, size // 2)],
            dimension_numbers=("NTC", "OIT", "NTC"),
            feature_group_count=c.convolution_groups,
        )
        return y + jnp.broadcast_to(bias.astype(x.dtype), y.shape)


class Joined(nn.Module):
    """What the embedded tokens add to the first layer's output, (B, T, D), and the parameters of the norm behind it."""

    config: DebertaConfig

    @nn.compact
    def __call__(self, x: Array, real: Array) -> tuple[Array, Any]:
        c = self.config
        y = jnp.where(real, Convolution(c, name="conv")(jnp.where(real, x, 0)), 0)
        y = layers.ACTIVATIONS[c.convolution_activation](Dropout(c.hidden_dropout)(y))
        if self.is_initializing():
            LayerNorm(c.norm_epsilon, c.dtype, name="LayerNorm")(y)
        return y, self.get_variable("params", "LayerNorm")


class Layer(BertLayer):
    """BERT's layer with this attention, and with the convolution behind the first layer."""

    attention = Attention

    def __call__(self, x: Array, around: tuple[Any, ...], first: Array | None = None) -> tuple[Array, None]:
        *own, joined = around
        y, _ = super().__call__(x, tuple(own))
        if first is None:
            return y, None
        added, norm, real = joined
        norm_of = LayerNorm(self.config.norm_epsilon, self.config.dtype, parent=None)
        normed: Any = norm_of.apply({"params": norm}, y + added)
        return jnp.where(first, jnp.where(real, normed, 0), y), None


class Layers(nn.Module):
    """All layers, and the embeddings of relative positions, which they share."""

    config: DebertaConfig
    remat: Remat = Remat.NONE

    @nn.compact
    def __call__(self, x: Array, mask: Array, real: Array) -> Array:
        c = self.config
        relative = Embedding(2 * c.span, c.hidden_size, c.dtype, name="rel_embeddings")(jnp.arange(2 * c.span))
        if c.normed:
            relative = LayerNorm(c.norm_epsilon, c.dtype, name="LayerNorm")(relative)
        if not c.convolved:
            return applied_layers(self, "layer", Layer, x, (mask, relative, ()))
        joined = (*Joined(c, name="conv")(x, real), real)
        return applied_layers(self, "layer", Layer, x, (mask, relative, joined), np.arange(c.num_layers) == 0)


class Deberta(nn.Module):
    """Embeddings and layers."""

    config: DebertaConfig
    remat: Remat = Remat.NONE

    def setup(self) -> None:
        self.embeddings = Embeddings(self.config)
        self.encoder = Layers(self.config, self.remat)

    def __call__(self, ids: Array, mask: Array | None, token_types: Array | None) -> Array:
        real = jnp.ones(ids.shape, bool) if mask is None else mask
        return self.encoder(self.embeddings(ids, token_types), attended(ids, mask), real[:, :, None])


class ContextPooler(nn.Module):
    """The first token's state through dropout, a linear map and an activation."""

    config: DebertaConfig

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        c = self.config
        y = BypassDense(c.hidden_size, True, c.dtype, name="dense")(Dropout(c.pooler_dropout)(hidden[:, 0]))
        return layers.ACTIVATIONS[c.pooler_activation](y)


class DebertaForSequenceClassification(ForSequenceClassification):
    """DeBERTa with its pooler and a linear classifier."""

    encoder_name = "deberta"

    def setup(self) -> None:
        c = self.config
        self.deberta = Deberta(c, self.remat)
        self.pooler = ContextPooler(c)
        self.dropout = Dropout(c.classifier_dropout)
        self.classifier = BypassDense(c.num_labels, True, c.dtype)

    def _classify(self, hidden: Array, mask: Array | None) -> Array:
        return self.classifier(self.dropout(self.pooler(hidden)))
