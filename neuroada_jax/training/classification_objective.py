"""The objective of an encoder: its task on labelled texts, its data with class weights, its loss and its scorers."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from neuroada_jax import console
from neuroada_jax.data.batches import AnyBatches, ClassificationBatches
from neuroada_jax.data.examples import LabelledExamples
from neuroada_jax.data.prompts import PromptForm
from neuroada_jax.data.rows import Rows
from neuroada_jax.errors import UserError
from neuroada_jax.evaluation import classification
from neuroada_jax.evaluation.scoring import Scorer
from neuroada_jax.models import Labels
from neuroada_jax.models.losses import classification_losses
from neuroada_jax.pretrained.load import OpenedModel
from neuroada_jax.tasks import GLUE, OWN, ClassificationTask, read_rows
from neuroada_jax.tasks.classification import LABEL, TEXT, Problem, check_trainable, labels_of, own_task
from neuroada_jax.tasks.labels import listed, name_of
from neuroada_jax.training.config import DataSection, EvaluationSet, RunConfig


def objective(config: RunConfig, base_model: OpenedModel, read: Callable[[], Rows]) -> tuple["Classification", OpenedModel]:
    """Return the run's objective, and the opened model with the classifier that it needs.

    Args:
      config: the run.
      base_model: an opened encoder.
      read: returns the training rows.

    Raises:
      UserError: labels that are to be found in rows which have none.
    """
    task, rows = _task(config.data, read)
    classes = classification.classes_to_train(base_model, task)
    names = tuple(task.labels[classes.index(number)] for number in range(len(classes)))
    found = Classification(config, task, np.array(classes, np.int32), read if rows is None else lambda: rows)
    return found, base_model.with_labels(Labels(names, task.is_multilabel))


def _task(section: DataSection, read: Callable[[], Rows]) -> tuple[ClassificationTask, Rows | None]:
    """Return the task, and the training rows where its labels had to be found in them."""
    if section.task not in OWN:
        return GLUE[section.task], None
    problem, rows = Problem(section.task), None
    texts = (section.text,) if isinstance(section.text, str) else tuple(section.text or (TEXT,))
    label: str | None = section.label or LABEL
    if problem is Problem.REGRESSION:
        labels: tuple[str, ...] = (label or LABEL,)
    elif section.labels == "auto":
        rows = read()
        labels = labels_of(rows, problem, label or LABEL)
    else:
        labels = tuple(name_of(each, "data.labels") for each in section.labels)
        label = section.label if problem is Problem.MULTILABEL else label
    return own_task(problem, texts, label, labels, section.metric), rows


class Classification:
    """The objective of an encoder: labels of texts, with dropout; it is scored by the task's metrics."""

    losses = staticmethod(classification_losses)

    def __init__(
        self, config: RunConfig, task: ClassificationTask, classes: Int32[np.ndarray, "labels"], read: Callable[[], Rows]
    ) -> None:
        """Take the run, its task, the classifier's class for each of the task's labels, and what reads the rows."""
        self._config, self.task, self._classes, self._read = config, task, classes, read
        self.dropout_seed = config.seed
        self._weights: Float32[np.ndarray, labels] | None = None  # of the classes, once the training rows are read
        own = task.name in OWN
        columns: dict[str, Any] = {"text": task.texts, "label": task.label, "metric": task.metric} if own else {}
        self.form = PromptForm(task=task.name, **columns)

    def training_rows(self, held_out: Mapping[str, Rows], rows: Rows | None = None) -> Rows:
        """See `Objective`."""
        return self._read()

    def batches(self, rows: Rows, tokenizer: Any) -> AnyBatches:
        """See `Objective`."""
        section, config, task = self._config.data, self._config, self.task
        with console.bar("tokenising") as shown:
            examples = classification.encode(rows, task, tokenizer, section.max_length, console.reporter(shown))
        if task.name in OWN:
            check_trainable(rows, examples.labels, task)
            if not task.is_regression:
                console.say(f"{len(task.labels)} labels: {listed(task.labels)}")
        console.say(
            f"{len(examples)} examples, {int(examples.lengths.sum())} tokens; "
            f"{examples.truncated} truncated to {section.max_length} tokens"
        )
        self._weights = class_weights(config.classifier.class_weights, task, examples)
        examples = self._for_classifier(examples)
        return ClassificationBatches(
            examples, config.training.batch_size, config.seed, section.buckets, section.group_by_length
        )

    def _for_classifier(self, examples: LabelledExamples) -> LabelledExamples:
        """Return the examples with class weights, and with labels in the order of the classifier's outputs."""
        if self.task.is_regression:
            return examples
        if self.task.is_multilabel:
            labels = np.zeros_like(examples.labels)
            labels[:, self._classes] = examples.labels
            return dataclasses.replace(examples, labels=labels)
        weights = None if self._weights is None else self._weights[examples.labels]
        return dataclasses.replace(examples, labels=self._classes[examples.labels], weights=weights)

    def classes(self, rows: Rows) -> list[int] | None:
        """See `Objective`."""
        if self.task.problem is not Problem.CLASSIFICATION:
            return None
        return [int(label) for label in self.task.read(rows)[1]]

    def converted(self, rows: Rows) -> Rows:
        """See `Objective`."""
        return rows

    def validation_batches(self, rows: Rows, tokenizer: Any) -> AnyBatches:
        """See `Objective`; the loss has no class weights, so that it does not depend on the share of each class."""
        with console.bar("tokenising") as shown:
            length, report = self._config.data.max_length, console.reporter(shown)
            examples = classification.encode(rows, self.task, tokenizer, length, report)
        examples = dataclasses.replace(self._for_classifier(examples), weights=None)
        return ClassificationBatches(
            examples, self._config.training.batch_size, self._config.seed, group_by_length=True, shuffle=False
        )

    def evaluation_rows(self, each: EvaluationSet) -> Rows:
        """See `Objective`."""
        return read_rows(self.task, each.data, each.split, each.limit, self._config.columns_of(each))

    def scorer(self, each: EvaluationSet, rows: Rows, base_model: OpenedModel, tokenizer: Any) -> Scorer:
        """See `Objective`."""
        return classification.ClassificationScorer.prepare(
            base_model,
            tokenizer,
            rows,
            self.task,
            max_length=self._config.data.max_length,
            batch_size=self._config.evaluation.batch_size,
        )


def class_weights(
    setting: str | Mapping[str, float], task: ClassificationTask, examples: LabelledExamples
) -> Float32[np.ndarray, "labels"] | None:
    """Return the weight of every class, in the task's order; None where all are the same.

    The loss of a step is the weighted mean, as that of PyTorch's CrossEntropyLoss with weights, which does not depend on
    their scale. Here the smallest is 1, so that the weights of a step never sum to less.

    Args:
      setting: `classifier.class_weights`.
      task: its labels.
      examples: with labels in the task's order.

    Raises:
      UserError: weights for a task other than one of several classes, or for a label that it lacks.
    """
    if setting == "none":
        return None
    if task.problem is not Problem.CLASSIFICATION:
        raise UserError(f"classifier.class_weights: task {task.name!r} does not have one class an example; remove it")
    if isinstance(setting, str):
        counts = np.bincount(examples.labels, minlength=len(task.labels))
        by_class = len(examples) / (len(task.labels) * np.maximum(counts, 1))
    else:
        unknown = [name for name in setting if name not in task.labels]
        if unknown:
            raise UserError(f"classifier.class_weights: no label {unknown[0]!r}, expected labels of {listed(task.labels)}")
        by_class = np.array([setting.get(name, 1.0) for name in task.labels])
    return (by_class / by_class.min()).astype(np.float32)
