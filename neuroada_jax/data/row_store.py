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


def stored(rows: Iterable[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Return the rows as a sequence: a list of a few thousand, else a temporary file that is deleted with the sequence.

    Raises:
      UserError: the temporary file cannot be written.
    """
    found: list[dict[str, Any]] = []
    each = iter(rows)
    for row in each:
        found.append(row)
        if len(found) > IN_MEMORY:
            return _RowsOnDisk(found, each)
    return found


class _RowsOnDisk(Sequence[dict[str, Any]]):
    """Rows in blocks of a temporary file; the block of the last row that was asked for is in memory."""

    def __init__(self, first: list[dict[str, Any]], rest: Iterator[dict[str, Any]]) -> None:
        self._file = tempfile.TemporaryFile(prefix="neuroada-")  # noqa: SIM115  # open as long as the rows are used
        weakref.finalize(self, self._file.close)
        self._starts = array.array("q", [0])
        self._length, self._number, self._block = 0, -1, list[dict[str, Any]]()
        block: list[dict[str, Any]] = []
        for rows in (first, rest):
            for row in rows:
                block.append(row)
                if len(block) == BLOCK:
                    self._write(block)
                    block = []
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
        self._starts.append(self._file.tell())
        self._length += len(block)

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
        number, within = divmod(index, BLOCK)
        if number != self._number:
            self._file.seek(self._starts[number])
            data = self._file.read(self._starts[number + 1] - self._starts[number])
            self._block, self._number = pickle.loads(data), number
        return self._block[within]


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
