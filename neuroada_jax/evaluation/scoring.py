"""Scores, and the interface of scorers that decoders and encoders share."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

from neuroada_jax import files
from neuroada_jax.core.trees import Tree
from neuroada_jax.data.rows import Rows
from neuroada_jax.evaluation.class_report import ClassReport
from neuroada_jax.pretrained.load import OpenedModel

Progress = Callable[[int, int], None]  # called with (batches done, batches in all)


class Part(NamedTuple):
    """Accuracy over a subset of the rows, or by another rule, with its 95 % Wilson interval."""

    value: float
    n: int
    interval: tuple[float, float]


class Score(NamedTuple):
    """A metric over n rows, and every prediction.

    Attributes:
      value: the metric's value: accuracy by the task's rule, or the main metric of a classification task.
      n: number of rows.
      interval: 95 % interval: Wilson's for accuracy, by resampling for other metrics (`metrics.interval`).
      predictions: one dict a row.
      metric: name of the metric.
      beside: further metrics of the same predictions, by name.
      empty: generations without any text, which count as wrong; None where nothing is generated.
      overlap: rows whose question is among the training rows; None where those are not known.
      parts: accuracy without these rows ("clean"), by the task's strict rule ("strict"), and both ("clean, strict").
      beside_intervals: 95 % intervals of the metrics in `beside`, by name.
      unfinished: generations that neither an end token nor a stop string ended; None where nothing is generated.
      classes: figures of every class of a classifier; None where there are none.
    """

    value: float
    n: int
    interval: tuple[float, float] | None
    predictions: list[dict[str, Any]]
    metric: str = "accuracy"
    beside: Mapping[str, float] = MappingProxyType({})
    empty: int | None = None
    overlap: int | None = None
    parts: Mapping[str, Part] = MappingProxyType({})
    beside_intervals: Mapping[str, tuple[float, float] | None] = MappingProxyType({})
    unfinished: int | None = None
    classes: ClassReport | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them, without the predictions, which have a file of their own."""
        fields = self._asdict() | {
            "interval": _interval_to_json(self.interval),
            "beside": dict(self.beside),
            "beside_intervals": {name: _interval_to_json(each) for name, each in self.beside_intervals.items()},
            "parts": {
                name: part._asdict() | {"interval": _interval_to_json(part.interval)} for name, part in self.parts.items()
            },
        }
        del fields["predictions"], fields["classes"]
        return fields if self.classes is None else fields | {"classes": self.classes.to_json()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Score":
        """Return the score that `to_json` wrote, without predictions; a null value is one that was not finite."""
        parts = {
            name: Part(**{**part, "interval": _interval_from_json(part["interval"])})
            for name, part in content["parts"].items()
        }
        fields = dict(content) | {
            "value": _value_from_json(content["value"]),
            "interval": _interval_from_json(content["interval"]),
            "predictions": [],
            "beside": {name: _value_from_json(value) for name, value in content["beside"].items()},
            "beside_intervals": {name: _interval_from_json(each) for name, each in content["beside_intervals"].items()},
            "parts": parts,
            "classes": ClassReport.from_json(content["classes"]) if content.get("classes") else None,
        }
        return cls(**fields)


def _interval_to_json(interval: tuple[float, float] | None) -> list[float] | None:
    return list(interval) if interval else None


def _interval_from_json(interval: Any) -> Any:
    return tuple(interval) if interval else None


def _value_from_json(value: float | None) -> float:
    return math.nan if value is None else value


@runtime_checkable
class Scorer(Protocol):
    """Validated and tokenised rows: scoring them cannot fail on bad input. Building one needs no weights."""

    @property
    def rows(self) -> Rows:
        """The rows that are scored."""
        ...

    def predict(
        self, base_model: OpenedModel, params: Tree, numbers: Sequence[int], on_progress: Progress | None = None
    ) -> list[Any]:
        """Return the predictions of the rows with these numbers, in a form that JSON keeps; `judge` takes those of all.

        Args:
          base_model: architecture and config, those the scorer was built for.
          params: complete plain parameters: the base model's, or with an adapter in them.
          numbers: of the rows; ascending.
          on_progress: called with (batches done, batches in all).
        """
        ...

    def judge(self, found: list[Any]) -> Score:
        """Return the score of the predictions of all rows, which it may change."""
        ...


def score(scorer: Scorer, base_model: OpenedModel, params: Tree, on_progress: Progress | None = None) -> Score:
    """Score all rows; arguments as in `Scorer.predict`."""
    return scorer.judge(scorer.predict(base_model, params, range(len(scorer.rows)), on_progress))


def write_predictions(path: Path, score: Score) -> None:
    """Write every prediction as a readable line of JSON."""
    lines = [files.to_json(prediction) for prediction in score.predictions]
    files.write_text(path, "\n".join(lines) + "\n")
