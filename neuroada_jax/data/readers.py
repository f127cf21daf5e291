"""Files of rows, format by format: each reader yields (file, line or row number, row), and its errors name the place."""

import csv
import gzip
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from neuroada_jax import files
from neuroada_jax.data import row_bounds
from neuroada_jax.data.chats import kind_of
from neuroada_jax.data.json_stream import JsonStream, reason, text_of, without_bom
from neuroada_jax.data.row_store import LargeRow
from neuroada_jax.errors import UserError

Record = tuple[str, int, dict[str, Any]]

LINE_SUFFIXES = tuple(f"{suffix}{gz}" for suffix in (".jsonl", ".json", ".csv", ".tsv") for gz in ("", ".gz"))
SUFFIXES = (*LINE_SUFFIXES, ".parquet", ".arrow", ".feather")  # their numbers are those of rows, from 0 on
_BUFFER = 2**20  # bytes of a column of a parquet file that are read at a time
BATCH = 4096  # rows of a table that are Python objects at a time
# An object with one of these fields is a row; another may be a file's object around the list of its rows.
_FIELDS_OF_ROWS = {"messages", "conversations", "prompt", "instruction", "text"}
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_A_LIST = "a list of objects, or one object per line"


def read_file(path: Path, split: str, limit: int | None) -> Iterator[Record]:
    """Yield the records of a file.

    Args:
      path: of one of `SUFFIXES`.
      split: chooses among several lists of rows in a .json file.
      limit: rows that will be used at most.

    Raises:
      UserError: an unknown kind of file, or one that is damaged; names the line or row.
    """
    name = path.name.lower()
    stem = name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            yield from _parquet(path, limit)
        elif name.endswith((".arrow", ".feather")):
            yield from _arrow(path)
        elif stem.endswith(".jsonl"):
            yield from _json_lines(path)
        elif stem.endswith(".json"):
            yield from _json(path, split)
        elif stem.endswith(".csv"):
            yield from _separated(path, ",", "commas")
        elif stem.endswith(".tsv"):
            yield from _separated(path, "\t", "tabs")
        else:
            raise UserError(f"{path}: unknown kind of file, expected one of {', '.join(SUFFIXES)}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a complete gzip file ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of each line, with its end."""
    # Bytes, not text: only "\n" ends a line, and an error can name the line that is not UTF-8.
    with row_bounds.open_bytes(path) as file:
        for number in itertools.count(1):
            line = file.readline(row_bounds.LARGEST_ROW + 1)
            if not line:
                return
            if len(line) > row_bounds.LARGEST_ROW:
                raise UserError(
                    f"{path}:{number}: a line of more than {row_bounds.LARGEST_ROW:,} bytes, expected shorter rows"
                )
            yield number, text_of(without_bom(line, path) if number == 1 else line, path, number)


def _json_lines(path: Path) -> Iterator[Record]:
    empty = True
    for number, line in _lines(path):
        if not line.strip():
            continue
        empty = False
        try:
            row = json.loads(line, object_pairs_hook=files.unique_names)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not JSON ({reason(error)}), expected one object per line") from error
        yield str(path), number, _object(row, path, number, line)
    if empty:
        raise UserError(f"{path}: the file is empty, expected one JSON object per line")


def _object(row: object, path: Path, number: int, text: str | None = None) -> dict[str, Any]:
    """Return a row of a JSON file; `text` is its text, where it is known."""
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: found {kind_of(row)}, expected an object")
    # A short line cannot be deep enough for code that recurses, and counting takes time for each of many rows.
    if text is None or (len(text) > 512 and text.count("[") + text.count("{") > files.DEEPEST_JSON):
        _check_depth(row, f"{path}:{number}")
    if text is None or _SURROGATE_ESCAPE.search(text):
        check_characters(row, f"{path}:{number}")
    return row if text is not None and len(text) <= row_bounds.LONG else LargeRow(row)


def _check_depth(row: dict[str, Any], where: str) -> None:
    if files.is_deeper(row):
        raise UserError(f"{where}: more than {files.DEEPEST_JSON} lists and objects stand inside one another")


def check_characters(row: Mapping[str, Any], where: str) -> None:
    """Check that the texts of a row are made of complete characters, which tokenizers need.

    Raises:
      UserError: half of a surrogate pair, such as "\\ud83d" in JSON; names the row and the field.
    """
    for field, value in row.items():
        if files.has_half_characters(field) or files.has_half_characters(value):
            raise UserError(
                f"{where}: field {field!r} holds half of a surrogate pair (such as \\ud83d), expected complete characters"
            )


def _json(path: Path, split: str) -> Iterator[Record]:
    """Read a list of objects, an object around such a list, one object, or an object per line."""
    with row_bounds.open_bytes(path) as file:
        stream = JsonStream(path, file, _A_LIST)
        first = stream.peek()
        if not first:
            raise UserError(f"{path}: the file is empty, expected {_A_LIST}")
        if first == "[":
            yield from _checked_items(path, stream, stream.items())
            if stream.peek():
                raise UserError(f"{path}:{stream.line}: found text after the list, expected a list of objects")
            return
        if first != "{":
            _object(stream.value(), path, stream.line)
        lists: dict[str, bool] = {}  # key -> whether all items of its list are objects
        fields = set()
        for key, _, value, is_item in stream.members():
            fields.add(key)
            if is_item:
                lists[key] = lists.get(key, True) and isinstance(value, dict)
        more = bool(stream.peek())
    keys = [key for key, holds in lists.items() if holds]
    if more:
        yield from _json_lines(path)
    elif not keys or fields & _FIELDS_OF_ROWS:
        with row_bounds.open_bytes(path) as file:
            stream = JsonStream(path, file, _A_LIST)
            stream.peek()
            yield str(path), stream.line, _object(stream.value(), path, stream.line)
    elif len(keys) > 1 and split not in keys:
        raise UserError(
            f"{path}: found lists of objects under {', '.join(map(repr, keys))}, expected one, or one of the split's name "
            f"{split!r}"
        )
    else:
        chosen = split if split in keys else keys[0]
        with row_bounds.open_bytes(path) as file:
            stream = JsonStream(path, file, _A_LIST)
            stream.peek()
            items = ((line, row) for key, line, row, _ in stream.members() if key == chosen)
            yield from _checked_items(path, stream, items)


def _checked_items(path: Path, stream: JsonStream, items: Iterable[tuple[int, Any]]) -> Iterator[Record]:
    for line, row in items:
        yield str(path), line, _object(row, path, line, stream.text)


def _separated(path: Path, delimiter: str, separators: str) -> Iterator[Record]:
    """Read a header line and rows in the form of RFC 4180, with commas or tabs between the fields."""
    # Of the process; the default, 131,072 characters, is shorter than some documents.
    csv.field_size_limit(row_bounds.LARGEST_ROW)
    lines = _OfOneRow(path)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] = []
    start = 1
    try:
        for values in reader:
            size, lines.size = lines.size, 0
            if names and values:
                if len(values) != len(names):
                    shown = ", ".join(names[:20]) + ", ..." * (len(names) > 20)
                    raise UserError(
                        f"{path}:{start}: found {_count(values)}, expected {len(names)} as in the header ({shown}); a "
                        f"field with {separators}, quotes or line breaks stands in double quotes"
                    )
                row = dict(zip(names, values, strict=True))
                yield str(path), start, row if size <= row_bounds.LONG else LargeRow(row)
            elif values:
                names = _header(values, path, start, delimiter, separators)
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(_broken_field(str(error), path, start, reader.line_num)) from error
    if not names:
        raise UserError(f"{path}: the file is empty, expected a header line and rows")


