"""Parts that encoders share: the static description, embeddings, blocks, the loop over the layers, the classifier's frame.

One scan body serves every depth, and module names are those of the Hugging Face checkpoint without the layer number.
Dropout is active only where `apply` is given `rngs={"dropout": key}`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from neuroada_jax.errors import UserError, shown
from neuroada_jax.models import attention, labels, layers, unrolled
from neuroada_jax.models.config_fields import LARGEST_DEPTH, Fields
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


@dataclasses.dataclass(frozen=True, kw_only=True)
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
    first_position: int = 0
    token_types: int = 0
    pad_id: int = 0
    norm_epsilon: float = 1e-12
    activation: str = "gelu"
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float = 0.0
    dtype: Any = jnp.float32
    embedding_size: int | None = None  # None: D
    absolute_positions: bool = True

    @property
    def max_positions(self) -> int:
        """The largest number of tokens in a sequence."""
        return self.num_positions - self.first_position


def sizes(fields: Fields, **names: Sequence[str]) -> dict[str, Any]:
    """Return the fields of `EncoderConfig` that every family has: the sizes and the number of labels.

    Args:
      fields: of the config.json.
      names: the names of a size in the config.json, where they are not those of BERT; equal where there are several.

    Raises:
      UserError: a size is missing or is not supported, or the heads do not divide the width.
    """
    names = {
        "hidden_size": ["hidden_size"],
        "num_heads": ["num_attention_heads"],
        "num_layers": ["num_hidden_layers"],
        "intermediate_size": ["intermediate_size"],
        **names,
    }
    most = {"num_layers": {"most": LARGEST_DEPTH}}
    found = {size: fields.integer_of(each, **most.get(size, {})) for size, each in names.items()}
    hidden, heads = found["hidden_size"], found["num_heads"]
    if hidden % heads:
        wide, divided = names["hidden_size"][0], names["num_heads"][0]
        raise UserError(f"config.json: {wide} {hidden} is no multiple of {divided} {heads}")
    fields.number("initializer_range", 0.02)  # of a new classifier
    return found | {"vocab_size": fields.integer("vocab_size"), "num_labels": num_labels(fields)}


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


def self_attended(module: Any, x: Array, mask: Array, names: tuple[str, str, str], bias: Array | None = None) -> Array:
    """Attend in the compact method of a module, whose maps for queries, keys and values have these names.

    `bias` (1, H, T, T) is added to the logits.
    """
    c: EncoderConfig = module.config

    def project(name: str) -> Array:
        y = BypassDense(c.hidden_size, True, c.dtype, name=name)(x)
        return y.reshape(*x.shape[:2], c.num_heads, c.hidden_size // c.num_heads)

    query, key, value = map(project, names)
    rng = module.make_rng("dropout") if c.attention_dropout and module.has_rng("dropout") else None
    y = attention.bidirectional(query, key, value, mask=mask, rate=c.attention_dropout, rng=rng, bias=bias)
    return kept_activation(y.reshape(x.shape))


class Output(nn.Module):
    """Linear map to D, dropout, residual connection and norm."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, y: Array, x: Array) -> Array:
        c = self.config
        y = Dropout(c.hidden_dropout)(BypassDense(c.hidden_size, True, c.dtype, name="dense")(y))
        return LayerNorm(c.norm_epsilon, c.dtype, name="LayerNorm")(x + y)


