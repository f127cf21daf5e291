"""Metrics against cases worked out by hand."""

import math

import numpy as np
import pytest
from data_helpers import message_of

from neuroada_jax.evaluation import metrics
from neuroada_jax.evaluation.metrics import METRICS

# 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
FOUND = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
LABELS = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]


def test_two_classes_by_hand():
    assert metrics.accuracy(FOUND, LABELS) == 7 / 10
    assert metrics.f1(FOUND, LABELS) == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    # (TP TN - FP FN) / sqrt((TP + FP)(TP + FN)(TN + FP)(TN + FN))
    assert metrics.matthews(FOUND, LABELS) == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))
    opposite = [1 - value for value in LABELS]
    assert metrics.matthews(opposite, LABELS) == pytest.approx(-1) and metrics.matthews(LABELS, LABELS) == pytest.approx(1)
    assert metrics.f1(opposite, LABELS) == 0 == metrics.accuracy(opposite, LABELS)


def test_more_classes_by_hand():
    # Counts by (right, predicted) of three classes: 3 of the first, 2 and 2, with one mistake each.
    labels, found = [0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2, 0]
    # F1: 2 * 2 / (3 + 3), 2 * 1 / (2 + 2), 2 * 1 / (2 + 2).
    assert metrics.macro_f1(found, labels) == pytest.approx((2 / 3 + 1 / 2 + 1 / 2) / 3)
    # A class that is predicted and never right counts with 0, and one that does not occur does not count.
    assert metrics.macro_f1([0, 0, 9], [0, 0, 0]) == pytest.approx((2 * 2 / 5 + 0) / 2)
    # R_K = (c s - sum p t) / sqrt((s^2 - sum p^2)(s^2 - sum t^2)): c = 4 right of s = 7, p = t = (3, 2, 2).
    assert metrics.matthews(found, labels) == pytest.approx((4 * 7 - 17) / (49 - 17))
    assert metrics.matthews(labels, labels) == pytest.approx(1) and metrics.matthews([2, 2], [0, 2]) == 0
    # Of two classes both definitions are one.
    renamed = np.array(FOUND) + 3, np.array(LABELS) + 3
    assert metrics.matthews(*renamed) == pytest.approx(metrics.matthews(FOUND, LABELS))
    assert metrics.macro_f1(FOUND, LABELS) == pytest.approx((2 * 3 / (4 + 5) + 2 * 4 / (6 + 5)) / 2)
    assert metrics.mse([1, 2, 4], [1.0, 4.0, 4.5]) == pytest.approx((0 + 4 + 0.25) / 3)


def test_several_labels_by_hand():
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0]], bool)
    found = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]], bool)
    values = {name: function(found, labels) for name, function in metrics.SEVERAL_LABELS.items()}
    # 3 right of 4 predicted and 5 there; by label 2 of (2, 3), 1 of (2, 2), and none of none.
    assert values == {
        "micro_f1": pytest.approx(6 / 9),
        "macro_f1": pytest.approx((4 / 5 + 1 / 2 + 0) / 3),
        "accuracy": 1 / 4,
    }
    assert metrics.SEVERAL_LABELS["micro_f1"](found & False, labels & False) == 0
    for name, value in values.items():
        low, high = metrics.interval(name, found, labels)
        assert low <= value <= high and (low, high) == metrics.interval(name, found, labels)


def test_numbers_by_hand():
    # Deviations -1.5 -0.5 0.5 1.5 and -1 0 -2 3: the products sum to 5, the squares to 5 and 14.
    assert metrics.pearson([1, 2, 3, 4], [2, 3, 1, 6]) == pytest.approx(5 / math.sqrt(5 * 14))
    # Ranks 1 2 3 4 and 2 3 1 4: 1 - 6 (1 + 1 + 4 + 0) / (4 (16 - 1)).
    assert metrics.spearman([1, 2, 3, 4], [2, 3, 1, 6]) == pytest.approx(1 - 6 * 6 / 60)
    # Ties share their mean rank: 1 2.5 2.5 4 against 1 2 3 4 gives 4.5 / sqrt(4.5 * 5).
    assert metrics.spearman([0.0, 5.0, 5.0, 9.0], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert metrics.pearson(np.float32([1, 2, 3]), np.float32([10, 20, 30])) == pytest.approx(1)
    assert metrics.spearman([1, 2, 3], [30, 20, -500]) == pytest.approx(-1)


def test_a_constant_side_scores_nothing():
    for name in ("matthews", "pearson", "spearman"):
        assert METRICS[name]([1, 1, 1], [0, 1, 1]) == 0 == METRICS[name]([0, 1, 1], [0, 0, 0])
    assert METRICS["f1"]([0, 0], [0, 0]) == 0
    assert METRICS["pearson"]([0.5], [0.5]) == 0


def test_values_that_do_not_fit():
    for function in METRICS.values():
        assert message_of(function, [], []).startswith("metric: found (0,) predictions")
        assert message_of(function, [1, 0], [1]).endswith("expected as many of each")
    assert message_of(metrics.f1, [0, 2], [0, 1]) == "metric: predictions of two classes must be 0 or 1, found 2"
    assert message_of(metrics.f1, [0, 1], [0, 3]) == "metric: labels of two classes must be 0 or 1, found 3"


def test_intervals_by_resampling():
    rng = np.random.default_rng(0)
    labels = rng.normal(size=200)
    found = labels + rng.normal(size=200)
    value = metrics.pearson(found, labels)
    low, high = metrics.interval("pearson", found, labels)
    assert (low, high) == metrics.interval("pearson", found, labels)
    # Fisher's: the inverse hyperbolic tangent of the coefficient is about normal, with the deviation 1 / sqrt(n - 3).
    fisher = np.tanh(np.arctanh(value) + np.array([-1, 1]) * 1.96 / math.sqrt(197))
    np.testing.assert_allclose((low, high), fisher, atol=0.03)
    low, high = metrics.interval("matthews", (found > 0).astype(int), (labels > 0).astype(int))
    assert low < metrics.matthews(found > 0, labels > 0) < high
    for constant in ([1, 1, 1], [1.0, math.nan, 2.0]):
        assert metrics.interval("spearman", constant, [1, 2, 3]) is None is metrics.interval("f1", [0, 1, 0], constant)


# The Wilson intervals in R. G. Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I.
@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_interval(correct, n, low, high):
    got = metrics.wilson_interval(correct, n)
    assert metrics.interval("accuracy", [1] * correct + [0] * (n - correct), [1] * n) == got
    # The bounds p are where (share - p)^2 = z^2 p (1 - p) / n.
    for bound in got:
        if 0 < bound < 1:
            assert (correct / n - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / n, rel=1e-6)
    assert got == pytest.approx((low, high), abs=5e-5)