def _count(values: list[str]) -> str:
    return f"{len(values)} field{'' if len(values) == 1 else 's'}"


def _header(values: list[str], path: Path, line: int, delimiter: str, separators: str) -> list[str]:
    """Return the names of the columns; one without a name, as pandas writes its index, is called 'column 1'."""
    names = [value.strip() or f"column {number}" for number, value in enumerate(values, start=1)]
    other = next((sign for sign in ",;\t" if sign != delimiter and sign in names[0]), None)
    if len(names) == 1 and other:
        raise UserError(f"{path}:{line}: found one column {names[0]!r}, expected columns separated by {separators}")
    _check_columns(names, f"{path}:{line}")
    return names


class _OfOneRow:
    """The lines of a file, of which those of one row are bounded.

    Attributes:
      size: of the row so far, which its reader sets to 0.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lines, self.size = path, _lines(path), 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, line = next(self._lines)
        self.size += len(line)
        if self.size > row_bounds.LARGEST_ROW:
            raise UserError(
                f"{self._path}:{number}: a row of more than {row_bounds.LARGEST_ROW:,} characters ends here or later"
            )
        return line


def _check_columns(names: list[str], where: str) -> None:
    if len(names) > row_bounds.MOST_COLUMNS:
        raise UserError(f"{where}: {len(names):,} columns, expected at most {row_bounds.MOST_COLUMNS:,}")
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{where}: two columns are named {name!r}, expected names that differ")


def _broken_field(error: str, path: Path, start: int, line: int) -> str:
    if "end of data" in error:
        return f"{path}:{start}: a double quote opens a field and none closes it, expected one before the next field"
    if "expected after" in error:
        return f"{path}:{line}: found text after a closing double quote; a quote inside a quoted field is written twice"
    if "new-line" in error:
        return f"{path}:{line}: found a carriage return inside a line, expected lines that end with LF or CR LF"
    return f"{path}:{line}: {error}"


def _parquet(path: Path, limit: int | None) -> Iterator[Record]:
    import pyarrow.parquet

    done, size = 0, row_bounds.file_bytes(path)
    for rows in (min(limit or BATCH, BATCH), 32, 1):
        try:
            with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER) as file:
                batches = file.iter_batches(batch_size=rows, use_threads=False)
                for record in itertools.islice(table_rows(str(path), batches, size), done, None):
                    yield record
                    done += 1
                return
        except row_bounds.TooLarge:
            continue
        except damage() as error:
            raise UserError(f"{path}: not a parquet file that can be read ({first_line(error)})") from error
    raise too_large(str(path))


def too_large(source: str) -> UserError:
    """Return the error for a file whose batches unpack to too much."""
    return UserError(
        f"{source}: rows that unpack to more than {row_bounds.LARGEST_BATCH:,} bytes at once besides the file's own size"
    )


def _arrow(path: Path) -> Iterator[Record]:
    """Read Arrow's stream format, as `datasets` writes it, or its file format, as Feather is."""
    import pyarrow.ipc

    size = row_bounds.file_bytes(path)
    try:
        with closing(pyarrow.OSFile(str(path))) as source:
            options = pyarrow.ipc.IpcReadOptions(use_threads=False)
            start = source.read(6)
            source.seek(0)
            if start[:4] == b"FEA1":
                raise UserError(f"{path}: Feather of version 1, expected version 2 or an Arrow file")
            if start == b"ARROW1":
                file = _limited(size, lambda: pyarrow.ipc.open_file(source, options=options))
                yield from table_rows(str(path), (file.get_batch(i) for i in range(file.num_record_batches)), size)
            else:
                yield from table_rows(
                    str(path), _limited(size, lambda: pyarrow.ipc.open_stream(source, options=options)), size
                )
    except row_bounds.TooLarge:
        raise too_large(str(path)) from None
    except damage() as error:
        raise UserError(f"{path}: not an Arrow file that can be read ({first_line(error)})") from error


