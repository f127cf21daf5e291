"""Reading rows from a file, a directory or the hub, with the place that each row came from."""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroada_jax.errors import UserError
from neuroada_jax.files import read_json

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
# A file whose name has one of these words belongs to that split, and one that has none of them to "train". A name with
# words of two splits, such as dev1000_from_train, belongs to neither: it is read only for a split of another name.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


@dataclass(frozen=True)
class Rows:
    """Rows in file order.

    Attributes:
      rows: one dict a row, with the values of the file (checked when they are rendered, not here).
      source: the name that the user gave, for error messages.
      places: (file, number) of each row; the number is a line for JSON and a row for other formats.
    """

    rows: list[dict]
    source: str
    places: list[tuple[str, int]]

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """Return the place of a row: 'file:line', or 'file: row 3' (counted from 0) for sources without lines."""
        file, number = self.places[index]
        return f"{file}:{number}" if file.lower().endswith(JSON_SUFFIXES) else f"{file}: row {number}"

    def part(self, numbers: Iterable[int]) -> "Rows":
        """Return the rows with these numbers, in the order given."""
        chosen = list(numbers)
        return Rows([self.rows[i] for i in chosen], self.source, [self.places[i] for i in chosen])


def rows_from_list(rows: list[dict], source: str = "rows") -> Rows:
    """Wrap rows that are in memory; error messages name them '<source>: row <index>'."""
    return _checked(Rows(rows, source, [(source, index) for index in range(len(rows))]))


def load_rows(source: str, split: str = "train", limit: int | None = None) -> Rows:
    """Read rows.

    Args:
      source: a .json (list of objects, or JSON lines), .jsonl or .parquet file, JSON also with .gz; a directory written by
        `datasets` (`save_to_disk`), or one with such files; or a hub name such as `tatsu-lab/alpaca`, with a colon before
        the name of a configuration: `nyu-mll/glue:mrpc`.
      split: the split of a hub name or of a saved DatasetDict; of a directory, the files whose names have the split's name
        (files that name no split are "train", files that name two are neither). A single file is read whatever the split.
      limit: the number of rows to read, from the first on; None for all.

    Raises:
      UserError: nothing there, an unknown kind of file, an unknown split or one that is two sets (MNLI's validation), no
        rows, invalid JSON, or a row that is not an object.
    """
    source = str(source)
    if limit is not None and limit < 1:
        raise UserError(f"limit: found {limit}, expected a positive number of rows")
    path = Path(source)
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            records = _from_datasets(source, split, limit, _load_from_disk)
        else:
            records = _take((record for file in _files_of(path, split) for record in _read_file(file, limit)), limit)
    elif path.exists():
        records = _take(_read_file(path, limit), limit)
    elif source.lower().endswith(SUFFIXES) or not HUB_NAME.fullmatch(source) or source[0] == ".":
        raise UserError(f"{source}: no such file or directory")
    else:
        records = _from_datasets(source, split, limit, _load_from_hub)
    rows, places = [], []
    for file, number, row in records:
        rows.append(row)
        places.append((file, number))
    if not rows:
        raise UserError(f"{source}: no rows, expected at least one")
    return _checked(Rows(rows, source, places))


def _checked(rows: Rows) -> Rows:
    """Return the rows, after a check that their texts are made of complete characters, which tokenizers need.

    Raises:
      UserError: half of a surrogate pair, such as "\\ud83d" in JSON; names the row and the field.
    """
    for i, row in enumerate(rows.rows):
        for field, value in row.items():
            if _has_half_characters(value):
                raise UserError(
                    f"{rows.where(i)}: field {field!r} holds half of a surrogate pair (such as \\ud83d), expected complete "
                    "characters"
                )
    return rows


def _has_half_characters(value: object) -> bool:
    if isinstance(value, str):
        return not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, Mapping):
        return any(_has_half_characters(each) for pair in value.items() for each in pair)
    return isinstance(value, list | tuple) and any(map(_has_half_characters, value))


def _take(records: Iterator, limit: int | None) -> Iterator:
    for count, record in enumerate(records, start=1):
        yield record
        if count == limit:
            return


def _data_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file() and path.name.lower().endswith(SUFFIXES))


def _files_of(directory: Path, split: str) -> list[Path]:
    files = _data_files(directory)
    if not files:
        raise UserError(f"{directory}: no data files in this directory, expected some of {', '.join(SUFFIXES)}")
    chosen = _of_split(files, split)
    if not chosen:
        names = ", ".join(file.name for file in files[:5])
        raise UserError(f"{directory}: no file for split {split!r}, found {names}{' ...' if len(files) > 5 else ''}")
    if len({"mismatched" in _words(file.name) for file in chosen if _words(file.name) & {"matched", "mismatched"}}) > 1:
        raise UserError(
            f"{directory}: split {split!r} is two sets here; name one of them: {split}_matched or {split}_mismatched"
        )
    return chosen


