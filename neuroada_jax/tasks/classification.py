"""Tasks of encoders: labelled texts. Those of a user's own rows are made here; GLUE's are instances in glue.py."""

import dataclasses
import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num

from neuroada_jax import console
from neuroada_jax.data import rows as data_rows
from neuroada_jax.data.examples import Texts
from neuroada_jax.data.prompts import PromptForm
from neuroada_jax.data.rows import Rows
from neuroada_jax.errors import UserError
from neuroada_jax.tasks import labels as of_rows
from neuroada_jax.tasks.task import Source

TEXT, LABEL = "text", "label"  # columns of own rows, where the config names no others


class Problem(enum.StrEnum):
    """What is learnt of a text; the names are those of the tasks on a user's own rows.

    Attributes:
      CLASSIFICATION: one of several classes.
      REGRESSION: a number.
      MULTILABEL: any number of several classes.
    """

    CLASSIFICATION = "classification"
    REGRESSION = "regression"
    MULTILABEL = "multilabel"


OWN = tuple(problem.value for problem in Problem)
# Metrics of own rows. The first is the main one unless data.metric names another; the others are reported beside it.
OWN_METRICS = {
    Problem.CLASSIFICATION: ("accuracy", "macro_f1", "matthews"),
    Problem.REGRESSION: ("pearson", "spearman", "mse"),
    Problem.MULTILABEL: ("micro_f1", "macro_f1", "accuracy"),
}
LOWER_IS_BETTER = ("mse",)  # cannot choose an epoch


