"""GLUE: eight tasks for an encoder with a classifier, one model each.

Fields, labels and metrics are those of the benchmark (gluebenchmark.com), as in the hub's `nyu-mll/glue`. The best epoch
is chosen by accuracy for MRPC and QQP and by Pearson's correlation for STS-B, as in the published NeuroAda code; the
benchmark's second metric, F1 or Spearman's correlation, is reported beside it.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from neuroada_jax.data import rows
from neuroada_jax.errors import UserError
from neuroada_jax.tasks.task import Source

HUB = "nyu-mll/glue"
HIGHEST_SIMILARITY = 5.0  # STS-B's labels are numbers from 0 to this


class GlueTask(NamedTuple):
    """A task on labelled texts.

    Attributes:
      name: its name in configs, and its configuration on the hub.
      texts: the fields of the text, or of the pair of texts.
      labels: the names of the labels in the order of their ids; a single name means regression.
      metric: the metric by which the best epoch is chosen, one of `metrics.METRICS`.
      beside: further metrics that are reported.
      validation: the hub's split with the dev set.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metric: str = "accuracy"
    beside: tuple[str, ...] = ()
    validation: str = "validation"

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number rather than a class."""
        return len(self.labels) == 1

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where its dev set may be, best first."""
        return Source(f"data/glue/{self.name}", "validation"), Source(f"{HUB}:{self.name}", self.validation)

    def source(self) -> Source:
        """Return the local source, with the name of its split, where it has the dev set; else the hub's."""
        here, hub = self.sources
        found = [split for split in (hub.split, here.split) if rows.has_split(Path(here.data), split)]
        return Source(here.data, found[0]) if found else hub

    def convert(self, row: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], int | float]:
        """Return (the texts, the label) of a row.

        Raises:
          UserError: a field is missing or not a string, or the task has no such label; the error names the row's place.
        """
        if not all(isinstance(row.get(field), str) for field in self.texts) or "label" not in row:
            raise UserError(
                f"{where}: task {self.name!r} needs the text fields {', '.join(self.texts)} and a field label, "
                f"found {', '.join(row)}"
            )
        label = row["label"]
        if self.is_regression:
            if not _is_number(label) or not 0 <= label <= HIGHEST_SIMILARITY:
                raise UserError(f"{where}: label {label!r}, expected a number from 0 to {HIGHEST_SIMILARITY:g}")
            label = float(label)
        elif not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(self.labels):
            known = ", ".join(f"{number} ({name})" for number, name in enumerate(self.labels))
            raise UserError(f"{where}: label {label!r}, expected one of task {self.name!r}: {known}")
        return tuple(row[field] for field in self.texts), label


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

GLUE: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask("cola", ("sentence",), ("unacceptable", "acceptable"), "matthews", ("accuracy",)),
        GlueTask("sst2", ("sentence",), ("negative", "positive")),
        GlueTask("mrpc", _PAIR, ("not_equivalent", "equivalent"), beside=("f1",)),
        GlueTask("stsb", _PAIR, ("similarity",), "pearson", ("spearman",)),
        GlueTask("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), beside=("f1",)),
        GlueTask(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            validation="validation_matched",
        ),
        GlueTask("qnli", ("question", "sentence"), _ENTAILMENT),
        GlueTask("rte", _PAIR, _ENTAILMENT),
    )
}
