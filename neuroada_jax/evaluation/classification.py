"""Scoring an encoder on labelled rows: predictions, the task's metric, and the further metrics that are reported."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import transformers
from flax import linen as nn
from jaxtyping import Array, Float, Float32, Int32, Num, Shaped

from neuroada_jax import console
from neuroada_jax.adapters import on_base
from neuroada_jax.core.trees import Tree, on_host
from neuroada_jax.data.batches import ClassificationBatch, ClassificationBatches
from neuroada_jax.data.examples import LabelledExamples, encode_labelled
from neuroada_jax.data.rows import Rows
from neuroada_jax.errors import UserError
from neuroada_jax.evaluation import metrics
from neuroada_jax.evaluation.class_report import ClassReport
from neuroada_jax.evaluation.scoring import Progress, Score
from neuroada_jax.models.labels import MULTILABEL
from neuroada_jax.models.losses import classification_logits
from neuroada_jax.pretrained.load import OpenedModel
from neuroada_jax.tasks import ClassificationTask


@dataclass(frozen=True)
class ClassificationScorer:
    """Validated and tokenised rows of a task on labelled texts (see `scoring.Scorer`).

    Attributes:
      rows: raw rows of the task.
      task: fields, labels and metrics.
      examples: the rows as token ids, none dropped.
      classes: for each of the task's labels, the index of its class in the model's classifier.
      batch_size: examples at a time.
    """

    rows: Rows
    task: ClassificationTask
    examples: LabelledExamples
    classes: list[int]
    batch_size: int

    @classmethod
    def prepare(
        cls,
        base_model: OpenedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        rows: Rows,
        task: ClassificationTask,
        *,
        max_length: int,
        batch_size: int = 16,
    ) -> "ClassificationScorer":
        """Validate and tokenise raw rows of a task, and report how many were truncated. Needs no weights.

        Args:
          base_model: architecture and config; its classifier must have the task's labels.
          tokenizer: the base model's.
          rows: raw rows of the task.
          task: fields, labels and metrics.
          max_length: longer examples are truncated to this many tokens.
          batch_size: examples at a time.

        Raises:
          UserError: rows that do not fit the task, or a classifier with other labels.
        """
        examples = encode(rows, task, tokenizer, max_length)
        classes = label_classes(base_model, task)
        if examples.truncated:
            console.say(f"{rows.source}: {examples.truncated} of {len(rows)} examples truncated to {max_length} tokens")
        return cls(rows, task, examples, classes, batch_size)

    def predict(
        self, base_model: OpenedModel, params: Tree, numbers: Sequence[int], on_progress: Progress | None = None
    ) -> list[Any]:
        """Return the logits of the task's labels for some rows; see `Scorer.predict`."""
        if not numbers:
            return []
        part = self.examples if len(numbers) == len(self.examples) else self.examples.part(numbers)
        logits = predict(base_model, params, part, self.batch_size, on_progress)
        return list(logits[:, self.classes].tolist())

    def judge(self, found: list[Any]) -> Score:
        """Return the score of all logits; see `Scorer.judge`."""
        task, labels, logits = self.task, self.examples.labels, np.asarray(found, np.float32)
        values, decided = figures(logits, labels, task), _decisions(logits, task)
        expected = labels > 0 if task.is_multilabel else labels
        intervals = {name: metrics.interval(name, decided, expected) for name in values}
        return Score(
            values[task.metric],
            len(labels),
            intervals[task.metric],
            [_prediction(row, task, logits[i], labels[i]) for i, row in enumerate(self.rows.rows)],
            task.metric,
            beside={name: values[name] for name in task.beside},
            beside_intervals={name: intervals[name] for name in task.beside},
            classes=_class_report(decided, expected, task),
        )


def encode(
    rows: Rows,
    task: ClassificationTask,
    tokenizer: transformers.PreTrainedTokenizerBase,
    max_length: int,
    on_progress: Progress | None = None,
) -> LabelledExamples:
    """Tokenise the rows of a task for an encoder, in row order.

    Raises:
      UserError: rows that do not fit the task; see also `examples.encode_labelled`.
    """
    texts, labels = task.read(rows)
    return encode_labelled(texts, labels, tokenizer, max_length, on_progress)


def figures(
    logits: Float[np.ndarray, "n labels"], labels: Num[np.ndarray, "n *labels"], task: ClassificationTask
) -> dict[str, float]:
    """Return the task's metric and those reported beside it, by name."""
    found, names = _decisions(logits, task), (task.metric, *task.beside)
    if task.is_multilabel:
        return {name: metrics.SEVERAL_LABELS[name](found, labels > 0) for name in names}
    return {name: metrics.METRICS[name](found, labels) for name in names}


def _decisions(logits: Float[np.ndarray, "n labels"], task: ClassificationTask) -> Shaped[np.ndarray, "n *labels"]:
    """Return the most likely labels, for regression the predicted numbers, or which of several labels are likely."""
    if task.is_multilabel:
        return logits > 0  # a probability above 0.5
    # A correlation of nearly equal numbers needs more digits than float32 has.
    return logits[:, 0].astype(np.float64) if task.is_regression else logits.argmax(axis=1)


def _class_report(found: np.ndarray, expected: np.ndarray, task: ClassificationTask) -> ClassReport | None:
    if task.is_regression or not task.detailed:
        return None
    return (ClassReport.of_several if task.is_multilabel else ClassReport.of_classes)(found, expected, task.labels)


