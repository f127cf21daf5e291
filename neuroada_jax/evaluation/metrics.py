"""Metrics and their confidence intervals: plain functions of (predictions, labels).

Classes are numbers from 0. Of several labels, predictions and labels are (n, C): 1 where an example has the label.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from neuroada_jax.errors import UserError

Values = Sequence[Any] | npt.NDArray
_RESAMPLES = 1000
_RESAMPLED_AT_ONCE = 1_000_000  # resampled row numbers held in memory

__all__ = [
    "METRICS",
    "SEVERAL_LABELS",
    "accuracy",
    "f1",
    "interval",
    "macro_f1",
    "matthews",
    "mse",
    "pearson",
    "spearman",
    "wilson_interval",
]


def accuracy(predictions: Values, labels: Values) -> float:
    """Return the share of equal pairs, 0 to 1.

    Raises:
      UserError: no values, or not as many of each; every function here raises this.
    """
    found, expected = _pair(predictions, labels)
    return float(np.mean(found == expected))


def f1(predictions: Values, labels: Values) -> float:
    """Return the harmonic mean of precision and recall of class 1, 0 to 1; 0 where neither contains it.

    Raises:
      UserError: values other than 0 and 1.
    """
    found, expected = _binary(predictions, labels)
    both, either = int(np.sum(found & expected)), int(found.sum() + expected.sum())
    return 2 * both / either if either else 0.0


def matthews(predictions: Values, labels: Values) -> float:
    """Return the Matthews correlation of classes, -1 to 1; 0 where all predictions, or all labels, are the same.

    Of two classes it equals Pearson's coefficient of the classes written as 0 and 1 (B. W. Matthews, 1975); of more it is
    the R_K of J. Gorodkin (2004), which is Pearson's coefficient of the indicators of all classes taken together.
    """
    found, expected = _pair(predictions, labels)
    if np.isin(found, (0, 1)).all() and np.isin(expected, (0, 1)).all():
        return pearson(found.astype(float), expected.astype(float))
    if _constant(found) or _constant(expected):
        return 0.0
    classes = np.unique(np.concatenate([found, expected]))
    one, other = ((values[:, None] == classes).astype(float) for values in (found, expected))
    one, other = one - one.mean(axis=0), other - other.mean(axis=0)
    return float((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))


def macro_f1(predictions: Values, labels: Values) -> float:
    """Return the unweighted mean of the classes' F1, 0 to 1, over those that occur among predictions or labels."""
    found, expected = _pair(predictions, labels)
    classes, numbers = np.unique(np.concatenate([found, expected]), return_inverse=True)
    found, expected = numbers[: len(found)], numbers[len(found) :]
    right = np.bincount(found[found == expected], minlength=len(classes))
    either = np.bincount(found, minlength=len(classes)) + np.bincount(expected, minlength=len(classes))
    return float(np.mean(2 * right / either))


def mse(predictions: Values, labels: Values) -> float:
    """Return the mean of the squared differences."""
    found, expected = _pair(predictions, labels)
    return float(np.mean(np.square(found.astype(np.float64) - expected)))


def pearson(predictions: Values, labels: Values) -> float:
    """Return the Pearson correlation, -1 to 1; 0 where all predictions, or all labels, are the same."""
    from scipy import stats  # takes half a second to import

    found, expected = _pair(predictions, labels)
    return 0.0 if _constant(found) or _constant(expected) else float(stats.pearsonr(found, expected).statistic)


def spearman(predictions: Values, labels: Values) -> float:
    """Return the Spearman rank correlation, -1 to 1; 0 where all predictions, or all labels, are the same.

    Ties get their mean rank.
    """
    from scipy import stats

    found, expected = _pair(predictions, labels)
    return 0.0 if _constant(found) or _constant(expected) else float(stats.spearmanr(found, expected).statistic)


METRICS: dict[str, Callable[[Values, Values], float]] = {
    function.__name__: function for function in (accuracy, matthews, pearson, spearman, f1, macro_f1, mse)
}


