"""Small files of rows that unpack to much, of every kind, are one line; large honest ones are read."""

import gzip
import random

import datasets
import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from data_helpers import message_of

from neuroada_jax.data import json_stream, row_bounds, row_store
from neuroada_jax.data.rows import load_rows

ROW = 2**16  # bytes of the longest row in these tests
TEXT = {
    ".jsonl": (b'{"prompt": "%s"}\n', b"", b""),
    ".json": (b'{"prompt": "%s"},\n', b"[", b"{}]"),
    ".csv": (b'"%s",b\n', b"prompt,completion\n", b""),
    ".tsv": (b'"%s"\tb\n', b"prompt\tcompletion\n", b""),
}
MANY = pyarrow.array(["a" * 2**20]).take(pyarrow.array(np.zeros(200, np.int32)))  # 200 MiB


@pytest.fixture(autouse=True)
def small_bounds(monkeypatch):
    monkeypatch.setattr(row_bounds, "LARGEST_ROW", ROW)
    monkeypatch.setattr(json_stream, "LARGEST_ROW", ROW)
    monkeypatch.setattr(json_stream, "PIECE", ROW // 4)
    monkeypatch.setattr(row_bounds, "UNPACKED", 2**17)
    monkeypatch.setattr(row_bounds, "LARGEST_BATCH", 2**26)
    monkeypatch.setattr(row_bounds, "MOST_BYTES", 2**26)
    monkeypatch.setattr(row_bounds, "TABLE_RATIO", 10)


@pytest.mark.parametrize("suffix", TEXT)
@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", ["value", "blank", "key", "list", "lines"])
def test_text(tmp_path, suffix, packed, kind):
    path, (row, before, after) = tmp_path / f"x{suffix}{packed}", TEXT[suffix]
    content = {
        "value": before + row % (b"a" * 2 * ROW) + after,
        "blank": b"\n" * 2 ** (18 if packed else 17) + before + row % b"a" + after,
        "key": b'[{"' + b"a" * 2 * ROW + b'": 1}]' if "json" in suffix else b"a" * 2 * ROW + b",b\n1,2\n",
        "list": b"[" * 2 + b"1," * 2 * ROW if "json" in suffix else b"a,b\n" + b"1," * 2 * ROW + b"\n",
        "lines": before + row % (b"\\n" * ROW if "json" in suffix else b"a\n" * ROW) + after,
    }[kind]
    path.write_bytes(gzip.compress(content) if packed else content)
    if kind == "blank" and not packed:
        assert load_rows(str(path)).rows[0]["prompt"] == "a"
    else:
        assert message_of(load_rows, str(path)).startswith(str(path))


@pytest.mark.parametrize("suffix", TEXT)
def test_gzip_files_of_honest_text_are_read_whatever_their_size(tmp_path, suffix):
    path, (row, before, after), rng = tmp_path / f"x{suffix}.gz", TEXT[suffix], random.Random(0)
    texts = [" ".join(rng.choices(["tea", "is", "what", "Ann", "likes"], k=1000)) for _ in range(600)]
    path.write_bytes(gzip.compress(before + b"".join(row % text.encode() for text in texts) + after, 1))
    rows = load_rows(str(path)).rows
    assert [each["prompt"] for each in rows[:600]] == texts
    path.write_bytes(gzip.compress(before + row % (b"tea " * 100) * 3000 + after))
    assert "unpacks to more than 100 times its size" in message_of(load_rows, str(path))


def parquet(codec, **options):
    return lambda table, path: pyarrow.parquet.write_table(table, path, compression=codec, **options)


TABLES = {
    **{
        f"{codec}-page.parquet": parquet(codec, use_dictionary=False, data_page_size=2**30)
        for codec in ("zstd", "gzip", "snappy")
    },
    "dictionary.parquet": parquet("zstd"),
    **{
        f"{codec}.feather": lambda table, path, codec=codec: pyarrow.feather.write_feather(
            table, str(path), compression=codec
        )
        for codec in ("zstd", "lz4")
    },
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path, name):
    path = tmp_path / name
    TABLES[name](pyarrow.table({"prompt": MANY}), path)
    assert path.stat().st_size < 2**24
    assert "unpack to more than" in message_of(load_rows, str(path))


SHARED = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(200, np.int8)), pyarrow.array(["a" * 2**20]))
ARRAYS = {
    "nulls": pyarrow.nulls(2**31 - 1),
    "lists of nulls": pyarrow.FixedSizeListArray.from_arrays(pyarrow.nulls(2**28), 2**28),
    "dictionary": SHARED,
    "nested dictionary": pyarrow.StructArray.from_arrays([SHARED], ["content"]),
    "dictionary of lists": pyarrow.DictionaryArray.from_arrays(
        pyarrow.array(np.zeros(2**12, np.int32)), pyarrow.array([list(range(2**16))])
    ),
    "views": pyarrow.Array.from_buffers(
        pyarrow.string_view(),
        200,
        [
            None,
            pyarrow.py_buffer(np.tile(np.array([2**20, 0x61616161, 0, 0], np.int32), 200)),
            pyarrow.py_buffer(b"a" * 2**20),
        ],
    ),
    "runs": pyarrow.RunEndEncodedArray.from_arrays(pyarrow.array([2**18], pyarrow.int32()), pyarrow.array(["a" * 2**20])),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_repeat_what_they_hold(tmp_path, name):
    path, table = tmp_path / "x.arrow", pyarrow.table({"prompt": ARRAYS[name]})
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert message_of(load_rows, str(path)).startswith(f"{path}: ")


def test_a_saved_data_set(tmp_path):
    datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk(str(tmp_path / "d"))
    file, table = tmp_path / "d" / "data-00000-of-00001.arrow", pyarrow.table({"prompt": MANY})
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    assert message_of(load_rows, str(tmp_path / "d")).startswith(f"{tmp_path / 'd'}: ")


def test_large_honest_tables_are_read(tmp_path):
    rng = np.random.default_rng(0)
    texts = [rng.integers(97, 123, 2**16, np.uint8).tobytes().decode() for _ in range(2**11)]  # 128 MiB
    pyarrow.parquet.write_table(pyarrow.table({"prompt": texts}), tmp_path / "x.parquet")
    rows = load_rows(str(tmp_path / "x.parquet")).rows
    assert not isinstance(rows, list) and [row["prompt"] for row in rows] == texts
    system = ["be short " * 500] * 10_000
    pyarrow.parquet.write_table(pyarrow.table({"system": system, "n": range(10_000)}), tmp_path / "y.parquet")
    assert len(load_rows(str(tmp_path / "y.parquet"))) == 10_000


def test_rows_of_long_texts_are_not_kept_in_memory():
    rows = row_store.stored(row_store.LargeRow({"prompt": "a" * 2**20, "n": i}) for i in range(20))
    assert not isinstance(rows, list) and [row["n"] for row in rows] == list(range(20)) and len(rows._starts) == 4


def test_what_is_no_regular_file(tmp_path):
    for name in ("x.jsonl", "y.jsonl.gz"):
        (tmp_path / name).symlink_to("/dev/zero")
        assert message_of(load_rows, str(tmp_path / name)).endswith("not a regular file, expected one")
