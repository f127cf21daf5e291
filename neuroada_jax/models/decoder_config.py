"""Static description of a decoder, and what the readers of all families take from a config.json.

A family is a function from the fields of its config.json to a `DecoderConfig`, which says of which parts the decoder is
composed: the kinds of its layers, where their norms stand, how its feed-forward block and its embedding compute.
"""

import dataclasses
import enum
from typing import Any, NamedTuple

import jax.numpy as jnp

from neuroada_jax.errors import UserError
from neuroada_jax.models.config_fields import LARGEST_DEPTH, LARGEST_POSITION, Fields
from neuroada_jax.models.experts import Experts
from neuroada_jax.models.layers import ACTIVATIONS
from neuroada_jax.models.rope import PLAIN_RULES, Rope, RopeRules


class LayerKind(NamedTuple):
    """What may differ between the layers of a decoder.

    Attributes:
      window: the largest number of slots that a token attends to, its own included; None: all before it.
      rope: which of the config's rotary embeddings; None: the layer has no positions.
    """

    window: int | None = None
    rope: int | None = 0


class Norms(enum.Enum):
    """Where the norms of a layer stand, under the names that checkpoints give them."""

    BEFORE = ("input_layernorm", None, "post_attention_layernorm", None)
    AFTER = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
    AROUND = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )


class QkNorm(enum.Enum):
    """What the norms of queries and keys normalise."""

    HEAD = "every head by itself"
    WIDTH = "all heads together"


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Static description of a decoder; the comments give the letters of docs/design.md."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # N
    ropes: tuple[Rope, ...]
    kinds: tuple[LayerKind, ...]  # of each layer
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0  # added to a norm's scale
    wide_norm: bool = False  # whether a norm's scale multiplies before the result is rounded to the model's dtype
    norms: Norms = Norms.BEFORE
    activation: str = "silu"
    tied: bool = False
    fused: bool = False  # q, k and v in one map, gate and up in another
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QkNorm | None = None
    attention_scale: float | None = None  # None: 1 / sqrt(N)
    attention_cap: float | None = None  # logits are cap * tanh(logits / cap)
    logit_cap: float | None = None
    logit_divisor: float = 1.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what a block adds to its input
    experts: Experts | None = None  # in the place of one feed-forward block
    max_positions: int = 2048
    dtype: Any = jnp.float32

    @property
    def num_layers(self) -> int:
        """The number of layers, L."""
        return len(self.kinds)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer, None where attention is full."""
        return tuple(kind.window for kind in self.kinds)


class Defaults(NamedTuple):
    """transformers' values of fields that a config.json leaves out, where they depend on the model_type.

    Attributes:
      max_positions: `max_position_embeddings`.
      kv_heads: `num_key_value_heads`; None: as many as heads.
      head_dim: None: D / H; 0: the field must be there.
      epsilon: `rms_norm_eps`.
      tied: `tie_word_embeddings`.
      activation: the name of the field, and its default.
      nullable: the fields in which null is the same as none.
      rules: of the rope parameters.
      divided: whether the width must be a multiple of the number of heads, whatever `head_dim` says.
    """

    max_positions: int
    kv_heads: int | None = None
    head_dim: int | None = None
    epsilon: float = 1e-6
    tied: bool = False
    activation: tuple[str, str] = ("hidden_act", "silu")
    nullable: tuple[str, ...] = ("num_key_value_heads",)
    rules: RopeRules = PLAIN_RULES
    divided: bool = False


def sizes(fields: Fields, defaults: Defaults) -> dict[str, Any]:
    """Return the fields of `DecoderConfig` that every family has, without the ropes and the kinds of layers.

    Raises:
      UserError: a field is missing, or has a value that is not supported.
    """
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")

    def integer(name: str, default: int) -> int:
        read = fields.integer_or_none if name in defaults.nullable else fields.integer
        return read(name, default) or default

    kv_heads = integer("num_key_value_heads", defaults.kv_heads or heads)
    if defaults.kv_heads and fields.get("num_key_value_heads", 0) is None:
        kv_heads = heads
    if heads % kv_heads:
        raise UserError(f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if defaults.divided and hidden % heads:
        raise UserError(f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    if defaults.head_dim == 0:
        head_dim = fields.integer("head_dim")
    else:
        head_dim = integer("head_dim", defaults.head_dim or hidden // heads)
    if not head_dim:
        raise UserError(f"config.json: hidden_size {hidden} is less than num_attention_heads {heads}")
    if head_dim % 2:
        raise UserError(f"config.json: head_dim must be even, found {head_dim}")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "norm_epsilon": fields.number("rms_norm_eps", defaults.epsilon),
        "activation": fields.choice(*defaults.activation, list(ACTIVATIONS)),
        "tied": fields.flag("tie_word_embeddings", defaults.tied),
        "max_positions": fields.integer("max_position_embeddings", defaults.max_positions, most=LARGEST_POSITION),
    }


def depth(fields: Fields) -> int:
    """Return the number of layers, L."""
    return fields.integer("num_hidden_layers", most=LARGEST_DEPTH)


def sliding_window(fields: Fields, default: int | None) -> int | None:
    """Return the config's window, None where it has none."""
    return fields.integer_or_none("sliding_window", default, most=LARGEST_POSITION)


def windows_of(window: int | None, windowed: list[bool]) -> list[int | None]:
    """Return the sliding window of each layer, None where attention is full.

    Raises:
      UserError: layers with a window, and no window.
    """
    if window is None and any(windowed):
        raise UserError("config.json: layer_types names 'sliding_attention', but no sliding_window is in use")
    return [window if each else None for each in windowed]
