"""How a config's training rows become examples, in figures: tokens, lengths, counts and steps; no weights are read."""

import dataclasses
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from neuroada_jax import console
from neuroada_jax.data.examples import Examples, LabelledExamples
from neuroada_jax.pretrained import prompt_form, source
from neuroada_jax.pretrained.load import OpenedModel, open_with_tokenizer
from neuroada_jax.pretrained.token_texts import token_texts
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.preparation import PreparedRows, prepare_rows

BINS = 10  # of the histogram, at most
SPLIT_PLACES = 5  # places of split chats that are named


class Example(NamedTuple):
    """One example.

    Attributes:
      place: file and line, or row, of the row that it came from.
      tokens: the text of every token.
      ids: of the tokens.
      is_label: whether each token is learnt; None where the example has a label instead.
      label: of an encoder's example: a name, a list of names or a number.
      turn: (number, of how many), where a chat was split into several examples.
    """

    place: str
    tokens: list[str]
    ids: list[int]
    is_label: list[bool] | None = None
    label: str | list[str] | float | None = None
    turn: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields that this kind of example has."""
        fields: dict[str, Any] = {"place": self.place, "tokens": self.tokens, "ids": self.ids}
        fields |= {"label": self.label} if self.is_label is None else {"is_label": self.is_label}
        return fields if self.turn is None else {**fields, "turn": list(self.turn)}


class Bin(NamedTuple):
    """A bar of the histogram.

    Attributes:
      first: the least number of tokens.
      last: the greatest.
      examples: how many have so many tokens.
    """

    first: int
    last: int
    examples: int


@dataclasses.dataclass(frozen=True)
class Preview:
    """What a config makes of its training rows.

    Attributes:
      examples: the first few.
      lengths: tokens of every example.
      counts: rows, examples, tokens and what happened to them.
      label_counts: of an encoder's classes: examples of each; empty for others.
      split_places: places of the first few chats that became several examples.
      prompt: the prompt form as adapters record it, without the text of its template.
      shapes: (T, M) of the steps that can be compiled.
      batch_size: rows of a batch.
      packing: rows and filled share of packed rows; None where they are not packed.
      validation: rows, examples and steps of a validation; None where there is none.
      steps_per_epoch: updates of a pass over the data.
      total_steps: of the whole run.
      messages: what the training would say of these rows.
    """

    examples: list[Example]
    lengths: Int32[np.ndarray, "n"]
    counts: dict[str, Any]
    label_counts: dict[str, int]
    split_places: list[str]
    prompt: dict[str, Any]
    shapes: list[tuple[int, int]]
    batch_size: int
    packing: dict[str, Any] | None
    validation: dict[str, int] | None
    steps_per_epoch: int
    total_steps: int
    messages: list[str]

    def statistics(self) -> dict[str, int | float]:
        """Return the least, middle, mean, 95 % and greatest length."""
        return {
            "min": int(self.lengths.min()),
            "median": float(np.median(self.lengths)),
            "mean": float(self.lengths.mean()),
            "p95": float(np.percentile(self.lengths, 95)),
            "max": int(self.lengths.max()),
        }

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON has it."""
        return {
            "examples": [example.to_json() for example in self.examples],
            "lengths": {**self.statistics(), "histogram": [each._asdict() for each in histogram(self.lengths)]},
            "counts": self.counts,
            "label_counts": self.label_counts,
            "split_chats": self.split_places,
            "prompt": self.prompt,
            "shapes": [list(shape) for shape in self.shapes],
            "packing": self.packing,
            "validation": self.validation,
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total_steps,
        }