class Intermediate(nn.Module):
    """First half of the feed-forward block: linear map to F and activation."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        return layers.ACTIVATIONS[c.activation](BypassDense(c.intermediate_size, True, c.dtype, name="dense")(x))


class BertLayer(nn.Module):
    """One layer with norms behind its blocks, written as the body of a scan.

    Attributes:
      attention: the family's module, (x, *around) -> the states behind its norm.
    """

    config: Any
    remat: Remat = Remat.NONE
    attention: ClassVar[type[nn.Module]]

    @nn.compact
    def __call__(self, x: Array, around: tuple[Array, ...]) -> tuple[Array, None]:
        c = self.config
        x = self.attention(c, name="attention")(x, *around)

        def feed_forward(_: nn.Module, x: Array) -> Array:
            return Output(c, name="output")(Intermediate(c, name="intermediate")(x), x)

        return token_wise(feed_forward, self.remat, x.shape)(self, x), None


class Layers(nn.Module):
    """All layers of a checkpoint that names them `layer`.

    Attributes:
      config: the encoder.
      layer: the module of a layer, written as the body of a scan.
      remat: its policy.
    """

    config: Any
    layer: type[nn.Module]
    remat: Remat = Remat.NONE

    @nn.compact
    def __call__(self, x: Array, around: Any) -> Array:
        return applied_layers(self, "layer", self.layer, x, around)


def applied_layers(
    module: Any,
    name: str,
    layer: type[nn.Module],
    x: Array,
    around: Any,
    scanned: Any = None,
    not_in_first: Sequence[str] = (),
) -> Array:
    """Apply all layers in the compact method of a module: as one scan or, where their arrays lie apart, one by one.

    Args:
      module: has a config and a remat policy.
      name: of the layers in the module.
      layer: the module of a layer, written as the body of a scan.
      x: the input (B, T, D).
      around: arrays that all layers share.
      scanned: arrays with an entry for each layer; None for layers that take none.
      not_in_first: the modules without parameters in the first layer, which has to compute without them. Their leaves
        have an entry less than those of the others, and the first layer is given that of the second.
    """
    c, each = module.config, unrolled.variables_of_layers(module, name, module.config.num_layers)
    if each is not None:
        keys = jax.random.split(module.make_rng("dropout"), c.num_layers) if module.has_rng("dropout") else None
        with outside_scan():
            body: Any = remat_module(layer, module.remat)
            one = body(c, module.remat, parent=None)
            for at, variables in enumerate(each):
                own = () if scanned is None else (jax.tree.map(lambda leaf, at=at: jnp.asarray(leaf[at]), scanned),)
                x, _ = one.apply(variables, x, around, *own, rngs={} if keys is None else {"dropout": keys[at]})
        return x
    all_layers: Any = nn.scan(
        remat_module(layer, module.remat),
        variable_axes={"params": 0, **dict.fromkeys(BYPASS_COLLECTIONS, 0)},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast if scanned is None else (nn.broadcast, 0),
        length=c.num_layers,
    )
    if not_in_first:
        filled = _in_modules(not_in_first, lambda leaf: jnp.concatenate([leaf[:1], leaf]))
        shortened = _in_modules(not_in_first, lambda leaf: leaf[1:])
        all_layers = nn.map_variables(all_layers, "params", filled, shortened, init=module.is_initializing())
    return all_layers(c, module.remat, name=name)(x, around, *(() if scanned is None else (scanned,)))[0]


def _in_modules(names: Sequence[str], change: Callable[[Array], Array]) -> Callable[[Any], Any]:
    """Return the function that changes the leaves of some modules of a layer in {collection: variables}."""

    def changed(collections: Mapping[str, Any]) -> dict[str, Any]:
        return {
            kind: {own: jax.tree.map(change, node) if own in names else node for own, node in variables.items()}
            for kind, variables in collections.items()
        }

    return changed


def attended(ids: Array, mask: Array | None) -> Array:
    """Return the mask (B, 1, T, T) of attention to all tokens that are no padding."""
    mask = jnp.ones(ids.shape, bool) if mask is None else mask
    return jnp.broadcast_to(mask[:, None, None, :], (ids.shape[0], 1, ids.shape[1], ids.shape[1]))


class ForSequenceClassification(nn.Module):
    """Base class of the sequence classifiers.

    A subclass names its encoder, and in `setup` defines it, a module of (ids, mask, token types), and the classifier.
    """

    config: Any
    remat: Remat = Remat.NONE
    encoder_name = ""

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
        return self._classify(self.hidden_states(ids, mask, token_types), mask)

    def hidden_states(self, ids: Array, mask: Array | None = None, token_types: Array | None = None) -> Array:
        """Compute the last layer's states (B, T, D)."""
        return getattr(self, self.encoder_name)(ids, mask, token_types)

    def _classify(self, hidden: Array, mask: Array | None) -> Array:
        """Return the logits; by default those of a classifier on the first token."""
        return self.classifier(hidden[:, 0])

    def initialise(self, ids: Array) -> Array:
        """Use every parameter; for `init` only."""
        return self(ids)


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
