"""Metrics and their confidence intervals: plain functions of (predictions, labels)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from neuroada_jax.errors import UserError

Values = Sequence[Any] | npt.NDArray
_RESAMPLES = 1000
_RESAMPLED_AT_ONCE = 1_000_000  # resampled row numbers held in memory

__all__ = ["METRICS", "accuracy", "f1", "interval", "matthews", "pearson", "spearman", "wilson_interval"]


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
    """Return the Matthews correlation of two classes, -1 to 1; 0 where all predictions, or all labels, are the same.

    It equals Pearson's coefficient of the classes written as 0 and 1 (B. W. Matthews, 1975).

    Raises:
      UserError: values other than 0 and 1.
    """
    found, expected = _binary(predictions, labels)
    return pearson(found.astype(float), expected.astype(float))


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
    function.__name__: function for function in (accuracy, matthews, pearson, spearman, f1)
}


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
