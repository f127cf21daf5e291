"""Metrics against cases worked out by hand."""

import math

import numpy as np
import pytest
from data_helpers import message_of

from neuroada_jax import metrics
from neuroada_jax.metrics import METRICS

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
    assert message_of(metrics.matthews, [0, 2], [0, 1]) == "metric: predictions of two classes must be 0 or 1, found 2"
    assert message_of(metrics.f1, [0, 1], [0, 3]) == "metric: labels of two classes must be 0 or 1, found 3"
