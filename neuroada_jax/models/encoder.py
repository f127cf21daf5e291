"""BERT, RoBERTa, XLM-R and ELECTRA in Flax Linen, and their sequence classifiers.

They differ in how they count positions, in the width of the embeddings and in the classifier.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from neuroada_jax.models import layers
from neuroada_jax.models.config_fields import Fields
from neuroada_jax.models.encoder_parts import (
    BertLayer,
    Embeddings,
    EncoderConfig,
    ForSequenceClassification,
    Layers,
    Output,
    TwoMaps,
    attended,
    self_attended,
    sizes,
)
from neuroada_jax.models.layers import BypassDense, Dropout
from neuroada_jax.models.remat import Remat

# Every linear map of a layer, as in the published scripts.
ENCODER_TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


def read_config(fields: Fields, dtype: Any = jnp.float32) -> EncoderConfig:
    """Read the config.json of a model_type bert, electra, roberta or xlm-roberta.

    Raises:
      UserError: a field is missing or has a value that is not supported.
    """
    bert, own = fields.kind in ("bert", "electra"), sizes(fields)
    positions = fields.integer("max_position_embeddings")
    # BERT does not look at the padding token, and transformers' RoBERTa has no positions without one.
    pad = (fields.integer_or_none if bert else fields.integer)("pad_token_id", 0 if bert else 1, least=0)
    if pad is not None and pad >= own["vocab_size"]:
        raise fields.wrong("pad_token_id", f"below vocab_size {own['vocab_size']}")
    first_position = 0 if bert or pad is None else pad + 1
    if first_position >= positions:
        raise fields.wrong("max_position_embeddings", f"more than pad_token_id + 1, which is {first_position}")
    hidden_dropout = fields.number("hidden_dropout_prob", 0.1, below=1.0)
    own_dropout = fields.get("classifier_dropout") is not None
    return EncoderConfig(
        **own,
        num_positions=positions,
        first_position=first_position,
        token_types=fields.integer("type_vocab_size", 2),
        pad_id=0 if pad is None else pad,
        norm_epsilon=fields.number("layer_norm_eps", 1e-12),
        activation=fields.choice("hidden_act", "gelu", list(layers.ACTIVATIONS)),
        hidden_dropout=hidden_dropout,
        attention_dropout=fields.number("attention_probs_dropout_prob", 0.1, below=1.0),
        classifier_dropout=fields.number("classifier_dropout", below=1.0) if own_dropout else hidden_dropout,
        dtype=dtype,
        embedding_size=fields.integer("embedding_size", 128) if fields.kind == "electra" else None,
    )


class SelfAttention(nn.Module):
    """Bidirectional multi-head attention, without its output layer."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        return self_attended(self, x, mask, ("query", "key", "value"))


class Attention(nn.Module):
    """Attention with its output layer and norm."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        return Output(self.config, name="output")(SelfAttention(self.config, name="self")(x, mask), x)


class Layer(BertLayer):
    """BERT's layer with this attention."""

    attention = Attention


class Pooler(nn.Module):
    """BERT's pooler: the first token's state through a linear map and tanh."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        c = self.config
        return jnp.tanh(BypassDense(c.hidden_size, True, c.dtype, name="dense")(hidden[:, 0]))


class Encoder(nn.Module):
    """Embeddings and layers, and BERT's pooler."""

    config: EncoderConfig
    remat: Remat = Remat.NONE
    pooled: bool = False

    def setup(self) -> None:
        self.embeddings = Embeddings(self.config)
        self.encoder = Layers(self.config, Layer, self.remat)
        if self.pooled:
            self.pooler = Pooler(self.config)
        if self.config.embedding_size not in (None, self.config.hidden_size):
            self.embeddings_project = BypassDense(self.config.hidden_size, True, self.config.dtype)

    def __call__(self, ids: Array, mask: Array | None, token_types: Array | None) -> Array:
        x = self.embeddings(ids, token_types)
        if self.config.embedding_size not in (None, self.config.hidden_size):
            x = self.embeddings_project(x)
        return self.encoder(x, (attended(ids, mask),))


class BertForSequenceClassification(ForSequenceClassification):
    """BERT with its pooler and a linear classifier."""

    encoder_name = "bert"

    def setup(self) -> None:
        c = self.config
        self.bert = Encoder(c, self.remat, pooled=True)
        self.dropout = Dropout(c.classifier_dropout)
        self.classifier = BypassDense(c.num_labels, True, c.dtype)

    def _classify(self, hidden: Array, mask: Array | None) -> Array:
        return self.classifier(self.dropout(self.bert.pooler(hidden)))


class RobertaForSequenceClassification(ForSequenceClassification):
    """RoBERTa with a classifier of two linear maps on the first token."""

    encoder_name = "roberta"

    def setup(self) -> None:
        self.roberta = Encoder(self.config, self.remat)
        self.classifier = TwoMaps(self.config)


class ElectraForSequenceClassification(ForSequenceClassification):
    """ELECTRA with a classifier of two linear maps on the first token."""

    encoder_name = "electra"

    def setup(self) -> None:
        self.electra = Encoder(self.config, self.remat)
        self.classifier = TwoMaps(self.config, layers.ACTIVATIONS["gelu"])
