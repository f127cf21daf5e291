"""The same rows in every format are the same rows, and every fault is one line with its place."""

import csv
import gzip
import io
import json
import random
import shutil
import subprocess
from pathlib import Path

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from data_helpers import message_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neuroada_jax.data import json_stream
from neuroada_jax.data.readers import SUFFIXES
from neuroada_jax.data.rows import Rows, load_rows
from neuroada_jax.errors import UserError

ROWS = [{"prompt": f'q{i}, "so"\n', "completion": f"a\t{i} é🙂"} for i in range(6)]
TEXT_FORMATS = ("jsonl", "json", "wrapped.json", "lines.json", "csv", "tsv")
FORMATS = (*TEXT_FORMATS, "parquet", "arrow", "stream.arrow", "feather", "saved")


def separated(rows, delimiter):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def content(kind: str, rows: list[dict]) -> bytes:
    table = pyarrow.Table.from_pylist(rows)
    buffer = pyarrow.BufferOutputStream()
    match kind:
        case "jsonl" | "lines.json":
            return "".join(json.dumps(row) + "\n" for row in rows).encode()
        case "json":
            return json.dumps(rows, indent=2, ensure_ascii=False).encode()
        case "wrapped.json":
            about = {"version": 1, "tags": ["a"], "data": rows, "more": {"data": []}, "none": []}
            return json.dumps(about, indent=1).encode()
        case "csv" | "tsv":
            return separated(rows, "," if kind == "csv" else "\t").encode()
        case "parquet":
            pyarrow.parquet.write_table(table, buffer, row_group_size=4, compression="none")
        case "feather":
            pyarrow.feather.write_feather(table, buffer, compression="uncompressed")
        case "arrow":
            with pyarrow.ipc.new_file(buffer, table.schema) as file:
                file.write_table(table, max_chunksize=4)
        case "stream.arrow":
            with pyarrow.ipc.new_stream(buffer, table.schema) as file:
                file.write_table(table, max_chunksize=4)
    return buffer.getvalue().to_pybytes()


def write(folder: Path, kind: str, rows: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / (kind if kind == "saved" else f"x.{kind}")
    if kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        path.write_bytes(content(kind, rows))
    return path


def names_a_line(kind: str) -> bool:
    return kind in TEXT_FORMATS


def test_every_suffix_is_tried_here():
    tried = {"." + kind.rpartition(".")[2] for kind in FORMATS if kind != "saved"}
    assert tried == {suffix.removesuffix(".gz") for suffix in SUFFIXES}


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_rows_in_every_format(tmp_path, kind):
    path = write(tmp_path, kind, ROWS)
    rows = load_rows(str(path))
    assert rows.rows == ROWS
    assert load_rows(str(path), limit=5).rows == ROWS[:5]
    if not names_a_line(kind):
        assert [rows.where(i) for i in (0, 5)] == [f"{path}: row 0", f"{path}: row 5"]
        return
    lines = path.read_text(encoding="utf-8").split("\n")
    for i, row in enumerate(rows.rows):  # each row's line holds its answer, or a line soon after it
        number = int(rows.where(i).rpartition(":")[2])
        assert f"{i} " in "\n".join(lines[number - 1 : number + 3]), rows.where(i)
        assert row["completion"] == f"a\t{i} é🙂"
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert load_rows(str(packed)).rows == ROWS and load_rows(str(packed)).where(1).startswith(f"{packed}:")


LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
TEXTS = st.text(LETTERS | st.sampled_from(",;\t\"'\r\n\ufeff\u2028{}[]\\"), max_size=8)


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.fixed_dictionaries({"a": TEXTS.map(lambda t: t + "."), "b": TEXTS}), min_size=1, max_size=4))
def test_any_text_survives_every_format(tmp_path, kind, rows):
    assert load_rows(str(write(tmp_path, kind, rows))).rows == rows


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("kind", ["json", "wrapped.json", "lines.json"])
def test_json_is_read_in_pieces_of_any_size(tmp_path, monkeypatch, kind, piece):
    rows = [*ROWS, {"n": 12, "x": [1.5e3, True, None, {"é": []}], "prompt": "🙂" * 9}]
    path = write(tmp_path, kind, rows)
    expected = load_rows(str(path))
    monkeypatch.setattr(json_stream, "PIECE", piece)
    found = load_rows(str(path))
    assert found.rows == rows and list(found.places) == list(expected.places)
    damaged = path.read_bytes().replace(b'"q4', b'"\xff4')
    path.write_bytes(damaged)
    assert f":{damaged[: damaged.index(0xFF)].count(10) + 1}: not UTF-8" in message_of(load_rows, str(path))


