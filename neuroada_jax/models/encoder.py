"""BERT, RoBERTa, XLM-R and ELECTRA in Flax Linen with stacked layers, and their sequence classifiers.

They differ in how they count positions, in the width of the embeddings and in the classifier. As in decoder.py, one scan
body serves every depth and module names are those of the Hugging Face checkpoint without the layer number.

Dropout is active only where `apply` is given `rngs={"dropout": key}`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from neuroada_jax.errors import UserError
from neuroada_jax.models import attention, labels, layers, unrolled
from neuroada_jax.models.config_fields import LARGEST_DEPTH, Fields, shown
from neuroada_jax.models.layers import BypassDense, Dropout, Embedding, LayerNorm
from neuroada_jax.models.remat import (
    BYPASS_COLLECTIONS,
    Remat,
    kept_activation,
    outside_scan,
    remat_module,
    token_wise,
)

LARGEST_LABELS = 2**20

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
    embedding_size: int | None = None  # None: D
    absolute_positions: bool = True

    @property
    def max_positions(self) -> int:
        """The largest number of tokens in a sequence."""
        return self.num_positions - self.first_position

    @classmethod
    def from_hf(cls, fields: Fields, dtype: Any = jnp.float32) -> "EncoderConfig":
        """Read the config.json of a model_type bert, electra, roberta or xlm-roberta.

        Raises:
          UserError: a field is missing or has a value that is not supported.
        """
        bert = fields.kind in ("bert", "electra")
        hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        if hidden % heads:
            raise UserError(f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
        vocabulary, positions = fields.integer("vocab_size"), fields.integer("max_position_embeddings")
        # BERT does not look at the padding token, and transformers' RoBERTa has no positions without one.
        pad = (fields.integer_or_none if bert else fields.integer)("pad_token_id", 0 if bert else 1, least=0)
        if pad is not None and pad >= vocabulary:
            raise fields.wrong("pad_token_id", f"below vocab_size {vocabulary}")
        first_position = 0 if bert or pad is None else pad + 1
        if first_position >= positions:
            raise fields.wrong("max_position_embeddings", f"more than pad_token_id + 1, which is {first_position}")
        fields.number("initializer_range", 0.02)  # of a new classifier
        hidden_dropout = fields.number("hidden_dropout_prob", 0.1, below=1.0)
        own_dropout = fields.get("classifier_dropout") is not None
        return cls(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers", most=LARGEST_DEPTH),
            num_heads=heads,
            num_labels=num_labels(fields),
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


def num_labels(fields: Fields) -> int:
    """Return the number of classifier outputs, 1 for regression: as transformers, `num_labels`, or one for each `id2label`.

    Raises:
      UserError: no label, or a problem_type that is not supported or does not fit the number of labels.
    """
    named = fields.get("id2label")
    if named is not None and not (isinstance(named, Mapping) and named and all(map(_is_integer, named))):
        raise UserError(f"config.json: id2label must name at least one label, each by its number, found {shown(named)}")
    count = fields.integer("num_labels", 2 if named is None else len(named), most=LARGEST_LABELS)
    problem = fields.get("problem_type")
    fitting = (None, labels.REGRESSION) if count == 1 else (None, labels.SINGLE, labels.MULTILABEL)
    if problem not in fitting:
        raise UserError(
            f"config.json: problem_type {shown(problem)} with {count} label(s) is not supported; expected "
            f"{' or '.join(map(repr, fitting[1:]))}"
        )
    return count


def _is_integer(key: Any) -> bool:
    return str(key).isascii() and str(key).isdigit()


class Embeddings(nn.Module):
    """Sum of word, position and token type embeddings, normalised."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, ids: Array, token_types: Array | None) -> Array:
        c = self.config

        def embed(name: str, size: int, ids: Array) -> Array:
            return Embedding(size, c.embedding_size or c.hidden_size, c.dtype, name=name)(ids)

        if c.first_position:  # RoBERTa: padding has a position of its own and is not counted
            real = ids != c.pad_id
            positions = jnp.where(real, c.first_position - 1 + jnp.cumsum(real, axis=1, dtype=jnp.int32), c.pad_id)
        else:
            positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        x = embed("word_embeddings", c.vocab_size, ids)
        if c.absolute_positions:
            x = x + embed("position_embeddings", c.num_positions, positions)
        if c.token_types:
            token_types = jnp.zeros_like(ids) if token_types is None else token_types
            x = x + embed("token_type_embeddings", c.token_types, token_types)
        return Dropout(c.hidden_dropout)(LayerNorm(c.norm_epsilon, c.dtype, name="LayerNorm")(x))


