"""Labels of own rows: what counts as one, in which order they stand, and what is refused, by file and row."""

import dataclasses

import numpy as np
import pytest
from data_helpers import message_of, write_lines

from neuroada_jax.data.rows import load_rows, rows_from_list
from neuroada_jax.errors import NeuroadaWarning
from neuroada_jax.tasks import labels
from neuroada_jax.tasks.classification import Problem, check_trainable, labels_of, own_task
from neuroada_jax.training.config import DataSection
from neuroada_jax.training.config_file import decode, parse_yaml

SINGLE, MULTI, NUMBER = Problem.CLASSIFICATION, Problem.MULTILABEL, Problem.REGRESSION


def rows(*values, **columns):
    return rows_from_list([{"text": "t", "label": value, **columns} for value in values])


def task(problem=SINGLE, names=("ham", "spam"), label="label", texts=("text",)):
    return own_task(problem, texts, label, names)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["spam", "ham", "spam"], ("ham", "spam")),
        ([2, 10, 1], ("1", "2", "10")),
        (["2", "10", "-1"], ("-1", "2", "10")),  # as a table has integers
        (["2", "10", "b"], ("10", "2", "b")),
        ([True, False], ("false", "true")),
        ([np.int64(1), np.int64(0)], ("0", "1")),
    ],
)
def test_labels_are_found_in_order_and_become_ids(values, names):
    found = labels_of(rows(*values), SINGLE, "label")
    assert found == names
    texts, ids = task(names=found).read(rows(*values))
    assert texts == [("t",)] * len(values) and ids.dtype == np.int32
    assert [found[each] for each in ids] == [str(labels.plain(each)).lower() for each in values]


def test_a_list_fixes_names_and_order_whatever_the_type_of_the_rows():
    _, ids = task(names=("3", "1")).read(rows(1, 3, 3))
    assert ids.tolist() == [1, 0, 0]
    _, ids = task(names=("3", "1")).read(rows("1", "3"))  # a table's text
    assert ids.tolist() == [1, 0]


def test_integers_stand_for_the_names_of_a_list():
    for values in ((1, 0, 1), ("1", "0", "1"), (np.int32(1), np.int32(0), np.int32(1))):
        assert task().read(rows(*values))[1].tolist() == [1, 0, 1]
    assert "label 2, expected one of task 'classification': 0 (ham), 1 (spam)" in message_of(task().read, rows(0, 2))
    assert "label '0', expected one of ham, spam" in message_of(task().read, rows("0", "ham"))  # not a part of them
    assert "label '0', expected one of" in message_of(task(names=("1", "2")).read, rows(1, 0))  # names that are integers


def test_lists_of_names_and_columns_of_0_and_1():
    several = rows(["b", "a"], [], ["c"])
    names = labels_of(several, MULTI, "label")
    assert names == ("a", "b", "c")
    _, found = task(MULTI, names).read(several)
    np.testing.assert_array_equal(found, np.float32([[1, 1, 0], [0, 0, 0], [0, 0, 1]]))
    table = rows_from_list([{"text": "t", "a": 1, "b": "0"}, {"text": "t", "a": False, "b": 1.0}])
    _, found = task(MULTI, ("a", "b"), label=None).read(table)
    np.testing.assert_array_equal(found, np.float32([[1, 0], [0, 1]]))


def test_numbers_and_pairs_of_texts():
    pair = task(NUMBER, ("score",), "score", ("title", "body"))
    texts, numbers = pair.read(
        rows_from_list([{"title": "a", "body": "b", "score": "1.5"}, {"title": "", "body": "c", "score": 2}])
    )
    assert texts == [("a", "b"), ("", "c")] and numbers.dtype == np.float32 and numbers.tolist() == [1.5, 2.0]


OTHER_VALUES = [None, "", "  ", 0.5, 1.0, float("nan"), [1], {"a": 1}, 10**30, b"x"]


