"""Objectives of decoders and encoders: their data, losses and scorers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array

from neuroada_jax import console
from neuroada_jax.data.batches import AnyBatches, Batches, ClassificationBatches
from neuroada_jax.data.examples import encode
from neuroada_jax.data.prompts import PromptStyle
from neuroada_jax.data.rows import Rows, load_rows
from neuroada_jax.errors import UserError
from neuroada_jax.evaluation import classification, continuation
from neuroada_jax.evaluation.scoring import Scorer
from neuroada_jax.models.losses import classification_losses, label_losses
from neuroada_jax.pretrained.load import OpenedModel
from neuroada_jax.tasks import GLUE, TASKS, Task, overlap, read_rows
from neuroada_jax.training import modules
from neuroada_jax.training.config import DataSection, EvaluationSet, RunConfig


@runtime_checkable
class Objective(Protocol):
    """The data, the loss and the scorers of a run.

    Attributes:
      losses: as `step.make_step` takes them.
      dropout_seed: as `step.make_step` takes it.
    """

    @property
    def losses(self) -> Callable[..., Array]: ...

    @property
    def dropout_seed(self) -> int | None: ...

    def evaluation_rows(self, each: EvaluationSet) -> Rows:
        """Read the rows of an evaluation set.

        Raises:
          UserError: see `tasks.read_rows`.
        """

    def training_rows(self, held_out: Mapping[str, Rows], rows: Rows | None = None) -> Rows:
        """Return the training rows.

        Args:
          held_out: the rows of every evaluation set, for `data.drop_overlap`.
          rows: training rows in memory; None: read those of `data.train`.

        Raises:
          UserError: rows that do not fit the task, or none left.
        """

    def scorer(self, each: EvaluationSet, rows: Rows, base_model: OpenedModel, tokenizer: Any) -> Scorer:
        """Validate and tokenise rows of an evaluation set, so that none can stop the scoring after the training.

        Raises:
          UserError: rows that do not fit their task or the model's positions.
        """

    def batches(self, rows: Rows, tokenizer: Any) -> AnyBatches:
        """Tokenise the training rows.

        Raises:
          UserError: rows that do not fit the task, or none with a label within `data.max_length`.
        """


def objective(config: RunConfig, base_model: OpenedModel) -> tuple[Objective, OpenedModel]:
    """Return the run's objective, and the opened model with the classifier that it needs.

    Raises:
      UserError: the config asks a decoder for a feature of encoders, or the reverse.
    """
    modules.check_kind(config, base_model.model)
    if base_model.model.architecture.is_decoder:
        return Continuation(config), base_model
    task = GLUE[config.data.task]
    classes = classification.classes_to_train(base_model, task)
    labels = [task.labels[classes.index(number)] for number in range(len(classes))]
    return Classification(config, classes), base_model.with_labels(labels)


def _training_rows(section: DataSection, rows: Rows | None) -> Rows:
    """Return the first `data.limit` of the rows in memory, or of those of `data.train`."""
    if rows is None:
        return load_rows(section.train, section.split, section.limit)
    if not rows.rows:
        raise UserError(f"{rows.source}: no rows, expected at least one")
    return Rows(rows.rows[: section.limit], rows.source, rows.places[: section.limit])


class Continuation:
    """The objective of a decoder: it learns to continue prompts, and is scored by its answers."""

    losses = staticmethod(label_losses)
    dropout_seed = None

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._trained_on: frozenset[str] = frozenset()  # the questions of the training rows

    def batches(self, rows: Rows, tokenizer: Any) -> AnyBatches:
        """See `Objective`."""
        config = self._config
        style = PromptStyle(config.data.style or TASKS[config.data.task].style)
        with console.bar("tokenising") as shown:
            examples = encode(rows, style, tokenizer, config.data.max_length, console.reporter(shown))
        console.say(
            f"{len(examples)} examples of {len(rows)} rows, {int(examples.lengths.sum())} tokens, "
            f"{int(examples.label_counts.sum())} of them labels; {examples.truncated} truncated to "
            f"{config.data.max_length} tokens, {examples.dropped} dropped since they lost all labels"
        )
        batches = Batches(
            examples,
            config.training.batch_size,
            config.seed,
            config.data.buckets,
            config.data.group_by_length,
            packed_length=config.data.max_length if config.data.packing else None,
        )
        if config.data.packing:
            filled = int(examples.lengths.sum()) / (batches.row_count * config.data.max_length)
            console.say(
                f"packed into {batches.row_count} rows of {config.data.max_length} tokens: "
                f"{len(examples) / batches.row_count:.1f} examples a row, {100 * filled:.1f} % of it tokens"
            )
        return batches

    def training_rows(self, held_out: Mapping[str, Rows], rows: Rows | None = None) -> Rows:
        """Return the rows in their task's form, without those that `data.drop_overlap` drops; see `Objective`."""
        rows = self._without_overlap(held_out, rows)
        self._trained_on = overlap.questions(rows.rows)
        return rows

    def _without_overlap(self, held_out: Mapping[str, Rows], rows: Rows | None) -> Rows:
        section = self._config.data
        rows = continuation.convert(_training_rows(section, rows), TASKS[section.task])
        if not section.drop_overlap:
            return rows
        asked: set[str] = set()
        for each in self._config.evaluation.sets:
            asked |= overlap.questions(continuation.convert(held_out[each.name], self._task(each)).rows)
        kept = [i for i, row in enumerate(rows.rows) if overlap.question(row) not in asked]
        if not kept:
            raise UserError(
                f"{rows.source}: every row's question is in an evaluation set, so that data.drop_overlap leaves none"
            )
        console.say(f"dropped {len(rows) - len(kept)} of {len(rows)} rows, whose question is in an evaluation set")
        return rows.part(kept)

    def _task(self, each: EvaluationSet) -> Task:
        return TASKS[each.task or self._config.data.task]

    def evaluation_rows(self, each: EvaluationSet) -> Rows:
        """See `Objective`."""
        return read_rows(self._task(each), each.data, each.split, each.limit)

    def scorer(self, each: EvaluationSet, rows: Rows, base_model: OpenedModel, tokenizer: Any) -> Scorer:
        """See `Objective`; after `training_rows`, whose questions are scored separately."""
        options = continuation.Options(
            self._style(each),
            each.method,
            each.max_new_tokens,
            each.generation,
            self._config.evaluation.batch_size,
            self._trained_on,
        )
        return continuation.ContinuationScorer.prepare(base_model, tokenizer, rows, self._task(each), options)

    def _style(self, each: EvaluationSet) -> PromptStyle:
        """Return the set's own style, else the training data's if task or suite are the same, else the task's."""
        section = self._config.data
        task, trained = self._task(each), TASKS[section.task]
        related = task is trained or (task.suite is not None and task.suite == trained.suite)
        return PromptStyle(each.style or (section.style if related else None) or task.style)