def _of_split(files: list[Path], split: str) -> list[Path]:
    """Return the files of a split; for a split that is not in SPLIT_WORDS, those whose names have all its words."""
    if split not in SPLIT_WORDS:
        asked = set(re.findall(r"[a-z0-9]+", split.lower()))
        return [file for file in files if asked <= _words(file.name)]
    kinds = {file: [kind for kind, words in SPLIT_WORDS.items() if words & _words(file.name)] for file in files}
    chosen = [file for file in files if kinds[file] == [split]]
    return chosen if chosen or split != "train" else [file for file in files if not kinds[file]]


def _words(name: str) -> set[str]:
    """Return the words of a file's name, each with and without the digits at its end."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return {*words, *(word.rstrip("0123456789") for word in words)}


def has_split(directory: Path, split: str) -> bool:
    """Return whether a directory has rows of a split, judged by the names of its files."""
    if not directory.is_dir():
        return False
    if (directory / "dataset_dict.json").exists():
        return split in read_json(directory / "dataset_dict.json").get("splits", [])
    return (directory / "state.json").exists() or bool(_of_split(_data_files(directory), split))


def _read_file(path: Path, limit: int | None) -> Iterator[tuple[str, int, dict]]:
    """Yield the (file, line or row number, row) records of a file."""
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            yield from _read_parquet(path, limit)
        elif name.endswith((".json", ".json.gz")):
            yield from _read_json(path)
        elif name.endswith((".jsonl", ".jsonl.gz")):
            yield from _read_json_lines(path)
        else:
            raise UserError(f"{path}: unknown kind of file, expected one of {', '.join(SUFFIXES)}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a complete gzip file ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _open(path: Path) -> Any:
    # Bytes, not text: only "\n" ends a line, and an error can name the line that is not UTF-8.
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


def _read_json_lines(path: Path) -> Iterator[tuple[str, int, dict]]:
    empty = True
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            empty = False
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}:{number}: not JSON ({getattr(error, 'msg', error)}), expected one object per line"
                ) from error
            yield str(path), number, _object(row, path, number)
    if empty:
        raise UserError(f"{path}: the file is empty, expected one JSON object per line")


def _read_json(path: Path) -> Iterator[tuple[str, int, dict]]:
    with _open(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason}), expected JSON") from error
    if text.lstrip()[:1] == "[":
        yield from _read_json_list(path, text)
    else:
        yield from _read_json_lines(path)


def _read_json_list(path: Path, text: str) -> Iterator[tuple[str, int, dict]]:
    """Decode one item at a time, since `json.loads` of the complete text does not report the line of an item."""
    decoder = json.JSONDecoder()
    at = _past_space(text, text.index("[") + 1)
    line, counted = 1, 0

    def line_of(position: int) -> int:
        nonlocal line, counted
        line += text.count("\n", counted, position)
        counted = position
        return line

    more = text[at : at + 1] != "]"
    while more:
        number = line_of(at)
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}), expected a list of objects") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nesting without end
            raise UserError(f"{path}:{number}: not JSON that can be read ({error})") from error
        yield str(path), number, _object(row, path, number)
        at = _past_space(text, at)
        more = text[at : at + 1] == ","
        if more:
            at = _past_space(text, at + 1)
        elif text[at : at + 1] != "]":
            raise UserError(f"{path}:{line_of(at)}: not JSON (the list is not closed), expected a list of objects")
    end = _past_space(text, at + 1)
    if end != len(text):
        raise UserError(f"{path}:{line_of(end)}: found text after the list, expected a list of objects")


def _past_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\n\r":
        at += 1
    return at


def _object(row: object, path: Path, number: int) -> dict:
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: found a {type(row).__name__}, expected an object")
    return row


def _read_parquet(path: Path, limit: int | None) -> Iterator[tuple[str, int, dict]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=min(limit or 4096, 4096)):
                for row in batch.to_pylist():
                    yield str(path), number, row
                    number += 1
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: a text of row {number} or one after it is not UTF-8 ({error.reason})") from error
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a parquet file ({_first_line(error)})") from error


def _from_datasets(source: str, split: str, limit: int | None, load: Callable) -> Iterator[tuple[str, int, dict]]:
    dataset = load(source, split)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    for number, row in enumerate(dataset.to_list()):
        yield source, number, row


def _load_from_disk(source: str, split: str) -> Any:
    import datasets

    try:
        dataset = datasets.load_from_disk(source)
    except Exception as error:  # of Arrow, JSON or the file system, for a damaged directory
        raise UserError(f"{source}: not a directory saved by datasets ({_first_line(error)})") from error
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if split not in dataset:
        raise UserError(f"{source}: no split {split!r}, found {', '.join(dataset)}")
    return dataset[split]


def _load_from_hub(source: str, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(*source.split(":"), split=split)
    except Exception as error:  # an unknown data set, an unknown split and no network raise different types
        raise UserError(
            f"{source}: no such file or directory, and as a hub data set it cannot be loaded ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
