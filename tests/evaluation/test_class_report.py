"""Figures of every class by hand, there and back as JSON, and the picture of the confusion matrix."""

import json

import numpy as np
import pytest

from neuroada_jax.evaluation.class_report import ClassReport, confusion_picture
from neuroada_jax.evaluation.scoring import Score

# By (right, predicted): a is right twice and once taken for b; b is right once and once taken for a; c has no row.
EXPECTED, FOUND = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 0])


def test_classes_by_hand():
    report = ClassReport.of_classes(FOUND, EXPECTED, ["a", "b", "c"])
    assert report.confusion == ((2, 1, 0), (1, 1, 0), (0, 0, 0))
    a, b, c = report.classes
    assert a == ("a", pytest.approx(2 / 3), pytest.approx(2 / 3), pytest.approx(2 / 3), 3)
    assert b == ("b", 1 / 2, 1 / 2, 1 / 2, 2) and c == ("c", 0.0, 0.0, 0.0, 0)


def test_several_labels_by_hand():
    expected = np.array([[1, 0], [1, 1], [0, 1], [1, 0]], bool)
    found = np.array([[1, 1], [0, 1], [0, 0], [1, 0]], bool)
    report = ClassReport.of_several(found, expected, ["a", "b"])
    assert report.confusion is None
    assert report.classes[0] == ("a", 1.0, pytest.approx(2 / 3), pytest.approx(4 / 5), 3)
    assert report.classes[1] == ("b", 1 / 2, 1 / 2, 1 / 2, 2)


def test_there_and_back():
    report = ClassReport.of_classes(FOUND, EXPECTED, ["a", "b", "c"])
    for each in (report, ClassReport(report.classes, None)):
        score = Score(0.6, 5, None, [], classes=each)
        assert Score.from_json(json.loads(json.dumps(score.to_json()))) == score
    assert "classes" not in Score(0.6, 5, None, []).to_json()


@pytest.mark.parametrize("count", [2, 5, 30, 60])
def test_the_picture_grows_with_the_classes(count, tmp_path):
    from PIL import Image

    names = ["$x_1", "名", "a label whose name is longer than all others", *map(str, range(count))][:count]
    numbers = np.arange(3 * count) % count
    confusion_picture(tmp_path / "a.png", ClassReport.of_classes(numbers, numbers[::-1], names), "run: set, 6 rows")
    with Image.open(tmp_path / "a.png") as image:
        width, height = image.size
    assert min(width, height) > 12 * min(count, 40) + 200 and max(width, height) < 2400
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_no_picture_of_several_labels(tmp_path):
    confusion_picture(
        tmp_path / "a.png", ClassReport.of_several(np.eye(2, dtype=bool), np.eye(2, dtype=bool), ["a", "b"]), ""
    )
    assert not list(tmp_path.iterdir())