def self_attended(module: Any, x: Array, mask: Array, names: tuple[str, str, str]) -> Array:
    """Attend in the compact method of a module, whose maps for queries, keys and values have these names."""
    c: EncoderConfig = module.config

    def project(name: str) -> Array:
        y = BypassDense(c.hidden_size, True, c.dtype, name=name)(x)
        return y.reshape(*x.shape[:2], c.num_heads, c.hidden_size // c.num_heads)

    query, key, value = map(project, names)
    rng = module.make_rng("dropout") if c.attention_dropout and module.has_rng("dropout") else None
    y = attention.bidirectional(query, key, value, mask=mask, rate=c.attention_dropout, rng=rng)
    return kept_activation(y.reshape(x.shape))


class SelfAttention(nn.Module):
    """Bidirectional multi-head attention, without its output layer."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        return self_attended(self, x, mask, ("query", "key", "value"))


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
    """All layers, as one scan or, where their arrays lie apart, one by one.

    Attributes:
      config: the encoder.
      remat: its policy.
      layer: the module of a layer, written as the body of a scan.
    """

    config: EncoderConfig
    remat: Remat = Remat.NONE
    layer: type[nn.Module] = Layer

    @nn.compact
    def __call__(self, x: Array, mask: Any) -> Array:
        return self._all(x, mask)

    def _all(self, x: Array, mask: Any) -> Array:
        c, each = self.config, unrolled.variables_of_layers(self, "layer", self.config.num_layers)
        if each is not None:
            keys = jax.random.split(self.make_rng("dropout"), c.num_layers) if self.has_rng("dropout") else None
            with outside_scan():
                body: Any = remat_module(self.layer, self.remat)
                layer = body(c, self.remat, parent=None)
                for at, variables in enumerate(each):
                    x, _ = layer.apply(variables, x, mask, rngs={} if keys is None else {"dropout": keys[at]})
            return x
        scanned_layers: Any = nn.scan(
            remat_module(self.layer, self.remat),
            variable_axes={"params": 0, **dict.fromkeys(BYPASS_COLLECTIONS, 0)},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
        )
        return scanned_layers(c, self.remat, name="layer")(x, mask)[0]


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
        if self.config.embedding_size not in (None, self.config.hidden_size):
            self.embeddings_project = BypassDense(self.config.hidden_size, True, self.config.dtype)

    def __call__(self, ids: Array, mask: Array | None, token_types: Array | None) -> Array:
        x = self.embeddings(ids, token_types)
        if self.config.embedding_size not in (None, self.config.hidden_size):
            x = self.embeddings_project(x)
        return self.encoder(x, attended(ids, mask))


def attended(ids: Array, mask: Array | None) -> Array:
    """Return the mask (B, 1, T, T) of attention to all tokens that are no padding."""
    mask = jnp.ones(ids.shape, bool) if mask is None else mask
    return jnp.broadcast_to(mask[:, None, None, :], (ids.shape[0], 1, ids.shape[1], ids.shape[1]))


class ForSequenceClassification(nn.Module):
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


class BertForSequenceClassification(ForSequenceClassification):
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


class RobertaForSequenceClassification(ForSequenceClassification):
    """RoBERTa with a classifier of two linear maps on the first token."""

    def setup(self) -> None:
        self.roberta = Encoder(self.config, self.remat)
        self.classifier = TwoMaps(self.config)

    def hidden_states(self, ids: Array, mask: Array | None = None, token_types: Array | None = None) -> Array:
        """Compute the last layer's states (B, T, D)."""
        return self.roberta(ids, mask, token_types)

    def _classify(self, hidden: Array) -> Array:
        return self.classifier(hidden[:, 0])


class ElectraForSequenceClassification(ForSequenceClassification):
    """ELECTRA with a classifier of two linear maps on the first token."""

    def setup(self) -> None:
        self.electra = Encoder(self.config, self.remat)
        self.classifier = TwoMaps(self.config, layers.ACTIVATIONS["gelu"])

    def hidden_states(self, ids: Array, mask: Array | None = None, token_types: Array | None = None) -> Array:
        """Compute the last layer's states (B, T, D)."""
        return self.electra(ids, mask, token_types)

    def _classify(self, hidden: Array) -> Array:
        return self.classifier(hidden[:, 0])


class TwoMaps(nn.Module):
    """A classifier of two linear maps with an activation between them."""

    config: EncoderConfig
    activation: Callable[[Array], Array] = jnp.tanh

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        drop = Dropout(c.classifier_dropout)
        x = self.activation(BypassDense(c.hidden_size, True, c.dtype, name="dense")(drop(x)))
        return BypassDense(c.num_labels, True, c.dtype, name="out_proj")(drop(x))
