"""Files, directories and hub names become rows that know their line."""

import gzip
import io
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from data_helpers import message_of, write_lines

from neuroada_jax.data import row_store
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
        ("x.json", '[{"a": 1},\n\n7]', 3, "found a number, expected an object"),
        ("x.json", '[{"a": 1}\n', 2, "not closed"),
        ("x.json", '[{"a": 1},\n]', 2, "not JSON"),
        ("x.json", "[]\n\n{}", 3, "after the list"),
        ("x.json", '{\n"a": 1', 2, "not JSON (the object is not closed)"),
        ("x.json", '{\n"a": 1}\n{"a": 2}', 1, "expected one object per line"),
        ("x.json", '{"a":\n[{"b": 1},\n{"b" 2}]}', 3, "not JSON"),
        ("x.json", '{"a"\n 1}', 2, "a key has no value"),
        ("x.json", "{a: 1}", 1, "a key is not in double quotes"),
        ("x.jsonl", b'{"a": "b"}\n{"a": "\xff"}\n', 2, "not UTF-8 (byte 0xff: invalid start byte)"),
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
        ("x.txt", b"a,b\n", "unknown kind of file"),
        ("x.csv", b"a,b\n", "no rows"),
        ("empty.csv", b"\n\n", "the file is empty, expected a header line"),
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


def test_lists_and_patterns_of_files_keep_the_places_of_each(tmp_path):
    first, second = write_lines(tmp_path / "a.jsonl", ROWS[:2]), tmp_path / "b.csv"
    second.write_text("instruction,output\nq2,a2\nq3,a3\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[4:]), tmp_path / "c.parquet")
    sources = [str(first), str(second), str(tmp_path / "c.parquet")]
    for source in (sources, str(tmp_path / "?.*"), [str(tmp_path / "[ab].*"), sources[2]]):
        rows = load_rows(source)
        assert rows.rows == ROWS
        assert [rows.where(i) for i in (1, 2, 4)] == [f"{first}:2", f"{second}:2", f"{sources[2]}: row 0"]
    assert load_rows(sources, limit=3).rows == ROWS[:3]
    assert load_rows(sources).source == ", ".join(sources)
    assert message_of(load_rows, str(tmp_path / "*.json")) == f"{tmp_path / '*.json'}: no file has such a name"
    assert "found an empty list" in message_of(load_rows, [])
    assert "gone.csv: no such file" in message_of(load_rows, [*sources, str(tmp_path / "gone.csv")])
    write_lines(tmp_path / "a.json", ROWS)
    assert "the same rows in several formats (a.json, a.jsonl)" in message_of(load_rows, str(tmp_path))


def test_columns_rename_fields(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("id,question,answer\n1,q,a\n2,r,b\n")
    columns = {"prompt": "question", "completion": "answer"}
    rows = load_rows(str(path), columns=columns)
    assert rows.rows == [{"id": "1", "prompt": "q", "completion": "a"}, {"id": "2", "prompt": "r", "completion": "b"}]
    assert load_rows(str(path), columns={"question": "answer", "answer": "question"}).rows[0] == {
        "id": "1",
        "answer": "q",
        "question": "a",
    }
    message = message_of(load_rows, str(path), columns={"prompt": "qestion"})
    assert message == f"{path}: columns.prompt: no column 'qestion', found id, question, answer; did you mean 'question'?"
    assert message_of(load_rows, str(path), columns={"question": "answer"}).startswith(
        f"{path}:2: columns.question: found a column 'question' beside 'answer', expected one of them"
    )
    twice = message_of(load_rows, str(path), columns={"prompt": "question", "instruction": "question"})
    assert twice == "columns: column 'question' is given twice, expected one field for each column"


def test_columns_of_several_files(tmp_path):
    own = write_lines(tmp_path / "own.jsonl", [{"prompt": "p", "completion": "c"}])
    named = write_lines(
        tmp_path / "named.jsonl", [{"q": "p", "completion": "c"}, {"completion": "c", "q": "p", "context": "x"}]
    )
    columns = {"prompt": "q"}
    assert [row["prompt"] for row in load_rows([str(own), str(named)], columns=columns).rows] == ["p"] * 3
    assert "own.jsonl: columns.prompt: no column 'q', found prompt" in message_of(load_rows, str(own), columns=columns)
    # a column that only some rows have
    assert load_rows(str(named), columns={"input": "context"}).rows[1]["input"] == "x"
    message = message_of(load_rows, [str(own), str(named)], columns={"input": "context"})
    assert message.startswith(f"{own}: columns.input: no column 'context', found prompt, completion")


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet"])
def test_many_rows_lie_on_disk(tmp_path, name):
    path, many = tmp_path / name, [{"a": f"row {i}", "b": "é"} for i in range(row_store.IN_MEMORY + row_store.BLOCK + 3)]
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(many), path)
    elif name.endswith("csv"):
        path.write_text("a,b\n" + "".join(f"{row['a']},{row['b']}\n" for row in many))
    else:
        write_lines(path, many if name.endswith("jsonl") else [json.dumps(many)])
    rows = load_rows(str(path))
    assert not isinstance(rows.rows, list) and len(rows) == len(many)
    assert list(rows.rows) == many and rows.rows[-1] == many[-1] and rows.rows[5:7] == many[5:7]
    last = len(many) - 1
    part = rows.part([last, 0, 4000, last])
    assert part.rows == [many[i] for i in (last, 0, 4000, last)]
    assert part.where(0) == rows.where(last) and part.where(1) == rows.where(0)
    upper = rows.converted(lambda row, where: {"a": row["a"].upper(), "where": where})
    assert upper.rows[last] == {"a": f"ROW {last}", "where": rows.where(last)} and len(upper) == len(rows)
    with pytest.raises(IndexError):
        rows.rows[len(many)]


def test_a_full_temporary_folder_is_named(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(row_store.tempfile, "TemporaryFile", lambda prefix: Full())
    path = write_lines(tmp_path / "x.jsonl", [{"a": 1}] * (row_store.IN_MEMORY + 1))
    assert "rows cannot be written to this temporary folder (No space left on device)" in message_of(load_rows, str(path))
