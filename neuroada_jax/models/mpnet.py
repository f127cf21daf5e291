"""MPNet with its sequence classifier: BERT's layers under other names, and a bias of attention for each distance."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from neuroada_jax.models import layers
from neuroada_jax.models.config_fields import Fields
from neuroada_jax.models.encoder_parts import (
    BertLayer,
    Embeddings,
    EncoderConfig,
    ForSequenceClassification,
    TwoMaps,
    applied_layers,
    attended,
    self_attended,
    sizes,
)
from neuroada_jax.models.layers import BypassDense, Dropout, Embedding, LayerNorm
from neuroada_jax.models.remat import Remat

MPNET_TARGETS = ("q", "k", "v", "o", "intermediate.dense", "output.dense")

_PAD = 1  # for MPNet's positions, whatever the config says
_BUCKETS, _FARTHEST = 32, 128  # of distances, likewise


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPNetConfig(EncoderConfig):
    """Static description of an MPNet; `num_buckets` is the number of its biases, of which the first 32 are used."""

    num_buckets: int


def read_config(fields: Fields, dtype: Any) -> MPNetConfig:
    """Read the config.json of a model_type mpnet.

    Raises:
      UserError: a field is missing or has a value that is not supported.
    """
    own, positions = sizes(fields), fields.integer("max_position_embeddings", 512)
    for name, value, least in (
        ("max_position_embeddings", positions, _PAD + 2),
        ("vocab_size", own["vocab_size"], _PAD + 1),
    ):
        if value < least:
            raise fields.wrong(name, f"at least {least}")
    dropout = fields.number("hidden_dropout_prob", 0.1, below=1.0)
    return MPNetConfig(
        **own,
        num_positions=positions,
        first_position=_PAD + 1,
        pad_id=_PAD,
        norm_epsilon=fields.number("layer_norm_eps", 1e-12),
        activation=fields.choice("hidden_act", "gelu", list(layers.ACTIVATIONS)),
        hidden_dropout=dropout,
        attention_dropout=fields.number("attention_probs_dropout_prob", 0.1, below=1.0),
        classifier_dropout=dropout,
        dtype=dtype,
        num_buckets=fields.integer("relative_attention_num_buckets", _BUCKETS, least=_BUCKETS),
    )


def buckets(tokens: int) -> np.ndarray:
    """Return the number of the bias of every query (rows) and key, int32 (T, T), in float32 as transformers computes it."""
    distance = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
    half, size = _BUCKETS // 2, np.abs(distance)
    exact = half // 2
    scaled = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact)) / np.float32(np.log(_FARTHEST / exact))
    far = np.minimum(exact + (scaled * np.float32(half - exact)).astype(np.int32), half - 1)
    return ((distance < 0) * half + np.where(size < exact, size, far)).astype(np.int32)


class SelfAttention(nn.Module):
    """Bidirectional multi-head attention with its output layer."""

    config: MPNetConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array, bias: Array) -> Array:
        y = self_attended(self, x, mask, ("q", "k", "v"), bias)
        return BypassDense(self.config.hidden_size, True, self.config.dtype, name="o")(y)


class Attention(nn.Module):
    """Attention, dropout, residual connection and norm."""

    config: MPNetConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array, bias: Array) -> Array:
        c = self.config
        y = Dropout(c.hidden_dropout)(SelfAttention(c, name="attn")(x, mask, bias))
        return LayerNorm(c.norm_epsilon, c.dtype, name="LayerNorm")(x + y)


class Layer(BertLayer):
    """BERT's layer with this attention."""

    attention = Attention


class Layers(nn.Module):
    """All layers, and the biases of attention, which they share."""

    config: MPNetConfig
    remat: Remat = Remat.NONE

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        c, numbers = self.config, jnp.asarray(buckets(x.shape[1]))
        bias = Embedding(c.num_buckets, c.num_heads, c.dtype, name="relative_attention_bias")(numbers)
        return applied_layers(self, "layer", Layer, x, (mask, jnp.moveaxis(bias, 2, 0)[None]))


class MPNet(nn.Module):
    """Embeddings and layers."""

    config: MPNetConfig
    remat: Remat = Remat.NONE

    def setup(self) -> None:
        self.embeddings = Embeddings(self.config)
        self.encoder = Layers(self.config, self.remat)

    def __call__(self, ids: Array, mask: Array | None, token_types: Array | None) -> Array:
        return self.encoder(self.embeddings(ids, None), attended(ids, mask))


class MPNetForSequenceClassification(ForSequenceClassification):
    """MPNet with a classifier of two linear maps on the first token; token types are ignored."""

    encoder_name = "mpnet"

    def setup(self) -> None:
        self.mpnet = MPNet(self.config, self.remat)
        self.classifier = TwoMaps(self.config)