class Classification:
    """The objective of an encoder: the labels of one GLUE task, with dropout; it is scored by the task's metric."""

    losses = staticmethod(classification_losses)

    def __init__(self, config: RunConfig, classes: Sequence[int]) -> None:
        """`classes`: the classifier's class for each of the task's labels."""
        self._config = config
        self._task = GLUE[config.data.task]
        self._classes = np.array(classes, np.int32)
        self.dropout_seed = config.seed

    def training_rows(self, held_out: Mapping[str, Rows], rows: Rows | None = None) -> Rows:
        """See `Objective`."""
        return _training_rows(self._config.data, rows)

    def batches(self, rows: Rows, tokenizer: Any) -> AnyBatches:
        """See `Objective`."""
        section = self._config.data
        with console.bar("tokenising") as shown:
            examples = classification.encode(rows, self._task, tokenizer, section.max_length, console.reporter(shown))
        console.say(
            f"{len(examples)} examples, {int(examples.lengths.sum())} tokens; "
            f"{examples.truncated} truncated to {section.max_length} tokens"
        )
        if not self._task.is_regression:
            examples = dataclasses.replace(examples, labels=self._classes[examples.labels])
        config = self._config
        return ClassificationBatches(
            examples, config.training.batch_size, config.seed, section.buckets, section.group_by_length
        )

    def evaluation_rows(self, each: EvaluationSet) -> Rows:
        """See `Objective`."""
        return read_rows(self._task, each.data, each.split, each.limit)

    def scorer(self, each: EvaluationSet, rows: Rows, base_model: OpenedModel, tokenizer: Any) -> Scorer:
        """See `Objective`."""
        return classification.ClassificationScorer.prepare(
            base_model,
            tokenizer,
            rows,
            self._task,
            max_length=self._config.data.max_length,
            batch_size=self._config.evaluation.batch_size,
        )