@dataclasses.dataclass(frozen=True)
class ClassificationTask:
    """A task on labelled texts.

    Attributes:
      name: its name in configs.
      texts: the columns of the text, or of the pair of texts.
      labels: the names of the labels in the order of their ids; a single name means regression.
      metric: the main metric, by which the best epoch is chosen.
      beside: further metrics that are reported.
      problem: what is learnt.
      label: the column of the label; None where each label has a column of 0 and 1 under its name.
      by_number: whether rows have the labels' ids; otherwise they have the names.
      limits: the smallest and the largest number of a regression; None: any.
      detailed: whether figures of every class are reported.
      sources: where its rows are: a local folder, then the hub; empty for a user's own rows.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metric: str = "accuracy"
    beside: tuple[str, ...] = ()
    problem: Problem = Problem.CLASSIFICATION
    label: str | None = LABEL
    by_number: bool = False
    limits: tuple[float, float] | None = None
    detailed: bool = True
    sources: tuple[Source, ...] = ()

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number rather than a class."""
        return self.problem is Problem.REGRESSION

    @property
    def is_multilabel(self) -> bool:
        """Whether an example may have several labels."""
        return self.problem is Problem.MULTILABEL

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads."""
        return (*self.texts, *(self.labels if self.label is None else (self.label,)))

    def source(self) -> Source:
        """Return the local source, with the name of its split, where it has the rows; else the hub's.

        Raises:
          UserError: the task has no rows of its own.
        """
        if not self.sources:
            raise UserError(f"task {self.name!r} has no rows of its own; name them in `data`")
        here, hub = self.sources
        found = [split for split in (hub.split, here.split) if data_rows.has_split(Path(here.data), split)]
        return Source(here.data, found[0]) if found else hub

    def texts_of(self, row: Mapping[str, Any], where: str) -> Texts:
        """Return the text of a row, or its pair of texts.

        Raises:
          UserError: a column is missing or not a string; the error names the row's place.
        """
        for column in self.texts:
            of_rows.check_column(row, column, self._named("text"), where)
            if not isinstance(row[column], str):
                raise UserError(f"{where}: column {column!r} is {of_rows.shown(row[column])}, expected text")
        return tuple(row[column] for column in self.texts)

    def convert(self, row: Mapping[str, Any], where: str) -> tuple[Texts, int | float | tuple[int, ...]]:
        """Return (the texts, the label) of a row: an id, a number, or a tuple of 0 and 1 for all labels.

        Raises:
          UserError: as `texts_of`, or the row has no such label.
        """
        return self.texts_of(row, where), self._label(row, where)

    def read(self, rows: Rows) -> tuple[list[Texts], Num[np.ndarray, "n *C"]]:
        """Return the texts and the labels of all rows; integers from 0 may stand for the names of labels, in their order.

        Raises:
          UserError: see `convert`; also labels of two types.
        """
        task = dataclasses.replace(self, by_number=True) if self._has_numbers(rows) else self
        converted = [task.convert(row, rows.where(i)) for i, row in enumerate(rows.rows)]
        if not self.by_number and not self.is_regression and self.label is not None:
            of_rows.check_types(rows, self.label)
        dtype = np.int32 if self.problem is Problem.CLASSIFICATION else np.float32
        return [texts for texts, _ in converted], np.array([label for _, label in converted], dtype)

    def _has_numbers(self, rows: Rows) -> bool:
        """Return whether rows have the numbers of labels whose names are given."""
        if self.problem is not Problem.CLASSIFICATION or self.by_number or self.label is None:
            return False
        if any(of_rows.number_of_label(name) is not None for name in self.labels):
            return False
        return all(of_rows.number_of_label(row.get(self.label)) is not None for row in rows.rows)

    def _label(self, row: Mapping[str, Any], where: str) -> int | float | tuple[int, ...]:
        if self.label is None:
            for column in self.labels:
                of_rows.check_column(row, column, self._named("labels"), where)
            return tuple(int(of_rows.is_set(row[column], column, where)) for column in self.labels)
        of_rows.check_column(row, self.label, self._named("label"), where)
        value = row[self.label]
        if self.is_regression:
            return self._number(value, where)
        if self.by_number:
            if self.name in OWN:
                value = of_rows.number_of_label(value)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(self.labels):
                known = of_rows.listed([f"{number} ({name})" for number, name in enumerate(self.labels)])
                raise UserError(f"{where}: label {value!r}, expected one of task {self.name!r}: {known}")
            return value
        if self.problem is Problem.CLASSIFICATION:
            return self._id(of_rows.name_of(value, where), where)
        found = {self._id(name, where) for name in of_rows.names_in(value, where)}
        return tuple(int(number in found) for number in range(len(self.labels)))

    def _number(self, value: Any, where: str) -> float:
        if self.limits is None:
            return of_rows.number_of(value, where)
        low, high = self.limits
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise UserError(f"{where}: label {value!r}, expected a number from {low:g} to {high:g}")
        return float(value)

    def _id(self, name: str, where: str) -> int:
        number = self._ids.get(name)
        if number is None:
            yaml = name.lower() in ("yes", "no", "on", "off") and {"true", "false"} & set(self.labels)
            hint = " (YAML reads yes and no without quotes as true and false)" if yaml else ""
            near, known = of_rows.nearest(name, self.labels), of_rows.listed(self.labels)
            raise UserError(f"{where}: label {of_rows.shown(name)}, expected one of {known}{hint}{near}")
        return number

    @property
    def _ids(self) -> dict[str, int]:
        found = self.__dict__.get("_ids_by_name")
        if found is None:
            found = {name: number for number, name in enumerate(self.labels)}
            object.__setattr__(self, "_ids_by_name", found)  # the dataclass is frozen
        return found

    def _named(self, field: str) -> str:
        return f"data.{field}" if self.name in OWN else f"task {self.name!r}"


def own_task(
    problem: Problem, texts: tuple[str, ...], label: str | None, labels: tuple[str, ...], metric: str | None = None
) -> ClassificationTask:
    """Return the task of a user's own rows.

    Args:
      problem: what is learnt.
      texts: the columns of the texts.
      label: the column of the label; None for columns of 0 and 1.
      labels: the names of the labels in order; of a regression, one name of any kind.
      metric: the main metric, one of `OWN_METRICS`; None: the first of them.
    """
    known = OWN_METRICS[problem]
    main = metric if metric in known else known[0]
    beside = tuple(each for each in known if each != main)
    return ClassificationTask(problem.value, texts, labels, main, beside, problem, label)


def trained_task(form: PromptForm | None, labels: Sequence[str]) -> ClassificationTask | None:
    """Return the task on own rows that a model was trained for; None where it was not, or where that is unknown.

    Args:
      form: the recorded prompt form, with the task's name and columns.
      labels: the names of the model's classes in order.
    """
    if form is None or form.task not in OWN or not form.text:
        return None
    return own_task(Problem(form.task), form.text, form.label, tuple(labels), form.metric)


def labels_of(rows: Rows, problem: Problem, column: str) -> tuple[str, ...]:
    """Return the labels that occur in training rows, in order.

    Raises:
      UserError: see `check_trainable`; also labels that are numbers to predict, or too many.
    """
    read = of_rows.names_in if problem is Problem.MULTILABEL else lambda value, where: [of_rows.name_of(value, where)]
    found: set[str] = set()
    for i, row in enumerate(rows.rows):
        where = rows.where(i)
        of_rows.check_column(row, column, "data.label", where)
        found.update(read(row[column], where))
    of_rows.check_types(rows, column)
    names = of_rows.in_order(found)
    of_rows.warn_of_variants(names, rows)
    if problem is Problem.CLASSIFICATION:
        of_rows.check_found(names, rows, column)
    if len(names) < 2:
        one = of_rows.listed(names) or "none"
        raise UserError(f"{rows.source}: every row has the label {one}, expected at least two labels")
    return names


def check_trainable(rows: Rows, labels: Num[np.ndarray, "n *C"], task: ClassificationTask) -> None:
    """Check that training rows have at least two labels, and warn of labels that none of them has.

    Raises:
      UserError: all rows have the same label.
    """
    if task.is_regression:
        if len(np.unique(labels)) < 2:
            raise UserError(f"{rows.source}: every row has the label {labels[0]:g}, expected numbers that differ")
        return
    if labels.ndim == 2:
        counts = labels.sum(axis=0).astype(int).tolist()
    else:
        found = Counter(labels.tolist())
        counts = [found[number] for number in range(len(task.labels))]
    missing = [name for name, count in zip(task.labels, counts, strict=True) if not count]
    if len(task.labels) - len(missing) < 2 - (labels.ndim == 2):
        there = [name for name in task.labels if name not in missing]
        raise UserError(
            f"{rows.source}: every row has the label {of_rows.listed(there) or 'none'}, expected at least two of "
            f"{of_rows.listed(task.labels)}"
        )
    if missing:
        console.warn(f"{rows.source}: no row has the label {of_rows.listed(missing)}, which is listed: it cannot be learnt")
