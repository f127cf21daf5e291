"""Scoring an encoder on rows with labels: predictions, the task's metric, and what stands beside it."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import transformers
from flax import linen as nn
from jaxtyping import Array, Float, Num

from neuroada_jax import console
from neuroada_jax.adapters import native
from neuroada_jax.core.trees import Tree
from neuroada_jax.data.batches import ClassificationBatch, ClassificationBatches
from neuroada_jax.data.examples import LabelledExamples, encode_labelled
from neuroada_jax.data.rows import Rows
from neuroada_jax.errors import UserError
from neuroada_jax.evaluation import metrics
from neuroada_jax.evaluation.scoring import Score, wilson_interval
from neuroada_jax.models.losses import classification_logits
from neuroada_jax.pretrained.load import OpenedModel
from neuroada_jax.tasks import GlueTask

Progress = Callable[[int, int], None]


def encode(
    rows: Rows,
    task: GlueTask,
    tokenizer: transformers.PreTrainedTokenizerBase,
    max_length: int,
    on_progress: Progress | None = None,
) -> LabelledExamples:
    """The rows of a task as an encoder reads them, in row order.

    Raises:
      UserError: rows that do not fit the task; see also `labelled.encode_labelled`.
    """
    texts, labels = zip(*(task.convert(row, rows.where(i)) for i, row in enumerate(rows.rows)), strict=True)
    dtype = np.float32 if task.is_regression else np.int32
    return encode_labelled(texts, np.array(labels, dtype), tokenizer, max_length, on_progress)


def evaluate(
    base_model: OpenedModel,
    params: Tree,
    tokenizer: transformers.PreTrainedTokenizerBase,
    rows: Rows,
    task: GlueTask,
    *,
    max_length: int,
    batch_size: int = 16,
    on_progress: Progress | None = None,
) -> Score:
    """Scores `rows` with plain (base or merged) parameters, nothing dropped.

    Args:
      base_model: architecture and config; its head must have the task's labels.
      params: what to score.
      tokenizer: of the base.
      rows: raw rows of the task.
      task: columns, labels and metrics.
      max_length: longer examples are cut to it.
      batch_size: examples at a time.
      on_progress: called with (batches done, in all).

    Raises:
      UserError: rows that do not fit the task, or a head with other labels.
    """
    columns = label_classes(base_model, task)
    examples = encode(rows, task, tokenizer, max_length)
    if examples.cut:
        console.say(f"{rows.source}: {examples.cut} of {len(rows)} examples cut to {max_length} tokens")
    outputs = predict(base_model, params, examples, batch_size, on_progress)[:, columns]
    values, n = figures(outputs, examples.labels, task), len(examples)
    found = _found(outputs, task)
    intervals = {name: _interval(name, value, found, examples.labels) for name, value in values.items()}
    beside = {name: values[name] for name in task.beside}
    predictions = [_prediction(rows.rows[i], task, outputs[i], examples.labels[i]) for i in range(n)]
    beside_intervals = {name: intervals[name] for name in task.beside}
    return Score(
        values[task.metric],
        n,
        intervals[task.metric],
        predictions,
        task.metric,
        beside,
        beside_intervals=beside_intervals,
    )


def figures(outputs: Float[np.ndarray, "n labels"], labels: Num[np.ndarray, "n"], task: GlueTask) -> dict[str, float]:
    """The task's metric and those beside it, by name, of a head's outputs."""
    found = _found(outputs, task)
    return {name: metrics.METRICS[name](found, labels) for name in (task.metric, *task.beside)}


def _found(outputs: Float[np.ndarray, "n labels"], task: GlueTask) -> Num[np.ndarray, "n"]:
    """The classes, or for regression the numbers, that a head's outputs say."""
    # A correlation of nearly equal numbers needs more digits than float32 has.
    return outputs[:, 0].astype(np.float64) if task.is_regression else outputs.argmax(axis=1)


def _interval(
    metric: str, value: float, found: Num[np.ndarray, "n"], labels: Num[np.ndarray, "n"]
) -> tuple[float, float] | None:
    """The 95 % interval of a metric's value."""
    if metric == "accuracy":
        return wilson_interval(round(value * len(labels)), len(labels))
    return metrics.interval(metric, found, labels)


def label_classes(base_model: OpenedModel, task: GlueTask) -> list[int]:
    """Which output of the model's head each of the task's labels is.

    Names are compared by their letters and digits, in any case. A head without names of its own, such as LABEL_0 and
    LABEL_1, is taken to have the task's order, and a single number is regression whatever its name.

    Raises:
      UserError: a head with another number of labels, or with other names.
    """
    names, count = native.classifier_labels(base_model) or [], base_model.model.config.num_labels
    if count != len(task.labels):
        raise UserError(
            f"task {task.name!r} has {len(task.labels)} label(s) ({', '.join(task.labels)}), "
            f"and the head of {base_model.source} has {count}"
        )
    if task.is_regression:
        return [0]
    found = [_plain(name) for name in names]
    for known in (task.labels, [f"LABEL_{number}" for number in range(count)], [str(number) for number in range(count)]):
        wanted = [_plain(name) for name in known]
        if sorted(found) == sorted(wanted):
            return [found.index(name) for name in wanted]
    raise UserError(
        f"task {task.name!r} has the labels {', '.join(task.labels)}, "
        f"and the head of {base_model.source} tells apart {', '.join(map(str, names))}"
    )


def classes_to_train(base_model: OpenedModel, task: GlueTask) -> list[int]:
    """The outputs that a run trains for the task's labels: those of a head for this task, which may have its own order
    (roberta-large-mnli begins with contradiction), else the task's order."""
    try:
        return label_classes(base_model, task)
    except UserError:  # a head for something else, of which only what fits is used
        return list(range(len(task.labels)))


def _plain(name: Any) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def _prediction(row: dict[str, Any], task: GlueTask, outputs: np.ndarray, label: Any) -> dict[str, Any]:
    """One line of the predictions' file."""
    texts = {column: row[column] for column in task.texts}
    if task.is_regression:
        return {**texts, "prediction": float(outputs[0]), "answer": float(label)}
    found = int(outputs.argmax())
    return {
        **texts,
        "prediction": task.labels[found],
        "answer": task.labels[label],
        "correct": bool(found == label),
        "logits": [round(float(number), 6) for number in outputs],
    }


def predict(
    base_model: OpenedModel,
    params: Tree,
    examples: LabelledExamples,
    batch_size: int,
    on_progress: Progress | None = None,
) -> np.ndarray:
    """float32 (n, labels): the head's logits of every example, or its number, in row order."""
    batches = ClassificationBatches(examples, batch_size, seed=0, group_by_length=True, shuffle=False)
    module = base_model.model.module()
    outputs = np.zeros((len(examples), base_model.model.config.num_labels), np.float32)
    for index in range(batches.steps_per_epoch):
        numbers = batches.rows(0, index)
        outputs[numbers] = np.asarray(_logits(module, params, batches.batch(0, index)))[: len(numbers)]
        if on_progress:
            on_progress(index + 1, batches.steps_per_epoch)
    return outputs


@functools.partial(jax.jit, static_argnames="module")
def _logits(module: nn.Module, params: Tree, batch: ClassificationBatch) -> Float[Array, "B labels"]:
    return classification_logits(module, {"params": params}, batch)
