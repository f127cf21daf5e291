"""Files, directories and hub names become rows that know their line."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from data_helpers import message_of, write_lines

from neuroada_jax.data.rows import has_split, load_rows, rows_from_list

ROWS = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(5)]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.json.gz"])
def test_json_lines_in_every_suffix(tmp_path, name):
    rows = load_rows(str(write_lines(tmp_path / name, ROWS)))
    assert rows.rows == ROWS
    assert len(rows) == 5
    assert rows.where(2) == f"{tmp_path / name}:3"


@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
def test_json_list_knows_lines(tmp_path, name):
    path = write_lines(tmp_path / name, [json.dumps(ROWS, indent=1)])
    rows = load_rows(str(path))
    assert rows.rows == ROWS
    assert rows.where(0) == f"{path}:2"
    assert rows.where(1) == f"{path}:6"


def test_json_text_is_left_alone(tmp_path):
    row = {"instruction": "é\u2028 x\r\ny", "output": "🙂"}
    raw = json.dumps(row, ensure_ascii=False)
    for name, text in {"a.jsonl": raw + "\n", "b.json": f"\ufeff[{raw}]\n", "c.jsonl": f"\n\n{raw}\r\n"}.items():
        (tmp_path / name).write_bytes(text.encode())
        assert load_rows(str(tmp_path / name)).rows == [row]
    assert load_rows(str(tmp_path / "c.jsonl")).where(0).endswith("c.jsonl:3")


def test_parquet_and_saved_directories(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    rows = load_rows(str(tmp_path / "x.parquet"), limit=3)
    assert rows.rows == ROWS[:3]
    assert rows.where(2) == f"{tmp_path / 'x.parquet'}: row 2"
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "saved"))
    assert load_rows(str(tmp_path / "saved")).rows == ROWS
    datasets.DatasetDict({"train": data, "test": data.select([4])}).save_to_disk(str(tmp_path / "splits"))
    assert load_rows(str(tmp_path / "splits"), "test").rows == ROWS[4:]
    assert load_rows(str(tmp_path / "splits"), limit=2).rows == ROWS[:2]
    message = message_of(load_rows, str(tmp_path / "splits"), "dev")
    assert "no split 'dev'" in message
    assert has_split(tmp_path / "splits", "test") and not has_split(tmp_path / "splits", "dev")
    assert has_split(tmp_path / "saved", "validation")  # which has no splits to tell apart
    assert "train, test" in message


def test_directory_of_files(tmp_path):
    write_lines(tmp_path / "a_train.jsonl", ROWS[:2])
    write_lines(tmp_path / "b_train.json", [json.dumps(ROWS[2:4])])
    write_lines(tmp_path / "val.jsonl", ROWS[4:])
    (tmp_path / "README.md").write_text("not data")
    rows = load_rows(str(tmp_path))
    assert rows.rows == ROWS[:4]
    assert rows.where(2) == f"{tmp_path / 'b_train.json'}:1"
    assert load_rows(str(tmp_path), limit=3).rows == ROWS[:3]
    assert load_rows(str(tmp_path), "validation").rows == ROWS[4:]
    assert "no file for split 'test'" in message_of(load_rows, str(tmp_path), "test")
    (tmp_path / "empty").mkdir()
    assert "no data files" in message_of(load_rows, str(tmp_path / "empty"))
    plain = tmp_path / "plain"
    plain.mkdir()
    write_lines(plain / "first.jsonl", ROWS)
    assert load_rows(str(plain)).rows == ROWS


def test_a_name_with_two_splits_belongs_to_neither(tmp_path):
    names = ["dev1000_from_train", "train.subset8999", "validation_matched", "validation_mismatched-00000-of-00001"]
    for name, row in zip(names, ROWS, strict=False):
        write_lines(tmp_path / f"{name}.jsonl", [row])
    for split, row in (("train", 1), ("validation_matched", 2), ("validation_mismatched", 3), ("dev1000_from_train", 0)):
        assert load_rows(str(tmp_path), split).rows == [ROWS[row]] and has_split(tmp_path, split)
    message = message_of(load_rows, str(tmp_path), "validation")
    assert message.endswith("'validation' is two sets here; name one of them: validation_matched or validation_mismatched")
    assert not has_split(tmp_path, "test") and not has_split(tmp_path / "gone", "train")
    (tmp_path / f"{names[1]}.jsonl").unlink()
    assert "no file for split 'train'" in message_of(load_rows, str(tmp_path))


def test_hub_name_goes_to_datasets(monkeypatch):
    asked = []

    def load_dataset(*name, split):
        asked.append((*name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows("tatsu-lab/alpaca", "train", limit=2)
    assert rows.rows == ROWS[:2]
    assert asked == [("tatsu-lab/alpaca", "train")]
    assert rows.where(1) == "tatsu-lab/alpaca: row 1"
    load_rows("nyu-mll/glue:mrpc", "validation")
    assert asked[1:] == [("nyu-mll/glue", "mrpc", "validation")]

    def offline(name, split):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert message_of(load_rows, "tatsu-lab/alpaca").endswith("(no network)")


@pytest.mark.parametrize(
    ("name", "text", "line", "says"),
    [
        ("x.jsonl", '{"a": 1}\n\n{"a": \n', 3, "not JSON"),
        ("x.jsonl", '{"a": 1}\n[1]\n', 2, "found a list, expected an object"),
        ("x.json", '[{"a": 1},\n{"a" 2}]', 2, "not JSON"),
        ("x.json", '[{"a": 1},\n\n7]', 3, "found a int, expected an object"),
        ("x.json", '[{"a": 1}\n', 2, "not closed"),
        ("x.json", '[{"a": 1},\n]', 2, "not JSON"),
        ("x.json", "[]\n\n{}", 3, "after the list"),
        ("x.json", '{\n"a": 1}', 1, "not JSON"),
        ("x.jsonl", b'{"a": "b"}\n{"a": "\xff"}\n', 2, "not JSON"),
        ("x.json", b'[{"a": "b"},\n{"a": "\xff"}]', 2, "not UTF-8"),
    ],
)
def test_broken_json_is_named_by_file_and_line(tmp_path, name, text, line, says):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = message_of(load_rows, str(path))
    assert message.startswith(f"{path}:{line}: ")
    assert says in message


def test_other_broken_sources(tmp_path):
    for name, text, says in [
        ("empty.jsonl", b"", "empty"),
        ("empty.json", b" \n", "empty"),
        ("list.json", b"[]", "no rows"),
        ("x.csv", b"a,b\n", "unknown kind of file"),
        ("x.jsonl.gz", b"not gzip", "not a complete gzip file"),
        ("y.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 50)[:-12], "not a complete gzip file"),
        ("x.parquet", b"PAR0 nonsense", "not a parquet file"),
    ]:
        (tmp_path / name).write_bytes(text)
        message = message_of(load_rows, str(tmp_path / name))
        assert message.startswith(str(tmp_path / name))
        assert says in message
    assert "no such file" in message_of(load_rows, str(tmp_path / "gone.jsonl"))
    assert "no such file" in message_of(load_rows, "data/gone.jsonl")
    assert "no such file" in message_of(load_rows, "./gone")
    assert "limit: found 0" in message_of(load_rows, str(tmp_path), limit=0)
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "state.json").write_text("{}")
    assert "not a directory saved by datasets" in message_of(load_rows, str(saved))


def test_rows_in_memory_say_where_they_are():
    assert rows_from_list([{}, {}], "prompts").where(1) == "prompts: row 1"
