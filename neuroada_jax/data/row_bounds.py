"""Bounds on what files of rows unpack to, so that a small file cannot take all memory or hours.

Honest files of any size are read in a stream. A row, a gzip file and a batch of a table have bounds of their own.
"""

import contextlib
import gzip
import io
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from neuroada_jax.errors import UserError

LARGEST_ROW = 2**24  # characters or bytes of a row in a text file; a long novel has a fifth
LONG = 2**12  # characters of a row that is weighed before it is kept in memory
MOST_COLUMNS = 10_000
UNPACKED, RATIO = 2**26, 100  # bytes that any gzip file may unpack to, and times its size a larger one; text has 3 to 20
MOST_ROWS = 2**20  # of a table, and one more for every byte of its file: rows of nothing take no bytes
MOST_BYTES, TABLE_RATIO = 2**30, 1000  # the same of a table, where a system prompt of all rows takes almost no bytes
LARGEST_BATCH = 3 * 2**27  # bytes that decoding a batch of a table may take, besides four times the size of its file
PIECE = 2**26  # bytes of Python objects that are made of a batch at a time
_STACK = 10 * 2**20  # bytes that a thread takes
_OBJECT = 64  # bytes of a small Python object with the pointer to it


def open_bytes(path: Path) -> Any:
    """Open a file for reading bytes, unpacked where its name ends in .gz.

    Raises:
      UserError: it is no regular file; what is unpacked later is too much.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file, expected one")
    return io.BufferedReader(_Unpacked(path), 2**17) if path.name.lower().endswith(".gz") else open(path, "rb")


class _Unpacked(io.RawIOBase):
    """The content of a gzip file as long as its size is plausible."""

    def __init__(self, path: Path) -> None:
        self._path, self._count = path, 0
        self._file = gzip.open(path, "rb")  # noqa: SIM115  # open as long as this is
        self._most = max(UNPACKED, RATIO * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read1(len(buffer))
        buffer[: len(data)] = data
        self._count += len(data)
        if self._count > self._most:
            raise UserError(
                f"{self._path}: unpacks to more than {RATIO} times its size and {UNPACKED:,} bytes, as no honest text "
                "does; if it is one, unpack it"
            )
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


class TooLarge(Exception):
    """A batch of a table that takes too much memory."""


_limiting = threading.Lock()


@contextlib.contextmanager
def limited_memory(size: int) -> Iterator[None]:
    """Let Arrow fail in the enclosed code where it takes more than `LARGEST_BATCH` and four times a file's `size`.

    The limit is the system's, on the process's own memory; a system without it has no bound here.

    Raises:
      TooLarge: it asked for more.
    """
    with _limiting:
        before = resource.getrlimit(resource.RLIMIT_DATA)
        with contextlib.suppress(OSError, ValueError):
            used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
            most = used + LARGEST_BATCH + 4 * size + _STACK * (os.cpu_count() or 1)  # Arrow may start threads
            bounds = [each for each in before if each != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_DATA, (min([most, *bounds]), before[1]))
        try:
            yield
        except MemoryError as error:  # Arrow's is one
            raise TooLarge from error
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)


def decoded(batches: Iterator[Any], size: int) -> Iterator[tuple[Any, bool | None]]:
    """Yield the batches of a table in parts that make no more than `PIECE` bytes of Python objects.

    With each comes whether its rows are long; None for a batch whose numbers, such as offsets, do not fit what it holds.

    Raises:
      TooLarge: a batch takes too much memory, or a row of it.
      ValueError: more rows or values than the size of the files makes plausible, or values of a type that files of
        rows do not have.
    """
    count = total = 0
    while True:
        with limited_memory(size):
            batch = next(batches, None)
        if batch is None:
            return
        count += batch.num_rows
        if count > MOST_ROWS + size:
            raise ValueError(f"more than {MOST_ROWS:,} rows and one a byte, expected rows that hold something")
        if not _is_valid(batch):
            yield batch, None
            continue
        total += python_bytes(batch)
        if total > max(MOST_BYTES, TABLE_RATIO * size):
            raise ValueError(f"values that unpack to more than {TABLE_RATIO} times its size and {MOST_BYTES:,} bytes")
        yield from ((part, python_bytes(part) > LONG * (part.num_rows + 1)) for part in _parts(batch))


def _is_valid(batch: Any) -> bool:
    """Return whether the numbers in a batch, such as offsets, are those of what it holds."""
    try:
        batch.validate(full=True)
    except Exception:
        return False
    return True


def _parts(batch: Any) -> Iterator[Any]:
    """Halve a batch until its parts are small."""
    if python_bytes(batch) <= PIECE:
        yield batch
    elif batch.num_rows == 1:
        raise TooLarge
    else:
        half = batch.num_rows // 2
        yield from _parts(batch.slice(0, half))
        yield from _parts(batch.slice(half))


def python_bytes(batch: Any) -> int:
    """Return about how many bytes the Python objects of a batch or table take."""
    columns = [batch.column(i) for i in range(batch.num_columns)]
    chunks = [chunk for each in columns for chunk in (each.chunks if hasattr(each, "chunks") else [each])]
    return _OBJECT * batch.num_rows + sum(map(_array_bytes, chunks))


def _array_bytes(array: Any) -> int:
    """Return about how many bytes the Python objects of an Arrow array take."""
    import pyarrow
    import pyarrow.compute

    kind, types = array.type, pyarrow.types
    if isinstance(array, pyarrow.ExtensionArray):
        return _array_bytes(array.storage)
    if types.is_dictionary(kind):
        return _OBJECT * len(array) + _of_dictionary(array)
    if _is_text(kind):
        return _OBJECT * len(array) + (pyarrow.compute.sum(_lengths(array)).as_py() or 0)
    if types.is_fixed_size_binary(kind):
        return (_OBJECT + kind.byte_width) * len(array)
    if types.is_struct(kind):
        return _OBJECT * (len(array) + 2) + sum(map(_array_bytes, array.flatten())) + len(array) * 16 * kind.num_fields
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind) or types.is_fixed_size_list(kind):
        wide = kind.list_size * len(array) if types.is_fixed_size_list(kind) else 0
        if 8 * wide > PIECE:  # of nulls it takes no memory yet
            return 8 * wide
        return 2 * _OBJECT * len(array) + _array_bytes(array.flatten())
    if types.is_null(kind) or types.is_primitive(kind) or types.is_decimal(kind):
        return _OBJECT * len(array)
    raise ValueError(f"a column of type {str(kind)[:100]}, which files of rows do not have")


def _of_dictionary(array: Any) -> int:
    """Return the bytes that the values of a dictionary array take, each as often as it stands there."""
    import pyarrow.compute

    values = array.dictionary
    if not _is_text(values.type):
        if not pyarrow.types.is_primitive(values.type):
            raise ValueError(f"a dictionary of {str(values.type)[:100]}, which files of rows do not have")
        return 0
    return int(pyarrow.compute.sum(_lengths(values).take(array.indices)).as_py() or 0)


def _is_text(kind: Any) -> bool:
    """Return whether an Arrow type is that of texts or bytes."""
    from pyarrow import types

    plain = types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)
    return plain or types.is_string_view(kind) or types.is_binary_view(kind)


def _lengths(array: Any) -> Any:
    """Return the bytes of each text of an array."""
    import pyarrow
    import pyarrow.compute

    if not pyarrow.types.is_string_view(array.type) and not pyarrow.types.is_binary_view(array.type):
        return pyarrow.compute.cast(pyarrow.compute.binary_length(array), pyarrow.int64())
    # Views may overlap, so that they are more than their buffers. Each is four numbers, of which the first is its length.
    views = np.frombuffer(array.buffers()[1] or b"", np.int32).reshape(-1, 4)[array.offset : array.offset + len(array)]
    return pyarrow.array(np.maximum(views[:, 0], 0).astype(np.int64))


def file_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all below a folder."""
    if path.is_dir():
        return sum(os.path.getsize(each) for each in path.rglob("*") if each.is_file())
    return os.path.getsize(path)