def damage() -> tuple[type[Exception], ...]:
    """Return what Arrow raises for damaged files."""
    import pyarrow

    return pyarrow.ArrowException, ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError


def _limited(size: int, work: Callable[[], Any]) -> Any:
    with row_bounds.limited_memory(size):
        return work()


def table_rows(source: str, batches: Iterable[Any], size: int) -> Iterator[Record]:
    """Yield the rows of Arrow's record batches or tables, numbered from 0 on.

    Args:
      source: the file or hub name.
      batches: of one schema.
      size: bytes of the files.

    Raises:
      UserError: two columns of one name, or a value that is damaged; names the row and the column.
      TooLarge: a batch unpacks to too much.
    """
    number = 0
    for batch, is_large in row_bounds.decoded(iter(batches), size):
        _check_columns(batch.schema.names, source)
        for first in range(0, batch.num_rows, BATCH):
            rows = _python_rows(source, number, batch.slice(first, BATCH), is_large is not None)
            for row in map(LargeRow, rows) if is_large else rows:
                yield source, number, row
                number += 1


def _python_rows(source: str, number: int, batch: Any, is_valid: bool) -> list[dict[str, Any]]:
    """Return a batch as dicts; `number` is that of its first row, for messages."""
    try:
        if not is_valid:
            batch.validate(full=True)  # says what is wrong; damaged offsets would otherwise read memory of others
        return list(batch.to_pylist())
    except damage() as error:
        place, found = _damaged(number, batch) or (f"rows from {number} on", error)
        if "UTF" in str(found).upper() or isinstance(found, UnicodeDecodeError):
            raise UserError(f"{source}: {place}: not UTF-8, expected UTF-8 text") from error
        raise UserError(f"{source}: {place}: cannot be read ({first_line(found)})") from error


def _damaged(number: int, batch: Any) -> tuple[str, Exception] | None:
    """Return the place of the first value that cannot be read, and its error."""
    for i in range(batch.num_rows):
        for name in batch.schema.names:
            try:
                value = batch.column(name).slice(i, 1)
                value.validate(full=True)
                value.to_pylist()
            except damage() as error:
                return f"row {number + i}: column {name!r}", error
    return None


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return str(text).splitlines()[0]
