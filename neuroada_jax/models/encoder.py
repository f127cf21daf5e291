"""BERT, RoBERTa and XLM-R in Flax Linen with stacked layers, and their sequence classifiers.

The three differ in how they count positions and in the classifier. As in llama.py, one scan body serves every depth and
module names are those of the Hugging Face checkpoint without the layer number.

Dropout is active only where `apply` is given `rngs={"dropout": key}`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from neuroada_jax.errors import UserError
from neuroada_jax.models import attention, labels, layers
from neuroada_jax.models.layers import BypassDense, Dropout, Embedding, LayerNorm
from neuroada_jax.models.remat import BYPASS_COLLECTIONS, Remat, kept_activation, remat_module, token_wise

# Every linear map of a layer, as in the published scripts.
ENCODER_TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Static description of an encoder; the comments give the letters of docs/design.md.

    `first_position` is the index of the first token in the position embedding: 0 for BERT, and for RoBERTa the index after
    that of the padding token.
    """

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # H
    num_labels: int
    num_positions: int
    first_position: int
    token_types: int
    pad_id: int
    norm_epsilon: float
    activation: str
    hidden_dropout: float
    attention_dropout: float
    classifier_dropout: float
    dtype: Any = jnp.float32

    @property
    def max_positions(self) -> int:
        """The largest number of tokens in a sequence."""
        return self.num_positions - self.first_position

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], dtype: Any = jnp.float32) -> "EncoderConfig":
        """Read a Hugging Face config.json of model_type bert, roberta or xlm-roberta.

        Raises:
          UserError: a field is missing or has a value that is not supported.
        """
        bert = config["model_type"] == "bert"

        def need(field: str) -> int:
            if not isinstance(config.get(field), int) or config[field] < 1:
                raise UserError(f"config.json: {field} must be a positive integer, found {config.get(field)!r}")
            return config[field]

        def rate(field: str, default: float) -> float:
            found = config.get(field)
            found = default if found is None else found
            if not isinstance(found, int | float) or not 0 <= found < 1:
                raise UserError(f"config.json: {field} must be a number from 0 to below 1, found {found!r}")
            return float(found)

        activation = config.get("hidden_act", "gelu")
        if activation not in layers.ACTIVATIONS:
            known = ", ".join(layers.ACTIVATIONS)
            raise UserError(f"config.json: hidden_act {activation!r} is not supported; supported: {known}")
        for field, only in (("position_embedding_type", "absolute"), ("is_decoder", False), ("add_cross_attention", False)):
            if config.get(field, only) != only:
                raise UserError(f"config.json: {field} {config[field]!r} is not supported; supported: {only!r}")
        if need("hidden_size") % need("num_attention_heads"):
            raise UserError(
                f"config.json: hidden_size {config['hidden_size']} is no multiple of "
                f"num_attention_heads {config['num_attention_heads']}"
            )
        pad = config.get("pad_token_id")
        pad = pad if pad is not None else 0 if bert else 1
        hidden_dropout = rate("hidden_dropout_prob", 0.1)
        return cls(
            vocab_size=need("vocab_size"),
            hidden_size=need("hidden_size"),
            intermediate_size=need("intermediate_size"),
            num_layers=need("num_hidden_layers"),
            num_heads=need("num_attention_heads"),
            num_labels=num_labels(config),
            num_positions=need("max_position_embeddings"),
            first_position=0 if bert else pad + 1,
            token_types=need("type_vocab_size") if "type_vocab_size" in config else 2,
            pad_id=pad,
            norm_epsilon=float(config.get("layer_norm_eps", 1e-12)),
            activation=activation,
            hidden_dropout=hidden_dropout,
            attention_dropout=rate("attention_probs_dropout_prob", 0.1),
            classifier_dropout=rate("classifier_dropout", hidden_dropout),
            dtype=dtype,
        )


def num_labels(config: Mapping[str, Any]) -> int:
    """Return the number of classifier outputs: 1 for regression, else one for each class of `id2label` (default 2).

    Raises:
      UserError: no label, or a problem_type that is not supported or does not fit the number of labels.
    """
    found = config.get("id2label")
    count = len(found) if isinstance(found, Mapping) else config.get("num_labels", 2)
    if not isinstance(count, int) or count < 1:
        raise UserError(f"config.json: id2label must name at least one label, found {found!r}")
    problem = config.get("problem_type")
    fitting = (None, labels.REGRESSION) if count == 1 else (None, labels.SINGLE, labels.MULTILABEL)
    if problem not in fitting:
        raise UserError(
            f"config.json: problem_type {problem!r} with {count} label(s) is not supported; expected "
            f"{' or '.join(map(repr, fitting[1:]))}"
        )
    return count