@pytest.mark.parametrize("kind", TEXT_FORMATS)
def test_a_byte_order_mark_is_no_text_and_other_encodings_are_refused_by_name(tmp_path, kind):
    path = write(tmp_path, kind, ROWS)
    plain = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + plain)
    assert load_rows(str(path)).rows == ROWS
    for encoding, name in (("utf-16", "UTF-16"), ("utf-32", "UTF-32")):
        path.write_bytes(plain.decode().encode(encoding))
        message = message_of(load_rows, str(path))
        assert message.startswith(f"{path}: {name} text, expected UTF-8; convert it: iconv -f {name} -t UTF-8 ")
    for bad, says in ((b"\xe9,", "not UTF-8 (byte 0xe9"), (b"\0", "found a NUL byte")):
        at = plain.index(b"3 ")
        path.write_bytes(plain[:at] + bad + plain[at:])
        line = plain.count(b"\n", 0, at) + 1
        message = message_of(load_rows, str(path))
        assert message.startswith(f"{path}:{line}: ") and says in message
        assert "convert" not in message or "\\u" in plain.decode()  # other characters of it are UTF-8, which is damaged


@pytest.mark.skipif(shutil.which("iconv") is None, reason="the command that messages name is not installed")
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x y.csv", "x.tsv.gz"])
@pytest.mark.parametrize(
    "encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
def test_the_command_that_a_message_names_converts_the_file(tmp_path, name, encoding):
    rows = [{"prompt": "caf\u00e9", "completion": "\u2019" if encoding == "cp1252" else "\u00fc"}] * 2
    kind = name.removesuffix(".gz").rpartition(".")[2]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) if "js" in kind else content(kind, rows).decode()
    path = tmp_path / name
    path.write_bytes((gzip.compress if name.endswith(".gz") else bytes)(text.encode(encoding)))
    message = message_of(load_rows, str(path))
    subprocess.run(message.partition("convert it: ")[2], shell=True, check=True)
    assert load_rows(str(tmp_path / f"utf8-{name}")).rows == rows


DIGITS, TWICE = "9" * 5000, '{"b": 1, "c": 2, "b": 1}'
CSV_FAULTS = [
    ('a,b\n1,"2\n3,4\n', 2, "a double quote opens a field and none closes it"),
    ('a,b\n1,2\n"3"x,4\n', 3, "found text after a closing double quote"),
    ("a,b\n\n1,2\n1,2,3\n", 4, "found 3 fields, expected 2 as in the header (a, b)"),
    ('a,b\n"1\n1",2\n1\n', 4, "found 1 field, expected 2"),
    ("a,b,a\n1,2,3\n", 1, "two columns are named 'a'"),
    ("a;b\n1;2\n", 1, "found one column 'a;b', expected columns separated by commas"),
    ("a,b\r1,2\r3,4\r", 1, "found a carriage return inside a line"),
]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
@pytest.mark.parametrize("text, line, says", CSV_FAULTS)
def test_broken_tables_of_text(tmp_path, kind, text, line, says):
    path = tmp_path / f"x.{kind}"
    if kind == "tsv":
        text, says = text.replace(",", "\t"), says.replace("by commas", "by tabs")
    path.write_text(text, newline="")
    message = message_of(load_rows, str(path))
    assert message.startswith(f"{path}:{line}: ") and says in message


