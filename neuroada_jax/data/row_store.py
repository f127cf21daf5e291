"""Many rows without the memory of all of them: beyond a few thousand they lie in a temporary file."""

import array
import bisect
import pickle
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

from neuroada_jax.errors import UserError

IN_MEMORY = 4096  # rows that stay a list
BLOCK = 256  # rows that are written and read together
LARGEST_BLOCK = 2**23  # bytes of fewer rows that are, as bytes of a pickle; objects in memory may take 30 times as many


class LargeRow(dict[str, Any]):
    """A row of a long text, which is weighed before it is kept; other rows are too short for that to be worth its time."""


def stored(rows: Iterable[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Return the rows as a sequence: a list of a few thousand, else a temporary file that is deleted with the sequence.

    Raises:
      UserError: the temporary file cannot be written.
    """
    found: list[dict[str, Any]] = []
    each, size = iter(rows), 0
    for row in each:
        found.append(row)
        if type(row) is LargeRow:
            size += _bytes_of(row)
        if len(found) > IN_MEMORY or size > LARGEST_BLOCK:
            return _RowsOnDisk(found, each)
    return found


def _bytes_of(row: dict[str, Any]) -> int:
    try:
        return len(pickle.dumps(row, pickle.HIGHEST_PROTOCOL))
    except Exception:  # a caller's own objects, which stay in memory as long as the rows are few
        return 0


class _RowsOnDisk(Sequence[dict[str, Any]]):
    """Rows in blocks of a temporary file; the block of the last row that was asked for is in memory."""

    def __init__(self, first: list[dict[str, Any]], rest: Iterator[dict[str, Any]]) -> None:
        self._file = tempfile.TemporaryFile(prefix="neuroada-")  # noqa: SIM115  # open as long as the rows are used
        weakref.finalize(self, self._file.close)
        self._starts, self._firsts = array.array("q", [0]), array.array("q", [0])  # of blocks: byte, row
        self._length, self._number, self._block = 0, -1, list[dict[str, Any]]()
        block, size = list[dict[str, Any]](), 0
        for rows in (first, rest):
            for row in rows:
                block.append(row)
                if type(row) is LargeRow:
                    size += _bytes_of(row)
                if len(block) == BLOCK or size > LARGEST_BLOCK:
                    self._write(block)
                    block, size = [], 0
        if block:
            self._write(block)

    def _write(self, block: list[dict[str, Any]]) -> None:
        try:
            self._file.write(pickle.dumps(block, pickle.HIGHEST_PROTOCOL))
        except OSError as error:
            folder = tempfile.gettempdir()
            raise UserError(
                f"{folder}: rows cannot be written to this temporary folder ({error.strerror}); TMPDIR names another"
            ) from error
        self._length += len(block)
        self._starts.append(self._file.tell())
        self._firsts.append(self._length)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        index = index + self._length if index < 0 else index
        if not 0 <= index < self._length:
            raise IndexError(index)
        number = self._number
        if not (number >= 0 and self._firsts[number] <= index < self._firsts[number + 1]):
            number = bisect.bisect_right(self._firsts, index) - 1
        if number != self._number:
            self._block = []  # not two at a time
            self._file.seek(self._starts[number])
            data = self._file.read(self._starts[number + 1] - self._starts[number])
            self._block, self._number = pickle.loads(data), number
        return self._block[index - self._firsts[number]]


class Places(Sequence[tuple[str, int]]):
    """The file and the line or row number of many rows, in eight bytes a row."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._starts: list[int] = []  # the first row of each file
        self._numbers = array.array("q")

    def append(self, file: str, number: int) -> None:
        """Add the place of the next row."""
        if not self._files or self._files[-1] != file:
            self._files.append(file)
            self._starts.append(len(self._numbers))
        self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> tuple[str, int]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, int]]: ...

    def __getitem__(self, index: int | slice) -> tuple[str, int] | list[tuple[str, int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = self._numbers[index]
        return self._files[bisect.bisect_right(self._starts, index % len(self)) - 1], number
