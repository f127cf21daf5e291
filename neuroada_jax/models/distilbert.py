"""DistilBERT with its sequence classifier: BERT's layers under names of its own, without token types and pooler."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from neuroada_jax.models import layers
from neuroada_jax.models.config_fields import Fields
from neuroada_jax.models.encoder_parts import (
    Embeddings,
    EncoderConfig,
    ForSequenceClassification,
    Layers,
    attended,
    self_attended,
    sizes,
)
from neuroada_jax.models.layers import BypassDense, Dropout, LayerNorm
from neuroada_jax.models.remat import Remat, token_wise

DISTILBERT_TARGETS = ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2")


def read_config(fields: Fields, dtype: Any) -> EncoderConfig:
    """Read the config.json of a model_type distilbert.

    Raises:
      UserError: a field is missing or has a value that is not supported.
    """
    own = sizes(
        fields,
        hidden_size=["dim", "hidden_size"],
        num_heads=["n_heads", "num_attention_heads"],
        num_layers=["n_layers", "num_hidden_layers"],
        intermediate_size=["hidden_dim"],
    )
    return EncoderConfig(
        **own,
        num_positions=fields.integer("max_position_embeddings", 512),
        activation=fields.choice("activation", "gelu", list(layers.ACTIVATIONS)),
        hidden_dropout=fields.number("dropout", 0.1, below=1.0),
        attention_dropout=fields.number("attention_dropout", 0.1, below=1.0),
        classifier_dropout=fields.number("seq_classif_dropout", 0.2, below=1.0),
        dtype=dtype,
    )


class SelfAttention(nn.Module):
    """Bidirectional multi-head attention with its output layer."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        c = self.config
        y = self_attended(self, x, mask, ("q_lin", "k_lin", "v_lin"))
        return BypassDense(c.hidden_size, True, c.dtype, name="out_lin")(y)


class FeedForward(nn.Module):
    """Two linear maps with an activation between them, and dropout."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        x = layers.ACTIVATIONS[c.activation](BypassDense(c.intermediate_size, True, c.dtype, name="lin1")(x))
        return Dropout(c.hidden_dropout)(BypassDense(c.hidden_size, True, c.dtype, name="lin2")(x))


class Layer(nn.Module):
    """One layer, written as the body of a scan."""

    config: EncoderConfig
    remat: Remat = Remat.NONE

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> tuple[Array, None]:
        c = self.config
        x = LayerNorm(c.norm_epsilon, c.dtype, name="sa_layer_norm")(SelfAttention(c, name="attention")(x, mask) + x)

        def feed_forward(_: nn.Module, x: Array) -> Array:
            return LayerNorm(c.norm_epsilon, c.dtype, name="output_layer_norm")(FeedForward(c, name="ffn")(x) + x)

        return token_wise(feed_forward, self.remat, x.shape)(self, x), None


class DistilBert(nn.Module):
    """Embeddings and layers."""

    config: EncoderConfig
    remat: Remat = Remat.NONE

    def setup(self) -> None:
        self.embeddings = Embeddings(self.config)
        self.transformer = Layers(self.config, Layer, self.remat)

    def __call__(self, ids: Array, mask: Array | None, token_types: Array | None) -> Array:
        return self.transformer(self.embeddings(ids, None), attended(ids, mask))


class DistilBertForSequenceClassification(ForSequenceClassification):
    """DistilBERT with two linear maps on the first token; token types are ignored."""

    encoder_name = "distilbert"

    def setup(self) -> None:
        c = self.config
        self.distilbert = DistilBert(c, self.remat)
        self.pre_classifier = BypassDense(c.hidden_size, True, c.dtype)
        self.dropout = Dropout(c.classifier_dropout)
        self.classifier = BypassDense(c.num_labels, True, c.dtype)

    def _classify(self, hidden: Array, mask: Array | None) -> Array:
        return self.classifier(self.dropout(jnp.maximum(self.pre_classifier(hidden[:, 0]), 0)))