def test_what_tables_of_text_may_have(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(',prompt, completion \r\n\r\n0,"a ""b""\r\nc",\r\n1,x y,' + "z" * 200_000, newline="")
    assert load_rows(str(path)).rows == [
        {"column 1": "0", "prompt": 'a "b"\r\nc', "completion": ""},
        {"column 1": "1", "prompt": "x y", "completion": "z" * 200_000},
    ]
    assert [load_rows(str(path)).where(i) for i in (0, 1)] == [f"{path}:3", f"{path}:5"]
    path.write_text("text\na\nb\n")
    assert load_rows(str(path)).rows == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("kind", ["jsonl", "json", "wrapped.json", "lines.json"])
@pytest.mark.parametrize("value", [DIGITS, "[" * 100_000, "x", TWICE])
def test_json_values_that_cannot_be_read(tmp_path, kind, value):
    known = {DIGITS: "an integer of more than 4,300 digits", "x": "not JSON", TWICE: "an object has the name 'b' twice"}
    says = known.get(value, "nested too deeply")
    path = tmp_path / f"x.{kind}"
    plain = content(kind, ROWS).decode()
    at = plain.index('"q3')
    path.write_text(plain[:at] + value + plain[at:])
    if value != "x":  # of those, the line of the row is known
        at = plain.rindex("{", 0, at)
    message = message_of(load_rows, str(path))
    assert message.startswith(f"{path}:{plain.count(chr(10), 0, at) + 1}: ") and says in message


def test_objects_around_a_list_of_rows(tmp_path):
    path = tmp_path / "x.json"
    for key in ("data", "rows", "examples", "train", "anything"):
        path.write_text(json.dumps({"version": 2, key: ROWS}))
        assert load_rows(str(path), "validation").rows == ROWS
    path.write_text(json.dumps({"train": ROWS, "test": ROWS[:2]}, indent=1))
    assert load_rows(str(path)).rows == ROWS and load_rows(str(path), "test").rows == ROWS[:2]
    assert load_rows(str(path), "test").where(0) == f"{path}:29"
    message = message_of(load_rows, str(path), "dev")
    assert message == (
        f"{path}: found lists of objects under 'train', 'test', expected one, or one of the split's name 'dev'"
    )
    for row in ({"messages": [{"role": "user", "content": "x"}]}, {"prompt": [{}], "completion": [{}]}, {"a": {"b": 1}}):
        path.write_text(json.dumps(row, indent=1))  # one row, on several lines
        assert load_rows(str(path)).rows == [row]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream.arrow", "feather"])
def test_texts_in_tables_that_are_not_utf8(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    path.write_bytes(content(kind, ROWS).replace(b"a\t4 ", b"a\t\xff ").replace(b"a\t3 ", b"a\t\xff "))
    assert message_of(load_rows, str(path)) == f"{path}: row 3: column 'completion': not UTF-8, expected UTF-8 text"
    path.write_bytes(b"PAR1" + b"\0" * 40)
    assert message_of(load_rows, str(path)).startswith(f"{path}: ")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_of_one_name_in_tables(tmp_path, kind):
    table = pyarrow.table([["a"], ["b"]], names=["x", "x"])
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        pyarrow.feather.write_feather(table, path)
    assert message_of(load_rows, str(path)) == f"{path}: two columns are named 'x', expected names that differ"


def mutated(data: bytes, seed: int) -> bytes:
    """The bytes with one of six kinds of damage."""
    rng = random.Random(seed)
    at, found = rng.randrange(len(data)), bytearray(data)
    match seed % 6:
        case 0:
            found[at] ^= 1 << rng.randrange(8)
        case 1:
            found[at] = rng.randrange(256)
        case 2:
            del found[at:]
        case 3:
            del found[at : at + rng.randrange(1, 9)]
        case 4:
            found[at:at] = rng.choice([b'"', b"\0", b"\xff", b"\n", b"\r", b",", b"[", b"{", b"\xed\xa0\x80", b"9" * 5000])
        case 5:
            found[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\0\0\0\x80"])
    return bytes(found)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "saved"])
def test_damaged_files_are_rows_or_one_line(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    plain, accepted = content(kind, ROWS), 0
    for seed in range(120):
        path.write_bytes(mutated(plain, seed))
        found = rows_or_message(path)
        accepted += isinstance(found, Rows)
        assert isinstance(found, Rows) or (found.startswith(str(path)) and "\n" not in found), (seed, found)
    assert 0 < accepted < 120


def rows_or_message(path: Path) -> Rows | str:
    try:
        return load_rows(str(path))
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("suffix", ["json.gz", "csv.gz"])
def test_damaged_gzip_files(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    packed = gzip.compress(content(suffix.removesuffix(".gz"), ROWS * 50))
    for data in (b"nothing packed", packed[: len(packed) // 2], packed[:-8] + b"\0" * 8):
        path.write_bytes(data)
        assert message_of(load_rows, str(path)).startswith(f"{path}: not a complete gzip file (")


def test_a_damaged_saved_directory(tmp_path):
    path = write(tmp_path, "saved", ROWS)
    arrow = next(path.glob("*.arrow"))
    plain = arrow.read_bytes()
    arrow.write_bytes(plain.replace(b"a\t4 ", b"a\t\xff "))
    assert message_of(load_rows, str(path)).startswith(f"{path}: row 4: column 'completion': not UTF-8")
    arrow.write_bytes(plain[:100])
    assert message_of(load_rows, str(path)).startswith(f"{path}: ")