def histogram(lengths: Int32[np.ndarray, "n"]) -> list[Bin]:
    """Return the numbers of examples in bins of equal width, the last perhaps narrower."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = -(-(longest - shortest + 1) // BINS)
    edges = range(shortest, longest + 1, width)
    counts = np.bincount((lengths - shortest) // width, minlength=len(edges)).tolist()
    return [Bin(edge, min(edge + width - 1, longest), count) for edge, count in zip(edges, counts, strict=True)]


def preview(config: RunConfig, count: int = 3) -> Preview:
    """Read and tokenise a config's rows, as a run would; neither its output directory nor weights are looked at.

    Args:
      config: the run; of several seeds, the first.
      count: examples that are shown.

    Raises:
      UserError: what `preparation.prepare_rows` refuses, or a model or tokenizer that cannot be opened.
    """
    if config.seeds:
        config = dataclasses.replace(config, seed=config.seeds[0], seeds=None)
    with console.collected() as messages:
        prepared = prepare_rows(config, _without_weights(config))
    batches, examples = prepared.batches, prepared.batches.examples
    numbers, parts = np.unique(examples.row_numbers, return_counts=True)
    split = numbers[parts > 1][:SPLIT_PLACES].tolist()
    tokens = int(examples.lengths.sum())
    packing = None
    if batches.packed:
        length = config.data.max_length
        packing = {"rows": batches.row_count, "length": length, "filled": tokens / (batches.row_count * length)}
    validation = None
    if prepared.validation is not None:
        held_back = prepared.validation.batches
        rows = len(np.unique(held_back.examples.row_numbers)) + held_back.examples.dropped
        validation = {"rows": rows, "examples": len(held_back.examples), "steps": held_back.steps_per_epoch}
    form, is_decoder = prepared.objective.form, prepared.opened.model.architecture.is_decoder
    return Preview(
        examples=[_example(prepared, i) for i in range(min(count, len(examples)))],
        lengths=examples.lengths,
        counts=_counts(prepared),
        label_counts=_label_counts(prepared),
        split_places=[prepared.rows.where(number) for number in split],
        prompt={k: v for k, v in prompt_form.to_json(form, is_decoder=is_decoder).items() if k != "template"},
        shapes=batches.shapes,
        batch_size=batches.batch_size,
        packing=packing,
        validation=validation,
        steps_per_epoch=batches.steps_per_epoch,
        total_steps=prepared.total_steps,
        messages=messages,
    )


def _without_weights(config: RunConfig) -> tuple[OpenedModel, Any]:
    """Open the model and its tokenizer; of a hub id, no weights are downloaded."""
    files = [pattern for pattern in source.HUB_FILES if pattern != "*.safetensors"]
    path = source.resolve(config.model.path, files)
    opened, tokenizer = open_with_tokenizer(path, config.model.dtype, config_only=True, quantization_of=config.model.held)
    return OpenedModel(opened.model, path, config.model.path), tokenizer


def _example(prepared: PreparedRows, index: int) -> Example:
    examples = prepared.batches.examples
    ids, row = examples.example(index)[0].tolist(), int(examples.row_numbers[index])
    found = Example(prepared.rows.where(row), token_texts(prepared.tokenizer, ids), ids)
    if isinstance(examples, LabelledExamples):
        return found._replace(label=_label(prepared, examples.labels[index]))
    first, last = np.searchsorted(examples.row_numbers, [row, row + 1]).tolist()
    turn = (index - first + 1, last - first) if last - first > 1 else None
    return found._replace(is_label=examples.example(index)[1].tolist(), turn=turn)


def _label(prepared: PreparedRows, label: Any) -> str | list[str] | float:
    """Return an encoder's label in words, or the number of a regression."""
    if isinstance(label, np.ndarray):
        names = _names(prepared)
        return [names[i] for i in np.flatnonzero(label).tolist()]
    return float(label) if isinstance(label, np.floating) else _names(prepared)[int(label)]


def _names(prepared: PreparedRows) -> list[str]:
    """Return the names of the classes in the order of the classifier's outputs."""
    names = prepared.opened.model.hf_config["id2label"]
    return [names[str(number)] for number in range(len(names))]


def _label_counts(prepared: PreparedRows) -> dict[str, int]:
    examples = prepared.batches.examples
    if not isinstance(examples, LabelledExamples) or (examples.labels.ndim == 1 and examples.labels.dtype != np.int32):
        return {}
    counts = Counter[int](
        np.nonzero(examples.labels)[1].tolist() if examples.labels.ndim == 2 else examples.labels.tolist()
    )
    return {name: counts[number] for number, name in enumerate(_names(prepared))}


def _counts(prepared: PreparedRows) -> dict[str, Any]:
    examples = prepared.batches.examples
    found = {"rows": len(prepared.rows), "examples": len(examples), "tokens": int(examples.lengths.sum())}
    if not isinstance(examples, Examples):
        return {**found, "truncated": examples.truncated, "dropped": examples.dropped}
    return {
        **found,
        "labels": int(examples.label_counts.sum()),
        "truncated": examples.truncated,
        "dropped": examples.dropped,
        "split_rows": examples.split_rows,
        "crossings": examples.crossings,
        "unended": examples.unended,
        "foreign_tokens": list(examples.foreign_tokens),
    }