def _all_right(predictions: npt.NDArray, labels: npt.NDArray) -> float:
    return float(np.mean((predictions == labels).all(axis=1)))


def _micro_f1(predictions: npt.NDArray, labels: npt.NDArray) -> float:
    either = predictions.sum() + labels.sum()
    return float(2 * (predictions & labels).sum() / either) if either else 0.0


def _macro_f1_of_columns(predictions: npt.NDArray, labels: npt.NDArray) -> float:
    either = predictions.sum(axis=0) + labels.sum(axis=0)
    right = 2 * (predictions & labels).sum(axis=0)
    return float(np.mean(right / np.maximum(either, 1)))


SEVERAL_LABELS: dict[str, Callable[[npt.NDArray, npt.NDArray], float]] = {
    "micro_f1": _micro_f1,
    "macro_f1": _macro_f1_of_columns,
    "accuracy": _all_right,
}
"""Metrics of bool (n, C): F1 of all (example, label) together; the labels' mean F1, 0 for one that is neither predicted
nor right; the share of examples whose labels are all right."""


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion; exactly 0 or 1 at an end that is reached."""
    from scipy import stats

    low, high = stats.binomtest(correct, n).proportion_ci(method="wilson")
    return float(low), float(high)


def interval(metric: str, predictions: Values, labels: Values) -> tuple[float, float] | None:
    """Return the 95 % interval of a metric: Wilson's for accuracy, else by resampling.

    Resampling takes percentiles of 1,000 resamples of the pairs, the same resamples for the same data.

    Returns:
      (low, high), or None where resampling gives none: all predictions, or all labels, are the same, or a value is not
      finite.

    Raises:
      UserError: as the metric does.
    """
    from scipy import stats

    if np.ndim(predictions) == 2:
        return _interval_of_several(metric, np.asarray(predictions), np.asarray(labels))
    found, expected = _pair(predictions, labels)
    if metric == "accuracy":
        return wilson_interval(int((found == expected).sum()), len(found))
    if _constant(found) or _constant(expected) or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return None
    resampled = stats.bootstrap(
        (found, expected),
        METRICS[metric],
        paired=True,
        vectorized=False,
        n_resamples=_RESAMPLES,
        batch=max(1, _RESAMPLED_AT_ONCE // len(found)),
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = resampled.confidence_interval
    return float(low), float(high)


def _interval_of_several(metric: str, found: npt.NDArray, expected: npt.NDArray) -> tuple[float, float] | None:
    """Return the interval of a metric of several labels; the rows are resampled."""
    from scipy import stats

    if metric == "accuracy":
        return wilson_interval(int((found == expected).all(axis=1).sum()), len(found))
    if len(found) < 2:
        return None
    resampled = stats.bootstrap(
        (np.arange(len(found)),),
        lambda rows: SEVERAL_LABELS[metric](found[rows], expected[rows]),
        vectorized=False,
        n_resamples=_RESAMPLES,
        batch=max(1, _RESAMPLED_AT_ONCE // found.size),
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = resampled.confidence_interval
    return float(low), float(high)


def _pair(predictions: Values, labels: Values) -> tuple[npt.NDArray, npt.NDArray]:
    found, expected = np.asarray(predictions), np.asarray(labels)
    if found.ndim != 1 or found.shape != expected.shape or not found.size:
        raise UserError(f"metric: found {found.shape} predictions and {expected.shape} labels, expected as many of each")
    return found, expected


def _binary(predictions: Values, labels: Values) -> tuple[npt.NDArray, npt.NDArray]:
    found, expected = _pair(predictions, labels)
    for name, values in (("predictions", found), ("labels", expected)):
        if not np.isin(values, (0, 1)).all():
            others = sorted(set(values.tolist()) - {0, 1})
            raise UserError(f"metric: {name} of two classes must be 0 or 1, found {others[0]}")
    return found == 1, expected == 1


def _constant(values: npt.NDArray) -> bool:
    return bool(np.all(values == values[0]))