class Embeddings(nn.Module):
    """Sum of word, position and token type embeddings, normalised."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, ids: Array, token_types: Array | None) -> Array:
        c = self.config

        def embed(name: str, size: int, ids: Array) -> Array:
            return Embedding(size, c.hidden_size, c.dtype, name=name)(ids)

        if c.first_position:  # RoBERTa: padding has a position of its own and is not counted
            real = ids != c.pad_id
            positions = jnp.where(real, c.first_position - 1 + jnp.cumsum(real, axis=1, dtype=jnp.int32), c.pad_id)
        else:
            positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        x = embed("word_embeddings", c.vocab_size, ids) + embed("position_embeddings", c.num_positions, positions)
        token_types = jnp.zeros_like(ids) if token_types is None else token_types
        x = x + embed("token_type_embeddings", c.token_types, token_types)
        return Dropout(c.hidden_dropout)(LayerNorm(c.norm_epsilon, c.dtype, name="LayerNorm")(x))


class SelfAttention(nn.Module):
    """Bidirectional multi-head attention, without its output layer."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        c = self.config

        def project(name: str) -> Array:
            y = BypassDense(c.hidden_size, True, c.dtype, name=name)(x)
            return y.reshape(*x.shape[:2], c.num_heads, c.hidden_size // c.num_heads)

        query, key, value = project("query"), project("key"), project("value")
        if c.attention_dropout and self.has_rng("dropout"):
            rng = self.make_rng("dropout")
            y = attention.attention_with_dropout(query, key, value, mask=mask, rate=c.attention_dropout, rng=rng)
        else:
            y = attention.attention(query, key, value, mask=mask, causal=False)
        return kept_activation(y.reshape(x.shape))


class Output(nn.Module):
    """Linear map to D, dropout, residual connection and norm."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, y: Array, x: Array) -> Array:
        c = self.config
        y = Dropout(c.hidden_dropout)(BypassDense(c.hidden_size, True, c.dtype, name="dense")(y))
        return LayerNorm(c.norm_epsilon, c.dtype, name="LayerNorm")(x + y)


class Attention(nn.Module):
    """Attention with its output layer and norm."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        return Output(self.config, name="output")(SelfAttention(self.config, name="self")(x, mask), x)


class Intermediate(nn.Module):
    """First half of the feed-forward block: linear map to F and activation."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        return layers.ACTIVATIONS[c.activation](BypassDense(c.intermediate_size, True, c.dtype, name="dense")(x))


class Layer(nn.Module):
    """One encoder layer, written as the body of a scan."""

    config: EncoderConfig
    remat: Remat = Remat.NONE

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> tuple[Array, None]:
        c = self.config
        x = Attention(c, name="attention")(x, mask)

        def feed_forward(_: nn.Module, x: Array) -> Array:
            return Output(c, name="output")(Intermediate(c, name="intermediate")(x), x)

        return token_wise(feed_forward, self.remat, x.shape)(self, x), None


class Layers(nn.Module):
    """All layers, as one scan."""

    config: EncoderConfig
    remat: Remat = Remat.NONE

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        scanned_layers = nn.scan(
            remat_module(Layer, self.remat),
            variable_axes={"params": 0, **dict.fromkeys(BYPASS_COLLECTIONS, 0)},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.config.num_layers,
        )
        return scanned_layers(self.config, self.remat, name="layer")(x, mask)[0]


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
        self.encoder = Layers(self.config, self.remat)
        if self.pooled:
            self.pooler = Pooler(self.config)

    def __call__(self, ids: Array, mask: Array | None, token_types: Array | None) -> Array:
        mask = jnp.ones(ids.shape, bool) if mask is None else mask
        batch, length = ids.shape
        attended = jnp.broadcast_to(mask[:, None, None, :], (batch, 1, length, length))
        return self.encoder(self.embeddings(ids, token_types), attended)


class _ForSequenceClassification(nn.Module):
    """Base class of the sequence classifiers; a subclass defines the encoder and the classifier."""

    config: EncoderConfig
    remat: Remat = Remat.NONE

    def __call__(
        self,
        ids: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B labels"]:
        """Compute the classifier's logits, or for one label the predicted numbers, in the model's dtype.

        Args:
          ids: int32 tokens.
          mask: True for tokens, False for padding; None: no padding.
          token_types: int32, 0 for the first and 1 for the second text of a pair; None: all 0.
        """
        return self._classify(self.hidden_states(ids, mask, token_types))

    def initialise(self, ids: Array) -> Array:
        """Use every parameter; for `init` only."""
        return self(ids)


class BertForSequenceClassification(_ForSequenceClassification):
    """BERT with its pooler and a linear classifier."""

    def setup(self) -> None:
        c = self.config
        self.bert = Encoder(c, self.remat, pooled=True)
        self.dropout = Dropout(c.classifier_dropout)
        self.classifier = BypassDense(c.num_labels, True, c.dtype)

    def hidden_states(self, ids: Array, mask: Array | None = None, token_types: Array | None = None) -> Array:
        """Compute the last layer's states (B, T, D)."""
        return self.bert(ids, mask, token_types)

    def _classify(self, hidden: Array) -> Array:
        return self.classifier(self.dropout(self.bert.pooler(hidden)))


class RobertaForSequenceClassification(_ForSequenceClassification):
    """RoBERTa with a classifier of two linear maps on the first token."""

    def setup(self) -> None:
        self.roberta = Encoder(self.config, self.remat)
        self.classifier = RobertaClassifier(self.config)

    def hidden_states(self, ids: Array, mask: Array | None = None, token_types: Array | None = None) -> Array:
        """Compute the last layer's states (B, T, D)."""
        return self.roberta(ids, mask, token_types)

    def _classify(self, hidden: Array) -> Array:
        return self.classifier(hidden[:, 0])


class RobertaClassifier(nn.Module):
    """RoBERTa's classifier: two linear maps with tanh between them."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        drop = Dropout(c.classifier_dropout)
        x = jnp.tanh(BypassDense(c.hidden_size, True, c.dtype, name="dense")(drop(x)))
        return BypassDense(c.num_labels, True, c.dtype, name="out_proj")(drop(x))
