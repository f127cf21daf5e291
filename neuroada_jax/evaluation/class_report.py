"""What a classifier confuses: precision, recall and F1 of every class, and the confusion matrix, also as a picture."""

import dataclasses
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from neuroada_jax import console, files

MOST_LABELLED = 40  # classes whose names and counts can still be read in the picture
_LONGEST_NAME = 24  # characters of a class's name in the picture


class ClassFigures(NamedTuple):
    """Figures of one class.

    Attributes:
      label: its name.
      precision: share of its predictions that are right; 0 where it is never predicted.
      recall: share of its examples that are found; 0 where it has none.
      f1: harmonic mean of both; 0 where both are.
      support: number of its examples.
    """

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclasses.dataclass(frozen=True)
class ClassReport:
    """Figures of every class of a scored set.

    Attributes:
      classes: in the order of the labels.
      confusion: counts by [right class][predicted class]; None where an example may have several labels.
    """

    classes: tuple[ClassFigures, ...]
    confusion: tuple[tuple[int, ...], ...] | None

    @classmethod
    def of_classes(
        cls, found: Integer[np.ndarray, "n"], expected: Integer[np.ndarray, "n"], names: Sequence[str]
    ) -> "ClassReport":
        """Return the report of predicted and right class numbers."""
        counts = np.zeros((len(names), len(names)), np.int64)
        np.add.at(counts, (expected, found), 1)
        figures = _figures(names, np.diag(counts), counts.sum(axis=0), counts.sum(axis=1))
        return cls(figures, tuple(tuple(row) for row in counts.tolist()))

    @classmethod
    def of_several(
        cls, found: Bool[np.ndarray, "n C"], expected: Bool[np.ndarray, "n C"], names: Sequence[str]
    ) -> "ClassReport":
        """Return the report of examples that may have several labels."""
        return cls(_figures(names, (found & expected).sum(axis=0), found.sum(axis=0), expected.sum(axis=0)), None)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        content: dict[str, Any] = {"classes": [each._asdict() for each in self.classes]}
        return content if self.confusion is None else content | {"confusion": [list(row) for row in self.confusion]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ClassReport":
        """Return the report that `to_json` wrote."""
        confusion = content.get("confusion")
        return cls(
            tuple(ClassFigures(**each) for each in content["classes"]),
            None if confusion is None else tuple(tuple(row) for row in confusion),
        )


def _figures(
    names: Sequence[str], right: np.ndarray, predicted: np.ndarray, support: np.ndarray
) -> tuple[ClassFigures, ...]:
    """Return the figures of classes from counts of examples by class."""

    def share(part: int, of: int) -> float:
        return part / of if of else 0.0

    return tuple(
        ClassFigures(name, share(both, said), share(both, there), share(2 * both, said + there), there)
        for name, both, said, there in zip(names, right.tolist(), predicted.tolist(), support.tolist(), strict=True)
    )


def confusion_picture(path: Path, report: ClassReport, title: str) -> None:
    """Write the confusion matrix as a PNG: shares of each right class in colour, counts as numbers.

    Without matplotlib, or for a report without a confusion matrix, nothing is written.
    """
    if report.confusion is None:
        return
    figures = console.figures(path.name, "confusion matrix")
    if figures is None:
        return
    counts = np.array(report.confusion)
    names = [_short(each.label) for each in report.classes]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = len(names)
    cell = 0.75 if size <= 6 else 0.5 if size <= 15 else 0.4  # inches
    side = max(2.0, cell * min(size, MOST_LABELLED))
    margin = 0.085 * max(map(len, names))
    figure = figures.Figure(figsize=(side + margin + 1.8, side + margin + 1.2), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="right label")
    axes.set_title(title, wrap=True)
    if size <= MOST_LABELLED:
        axes.set_xticks(range(size), names, rotation=0 if max(map(len, names)) * 0.1 < cell else 90)
        axes.set_yticks(range(size), names)
        font = 11 if size <= 6 else 9 if size <= 15 else 7
        axes.tick_params(labelsize=font)
        for row, column in zip(*counts.nonzero(), strict=True):
            dark = shares[row, column] > 0.5
            number = str(counts[row, column])
            shown = number if len(number) < 5 else f"{counts[row, column]:.0e}".replace("e+0", "e")
            axes.text(column, row, shown, ha="center", va="center", fontsize=font, color="white" if dark else "black")
    bar: dict[str, Any] = {"shrink": 0.8, "fraction": 0.15 if size <= 6 else 0.05, "pad": 0.02}
    figure.colorbar(image, ax=axes, label="share of the right label's rows", **bar)
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a name in a script that matplotlib's own font lacks
        figure.savefig(picture, format="png", dpi=120)
    files.write_bytes(path, picture.getvalue())


def _short(name: str) -> str:
    """Return a name for an axis: on one line, without the signs that matplotlib reads as mathematics."""
    line = " ".join(name.split()).replace("$", r"\$")
    return line if len(line) <= _LONGEST_NAME else line[: _LONGEST_NAME - 3] + "..."
