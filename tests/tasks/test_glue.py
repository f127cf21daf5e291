"""The GLUE tasks: fields, labels, metrics, and rows that do not fit."""

import pytest
from data_helpers import message_of

from neuroada_jax.data.rows import load_rows
from neuroada_jax.tasks import GLUE

ROWS = {
    "cola": {"sentence": "a", "label": 1},
    "sst2": {"sentence": "a", "label": 0},
    "mrpc": {"sentence1": "a", "sentence2": "b", "label": 1},
    "stsb": {"sentence1": "a", "sentence2": "b", "label": 3.8},
    "qqp": {"question1": "a", "question2": "b", "label": 1},
    "mnli": {"premise": "a", "hypothesis": "b", "label": 2},
    "qnli": {"question": "a", "sentence": "b", "label": 0},
    "rte": {"sentence1": "a", "sentence2": "b", "label": 1},
}


def test_the_eight_tasks_and_what_they_are_scored_by():
    assert list(GLUE) == list(ROWS)
    assert {name: task.metric for name, task in GLUE.items() if task.metric != "accuracy"} == {
        "cola": "matthews",
        "stsb": "pearson",
    }
    assert {name: task.beside for name, task in GLUE.items() if task.beside} == {
        "cola": ("accuracy",),
        "mrpc": ("f1",),
        "stsb": ("spearman",),
        "qqp": ("f1",),
    }
    assert {name: len(task.labels) for name, task in GLUE.items()} == dict.fromkeys(GLUE, 2) | {"stsb": 1, "mnli": 3}
    assert GLUE["mnli"].sources == (("data/glue/mnli", "validation"), ("nyu-mll/glue:mnli", "validation_matched"))


def test_the_dev_set_is_here_or_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mnli, folder = GLUE["mnli"], tmp_path / "data" / "glue" / "mnli"
    for file, source in (
        ("dev1000_from_train.jsonl.gz", ("nyu-mll/glue:mnli", "validation_matched")),  # a dev set of another split
        ("validation.jsonl", ("data/glue/mnli", "validation")),
        ("validation_matched.parquet", ("data/glue/mnli", "validation_matched")),
    ):
        assert GLUE["rte"].source() == ("nyu-mll/glue:rte", "validation")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
        assert mnli.source() == source


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_its_texts_and_label(name):
    texts, label = GLUE[name].convert({**ROWS[name], "idx": 7}, "here")
    assert texts == (("a",) if len(ROWS[name]) == 2 else ("a", "b"))
    assert label == ROWS[name]["label"] and isinstance(label, float if name == "stsb" else int)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "mnli",
            {"premise": None},
            "here: column 'premise' is null, expected text",
        ),
        ("cola", {"label": -1}, "here: label -1, expected one of task 'cola': 0 (unacceptable), 1 (acceptable)"),
        ("cola", {"label": True}, "here: label True, expected one of task 'cola'"),
        ("cola", {"label": "1"}, "here: label '1', expected one of task 'cola'"),
        (
            "mnli",
            {"label": 3},
            "here: label 3, expected one of task 'mnli': 0 (entailment), 1 (neutral), 2 (contra",
        ),
        ("stsb", {"label": 5.1}, "here: label 5.1, expected a number from 0 to 5"),
        ("stsb", {"label": float("nan")}, "here: label nan, expected a number from 0 to 5"),
        ("stsb", {"label": None}, "here: label None, expected a number from 0 to 5"),
    ],
)
def test_rows_that_do_not_fit(name, changes, message):
    assert message_of(GLUE[name].convert, {**ROWS[name], **changes}, "here").startswith(message)


def test_a_missing_label():
    message = message_of(GLUE["cola"].convert, {"sentence": "a", "text": "b"}, "here")
    assert message == "here: no column 'label', which task 'cola' names; found sentence, text"


@pytest.mark.parametrize("name", GLUE)
def test_every_row_of_the_data_sets_fits(name, shared_data):
    for file in sorted((shared_data / "glue" / name).glob("*.gz")):
        rows = load_rows(str(file), limit=2000)
        labels = {GLUE[name].convert(row, rows.where(i))[1] for i, row in enumerate(rows.rows)}
        assert len(labels) == len(GLUE[name].labels) or name == "stsb"