def label_classes(base_model: OpenedModel, task: ClassificationTask) -> list[int]:
    """Return, for each of the task's labels, the index of its class in the model's classifier.

    Where names are not equal, they are compared by their letters and digits, case-insensitively. A classifier without names
    of its own, such as LABEL_0 and LABEL_1, is assumed to have the task's order, and a single class is regression whatever
    its name.

    Raises:
      UserError: a classifier with another number of classes, with other names, or for one label an example rather than
        several.
    """
    names, count = on_base.classifier_labels(base_model) or [], base_model.model.config.num_labels
    if count != len(task.labels):
        raise UserError(
            f"task {task.name!r} has {len(task.labels)} label(s) ({', '.join(task.labels)}), "
            f"and the classifier of {base_model.source} has {count}"
        )
    if task.is_regression != (count == 1):
        learnt = "a number" if task.is_regression else "classes"
        raise UserError(
            f"task {task.name!r} is about {learnt}, and the classifier of {base_model.source} has {count} label(s)"
        )
    if task.is_regression:
        return [0]
    if is_multilabel(base_model) != task.is_multilabel:
        several, one = "any number of labels an example", "one label an example"
        wanted, found = (several, one) if task.is_multilabel else (one, several)
        raise UserError(f"task {task.name!r} has {wanted}, and the classifier of {base_model.source} {found}")
    for known in (task.labels, [f"LABEL_{number}" for number in range(count)], [str(number) for number in range(count)]):
        for spelt in (str, _plain):
            have, want = [spelt(name) for name in names], [spelt(name) for name in known]
            if sorted(have) == sorted(want) and len(set(want)) == count:
                return [have.index(name) for name in want]
    raise UserError(
        f"task {task.name!r} has the labels {', '.join(task.labels)}, "
        f"and the classifier of {base_model.source} has {', '.join(map(str, names))}"
    )


def is_multilabel(base_model: OpenedModel) -> bool:
    """Return whether a model's classifier gives an example any number of labels."""
    return base_model.model.hf_config.get("problem_type") == MULTILABEL


def classes_to_train(base_model: OpenedModel, task: ClassificationTask) -> list[int]:
    """Return, for each of the task's labels, the index of the class to train.

    A classifier for this task keeps its own order (roberta-large-mnli begins with contradiction); any other gets the
    task's order.
    """
    try:
        return label_classes(base_model, task)
    except UserError:  # a classifier for another task, of which only the fitting tensors are kept
        return list(range(len(task.labels)))


def _plain(name: Any) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def _prediction(row: dict[str, Any], task: ClassificationTask, logits: np.ndarray, label: Any) -> dict[str, Any]:
    """Return one line of the predictions file."""
    texts = {field: row[field] for field in task.texts}
    if task.is_regression:
        return {**texts, "prediction": float(logits[0]), "answer": float(label)}
    digits = [round(float(number), 6) for number in logits]
    if task.is_multilabel:
        names = [[name for name, there in zip(task.labels, row, strict=True) if there] for row in (logits > 0, label > 0)]
        return {**texts, "prediction": names[0], "answer": names[1], "correct": names[0] == names[1], "logits": digits}
    found = int(logits.argmax())
    return {
        **texts,
        "prediction": task.labels[found],
        "answer": task.labels[label],
        "correct": bool(found == label),
        "logits": digits,
    }


def unlabelled(count: int) -> Int32[np.ndarray, "n"]:
    """Return labels for texts whose labels are not known; predictions do not depend on them."""
    return np.zeros(count, np.int32)


def predict(
    base_model: OpenedModel,
    params: Tree,
    examples: LabelledExamples,
    batch_size: int,
    on_progress: Progress | None = None,
) -> Float32[np.ndarray, "n classes"]:
    """Return the classifier's logits of every example (regression: its number), in row order."""
    batches = ClassificationBatches(examples, batch_size, seed=0, group_by_length=True, shuffle=False)
    module = base_model.model.module()
    logits = np.zeros((len(examples), base_model.model.config.num_labels), np.float32)
    for index in range(batches.steps_per_epoch):
        numbers = batches.row_numbers(0, index)
        logits[numbers] = on_host(_logits(module, params, batches.batch(0, index)))[: len(numbers)]
        if on_progress:
            on_progress(index + 1, batches.steps_per_epoch)
    return logits


@functools.partial(jax.jit, static_argnames="module")
def _logits(module: nn.Module, params: Tree, batch: ClassificationBatch) -> Float[Array, "B classes"]:
    return classification_logits(module, {"params": params}, batch)


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of a text.

    Attributes:
      label: the likeliest label; of several labels the list of those whose probability is above a half; for regression the
        number.
      probability: of the label; of several labels, the list of theirs; for regression None.
      probabilities: of all labels by name, in the classifier's order; for regression empty.
    """

    label: str | float | list[str]
    probability: float | list[float] | None
    probabilities: dict[str, float] = field(default_factory=dict, repr=False)


def predictions(base_model: OpenedModel, logits: Float32[np.ndarray, "n classes"]) -> list[Prediction]:
    """Return what a classifier's outputs mean, in row order."""
    from scipy import special  # takes half a second to import

    outputs = logits.astype(np.float64)
    if base_model.model.config.num_labels == 1:
        return [Prediction(float(each), None) for each in outputs[:, 0]]
    names, several = on_base.classifier_labels(base_model) or [], is_multilabel(base_model)
    shares = special.expit(outputs) if several else special.softmax(outputs, axis=1)
    found = []
    for row in shares.tolist():
        each = dict(zip(names, row, strict=True))
        if several:
            likely = {name: share for name, share in each.items() if share > 0.5}
            found.append(Prediction(list(likely), list(likely.values()), each))
        else:
            best = int(np.argmax(row))
            found.append(Prediction(names[best], row[best], each))
    return found