@pytest.mark.parametrize("value", OTHER_VALUES, ids=repr)
def test_what_is_no_label(value):
    for read in (lambda data: labels_of(data, SINGLE, "label"), task().read):
        message = message_of(read, rows("ham", "spam", value))
        assert message.startswith("rows: row 2: label ") and "expected a name, an integer or a boolean" in message
        assert ("data.task: regression" in message) == (isinstance(value, float) and value == value)
    message = message_of(labels_of, rows(["a"], ["b", value]), MULTI, "label")
    assert message.startswith("rows: row 1: label ")


@pytest.mark.parametrize(
    "value", [None, "", "x", "1,5", True, [1], float("inf"), float("nan"), "nan", 10**400, 1e39, "1e39"], ids=str
)
def test_what_is_no_number(value):
    message = message_of(task(NUMBER, ("label",)).read, rows(1, 2.5, value))
    assert message.startswith("rows: row 2: label ") and message.endswith(("expected a number", "expected a finite number"))
    assert len(message) < 120


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, "1", 1], "rows: row 1: label '1' is text, and 1 of rows: row 0 is an integer; expected one type"),
        (["1", 1], "rows: row 1: label 1 is an integer, and '1' of rows: row 0 is text; expected one type"),
        (["true", True], "rows: row 1: label True is a boolean, and 'true' of rows: row 0 is text; expected one type"),
        ([0, True], "rows: row 1: label True is a boolean, and 0 of rows: row 0 is an integer; expected one type"),
    ],
)
def test_labels_of_two_types(values, message):
    assert message_of(labels_of, rows(*values), SINGLE, "label") == message
    names = tuple({labels.name_of(each, "") for each in values} | {"x"})
    assert message_of(task(names=names).read, rows(*values)) == message
    assert message_of(labels_of, rows(values[:1], values[1:2]), MULTI, "label") == message


def test_labels_outside_the_list_name_their_row_and_the_nearest(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "a", "label": name} for name in ("ham", "span")])
    message = message_of(task().read, load_rows(str(path)))
    assert message == f"{path}:2: label 'span', expected one of ham, spam; did you mean 'spam'?"
    message = message_of(task(MULTI).read, rows(["ham"], ["ham", "eggs"]))
    assert message == "rows: row 1: label 'eggs', expected one of ham, spam"
    message = message_of(task(names=tuple(f"class {i}" for i in range(40))).read, rows("x" * 500))
    assert (
        message.startswith("rows: row 0: label 'xxxx")
        and message.endswith(", class 11, ... (40 in all)")
        and len(message) < 300
    )
    message = message_of(task(names=("false", "true")).read, rows("no"))
    assert message.endswith("expected one of false, true (YAML reads yes and no without quotes as true and false)")
    assert "names; found" not in message


def test_a_csv_names_its_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"a\nb",ham\nc,\n')
    assert message_of(task().read, load_rows(str(path))).startswith(f"{path}:4: label '', expected a name")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "a", "label": "ham"}, "no column 'text', which data.text names; found txt, label; did you mean 'text'?"),
        (
            {"text": "a", "Label": "ham"},
            "no column 'label', which data.label names; found text, Label; did you mean 'Label'?",
        ),
        ({}, "no column 'text', which data.text names; found none"),
        ({"text": None, "label": "ham"}, "column 'text' is null, expected text"),
        ({"text": 3, "label": "ham"}, "column 'text' is 3, expected text"),
        ({"text": ["a"], "label": "ham"}, "column 'text' is ['a'], expected text"),
    ],
)
def test_columns_that_are_not_there_or_hold_no_text(row, message):
    found = message_of(task().read, rows_from_list([{"text": "a", "label": "ham"}, row]))
    assert found == f"rows: row 1: {message.replace(chr(39) + 'text' + chr(39) + '?', chr(39) + 'txt' + chr(39) + '?')}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": 1}, "no column 'b', which data.labels names; found text, a"),
        ({"a": 1, "b": 2}, "column 'b' is 2, expected 0 or 1"),
        ({"a": 1, "b": None}, "column 'b' is null, expected 0 or 1"),
        ({"a": 1, "b": "yes"}, "column 'b' is 'yes', expected 0 or 1"),
        ({"a": 0.5, "b": 1}, "column 'a' is 0.5, expected 0 or 1"),
    ],
)
def test_columns_of_0_and_1(row, message):
    several = task(MULTI, ("a", "b"), label=None)
    assert message_of(several.read, rows_from_list([{"text": "t", **row}])) == f"rows: row 0: {message}"


