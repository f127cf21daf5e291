"""What a Hugging Face config.json of BERT, RoBERTa or XLM-R says that the encoder needs to know."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from neuroada_jax.errors import UserError
from neuroada_jax.models import layers

# Every linear map of a layer, as in the published scripts.
ENCODER_TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Static description of an encoder; letters of docs/design.md in brackets.

    `first_position` is the row of the position embedding that the first token gets: 0 for BERT, and for RoBERTa the row
    behind that of the padding token.
    """

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # H
    num_labels: int
    position_rows: int
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
        """The longest row, in tokens."""
        return self.position_rows - self.first_position

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], dtype: Any = jnp.float32) -> "EncoderConfig":
        """Reads a Hugging Face config.json of model_type bert, roberta or xlm-roberta.

        Raises:
          UserError: a field is missing or holds what this implementation does not know.
        """
        bert = config["model_type"] == "bert"

        def need(field: str) -> int:
            if not isinstance(config.get(field), int) or config[field] < 1:
                raise UserError(f"config.json: {field} must be a whole number above 0, found {config.get(field)!r}")
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
            position_rows=need("max_position_embeddings"),
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
    """How many numbers a head gives: one for regression, else one for each class of `id2label` (2 if there is none).

    Raises:
      UserError: no label, or a problem_type that is not supported or does not fit the number of labels.
    """
    found = config.get("id2label")
    count = len(found) if isinstance(found, Mapping) else config.get("num_labels", 2)
    if not isinstance(count, int) or count < 1:
        raise UserError(f"config.json: id2label must name at least one label, found {found!r}")
    problem = config.get("problem_type")
    fitting = (None, "regression") if count == 1 else (None, "single_label_classification")
    if problem not in fitting:
        raise UserError(
            f"config.json: problem_type {problem!r} with {count} label(s) is not supported; expected {fitting[1]!r}"
        )
    return count


def with_labels(config: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """The Hugging Face config with a head for these labels; one label means regression."""
    return {key: value for key, value in config.items() if key != "num_labels"} | {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": "regression" if len(labels) == 1 else "single_label_classification",
    }
