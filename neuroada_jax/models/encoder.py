"""BERT, RoBERTa and XLM-R in Flax Linen with stacked layers, and their sequence classification heads.

The three differ in how they count positions and in the head. As in llama.py, one scan body serves every depth and module
names are those of the Hugging Face checkpoint without the layer's number.

Dropout is active where `apply` gets `rngs={"dropout": key}`, and only there.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from neuroada_jax.models import layers
from neuroada_jax.models.encoder_config import EncoderConfig
from neuroada_jax.models.layers import BypassDense, Dropout, Embedding, LayerNorm, Remat


class Embeddings(nn.Module):
    """The sum of word, position and token type embeddings, normalised."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, ids: Array, token_types: Array | None) -> Array:
        c = self.config

        def embed(name: str, rows: int, ids: Array) -> Array:
            return Embedding(rows, c.hidden_size, c.dtype, name=name)(ids)

        if c.first_position:  # RoBERTa: padding gets a position of its own and is not counted
            real = ids != c.pad_id
            positions = jnp.where(real, c.first_position - 1 + jnp.cumsum(real, axis=1, dtype=jnp.int32), c.pad_id)
        else:
            positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        x = embed("word_embeddings", c.vocab_size, ids) + embed("position_embeddings", c.position_rows, positions)
        token_types = jnp.zeros_like(ids) if token_types is None else token_types
        x = x + embed("token_type_embeddings", c.token_types, token_types)
        return Dropout(c.hidden_dropout)(LayerNorm(c.norm_epsilon, c.dtype, name="LayerNorm")(x))


class SelfAttention(nn.Module):
    """Multi-head attention in both directions, without its output layer."""

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
            y = layers.attention_with_dropout(query, key, value, mask=mask, rate=c.attention_dropout, rng=rng)
        else:
            y = layers.attention(query, key, value, mask=mask, causal=False)
        return layers.saved(y.reshape(x.shape))


class Output(nn.Module):
    """A linear map back to D, dropout, and the norm of its sum with what came in."""

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
    """The widening half of the feed-forward block."""

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

        return layers.token_wise(feed_forward, self.remat, x.shape)(self, x), None


class Layers(nn.Module):
    """The stack of layers."""

    config: EncoderConfig
    remat: Remat = Remat.NONE

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        stack = nn.scan(
            layers.remat_module(Layer, self.remat),
            variable_axes={"params": 0, **dict.fromkeys(layers.BYPASS_COLLECTIONS, 0)},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.config.num_layers,
        )
        return stack(self.config, self.remat, name="layer")(x, mask)[0]


class Pooler(nn.Module):
    """BERT's: the first token's state through a linear map and tanh."""

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
        rows, length = ids.shape
        every = jnp.broadcast_to(mask[:, None, None, :], (rows, 1, length, length))
        return self.encoder(self.embeddings(ids, token_types), every)


class _ForSequenceClassification(nn.Module):
    """What both classes share; a subclass makes the encoder and the head."""

    config: EncoderConfig
    remat: Remat = Remat.NONE

    def __call__(
        self,
        ids: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B labels"]:
        """The head's logits, or for one label the predicted numbers, in the model's dtype.

        Args:
          ids: int32 tokens.
          mask: which of them are real. None: all.
          token_types: int32, 0 for the first and 1 for the second text of a pair. None: all 0.
        """
        return self._head(self.hidden_states(ids, mask, token_types))

    def initialise(self, ids: Array) -> Array:
        """Touches every parameter; for `init` only."""
        return self(ids)


class BertForSequenceClassification(_ForSequenceClassification):
    """BERT with its pooler and a linear classifier."""

    def setup(self) -> None:
        c = self.config
        self.bert = Encoder(c, self.remat, pooled=True)
        self.dropout = Dropout(c.classifier_dropout)
        self.classifier = BypassDense(c.num_labels, True, c.dtype)

    def hidden_states(self, ids: Array, mask: Array | None = None, token_types: Array | None = None) -> Array:
        """The last layer's states (B, T, D)."""
        return self.bert(ids, mask, token_types)

    def _head(self, hidden: Array) -> Array:
        return self.classifier(self.dropout(self.bert.pooler(hidden)))


class RobertaForSequenceClassification(_ForSequenceClassification):
    """RoBERTa with a classifier of two linear maps on the first token."""

    def setup(self) -> None:
        self.roberta = Encoder(self.config, self.remat)
        self.classifier = RobertaHead(self.config)

    def hidden_states(self, ids: Array, mask: Array | None = None, token_types: Array | None = None) -> Array:
        """The last layer's states (B, T, D)."""
        return self.roberta(ids, mask, token_types)

    def _head(self, hidden: Array) -> Array:
        return self.classifier(hidden[:, 0])


class RobertaHead(nn.Module):
    """RoBERTa's classifier."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        drop = Dropout(c.classifier_dropout)
        x = jnp.tanh(BypassDense(c.hidden_size, True, c.dtype, name="dense")(drop(x)))
        return BypassDense(c.num_labels, True, c.dtype, name="out_proj")(drop(x))