@pytest.mark.parametrize(
    ("value", "message"), [("a,b", "label 'a,b', expected a list of names such as"), (["a", "a"], "has a name twice")]
)
def test_lists_of_names(value, message):
    assert message in message_of(task(MULTI, ("a", "b")).read, rows(value))


def test_columns_that_are_no_classes():
    message = message_of(labels_of, rows(*(f"a text of its own {i}" for i in range(30))), SINGLE, "label")
    assert message.startswith("rows: each row has a label of its own in 'label' (a text of its own 0, ")
    message = message_of(labels_of, rows(*(i // 2 for i in range(4000))), SINGLE, "label")
    assert message.startswith("rows: found 2000 labels in 'label' (0, 1, 2, 3, ... (2000 in all)), expected at most 1000")


@pytest.mark.parametrize(
    "values", [("1.0", "2.0"), ("0.5", "1.5", "-2.0"), ("3", "1e3"), tuple(f"{i}.5" for i in range(30))]
)
def test_numbers_as_classes_are_named_as_a_config_has_them(tmp_path, values):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"t,{value}\n" for value in values))
    data = load_rows(str(path))
    message = message_of(labels_of, data, SINGLE, "label")
    point = min(value for value in values if not value.isdigit())
    place = f"{path}:{2 + values.index(point)}: label {point!r} in 'label' is a number and no integer; "
    assert message.startswith(f"{place}to predict numbers set data.task: regression, ")
    listed = message.partition("data.labels: ")[2]
    if len(values) > 8:
        assert listed.endswith(", ...]")
        return
    section = decode(DataSection, {"train": "", "task": "classification", **parse_yaml(f"labels: {listed}", "")}, "")
    assert task(names=tuple(section.labels)).read(data)[1].tolist() == [section.labels.index(each) for each in values]


def test_a_list_of_numbers_says_how_names_are_written():
    message = message_of(decode, DataSection, {"train": "", "task": "classification", "labels": [1.0, 2.0]}, "")
    assert message.endswith('found 1.0, a number with a decimal point; as the name of a label write "1.0"')


@pytest.mark.parametrize(
    ("problem", "values", "one"), [(SINGLE, ["a", "a"], "a"), (MULTI, [["a"], []], "a"), (MULTI, [[], []], "none")]
)
def test_a_single_label(problem, values, one):
    message = message_of(labels_of, rows(*values), problem, "label")
    assert message == f"rows: every row has the label {one}, expected at least two labels"


def test_labels_that_are_nearly_the_same():
    for pair in (("spam", "Spam"), ("spam", "spam ")):
        with pytest.warns(NeuroadaWarning, match="are two labels, though only case or white space differs"):
            assert labels_of(rows("ham", *pair), SINGLE, "label") == tuple(sorted(("ham", *pair)))


def test_rows_that_cannot_be_learnt():
    one, numbers = task(names=("a", "b", "c")), task(NUMBER, ("label",))
    message = message_of(check_trainable, rows("a", "a"), np.int32([0, 0]), one)
    assert message == "rows: every row has the label a, expected at least two of a, b, c"
    message = message_of(check_trainable, rows(2, 2), np.float32([2, 2]), numbers)
    assert message == "rows: every row has the label 2, expected numbers that differ"
    with pytest.warns(NeuroadaWarning, match="rows: no row has the label c, which is listed: it cannot be learnt"):
        check_trainable(rows("a", "b"), np.int32([0, 1]), one)
    several = dataclasses.replace(task(MULTI, ("a", "b", "c")))
    with pytest.warns(NeuroadaWarning, match="no row has the label b, c,"):
        check_trainable(rows(["a"]), np.float32([[1, 0, 0]]), several)
    assert "every row has the label none" in message_of(check_trainable, rows([]), np.zeros((1, 3), np.float32), several)
