"""JSON of any size, of which one value at a time is in memory."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neuroada_jax.errors import UserError

PIECE = 1 << 20  # bytes that are read at a time, or as many as are left of a longer value
_BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def without_bom(data: bytes, path: Path) -> bytes:
    """Return the beginning of a text file without the byte order mark of UTF-8.

    Raises:
      UserError: the mark of another encoding.
    """
    for bom, name in _BOMS.items():
        if data.startswith(bom):
            raise UserError(
                f"{path}: {name} text, expected UTF-8; convert it: iconv -f {name} -t UTF-8 {path.name} > utf8-{path.name}"
            )
    return data.removeprefix(codecs.BOM_UTF8)


def text_of(data: bytes, path: Path, line: int) -> str:
    """Return the UTF-8 text of a line.

    Args:
      data: the line.
      path: the file, for messages.
      line: its number.

    Raises:
      UserError: other bytes, or a NUL; names the line.
    """
    try:
        return without_nul(data, path, line).decode()
    except UnicodeDecodeError as error:
        raise not_utf8(error, path, line) from error


def not_utf8(error: UnicodeDecodeError, path: Path, line: int) -> UserError:
    """Return the error for bytes that begin in a line."""
    line += error.object.count(b"\n", 0, error.start)
    byte = error.object[error.start]
    return UserError(f"{path}:{line}: not UTF-8 (byte 0x{byte:02x}: {error.reason}), expected UTF-8 text")


def without_nul(data: bytes, path: Path, line: int) -> bytes:
    """Return bytes that begin in a line.

    Raises:
      UserError: one of them is NUL; names the line.
    """
    at = data.find(b"\0")
    if at >= 0:
        line += data.count(b"\n", 0, at)
        raise UserError(f"{path}:{line}: found a NUL byte, expected UTF-8 text (UTF-16 is full of them)")
    return data


def reason(error: Exception) -> str:
    """Return why `json` cannot decode a text, in a few words."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "an integer of more than 4,300 digits" if "digits" in str(error) else str(error)


class JsonStream:
    """A position in the text of a JSON file."""

    def __init__(self, path: Path, file: Any, expected: str) -> None:
        """Begin at the start of a file.

        Args:
          path: its name, for messages.
          file: open for reading bytes.
          expected: what messages say is expected.
        """
        self._path, self._file, self._expected = path, file, expected
        self._decoder = json.JSONDecoder()
        self._text, self._at = "", 0
        self._line, self._counted = 1, 0  # the line of the character `_counted`
        self._utf8, self._began = codecs.getincrementaldecoder("utf-8")(), False

    @property
    def line(self) -> int:
        """The line of the position."""
        self._line, self._counted = self._line_of(self._at), self._at
        return self._line

    def _line_of(self, at: int) -> int:
        return self._line + self._text.count("\n", self._counted, at)

    def _more(self) -> bool:
        """Read another piece behind the text from the position on; return False at the end of the file."""
        data = found = self._file.read(max(PIECE, len(self._text) - self._at))
        line = self._line_of(len(self._text))
        if not self._began:
            data, self._began = without_bom(data, self._path), True
        try:
            new = self._utf8.decode(without_nul(data, self._path, line), not found)
        except UnicodeDecodeError as error:
            raise not_utf8(error, self._path, line) from error
        if found:
            self._line, rest = self.line, self._text[self._at :]
            self._text, self._at, self._counted = rest + new, 0, 0
        return bool(found)

    def peek(self) -> str:
        """Move past white space and return the character there; "" at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\n\r":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def fail(self, found: str, at: int | None = None) -> UserError:
        """Return the error for the position, or for a character of the text."""
        line = self.line if at is None else self._line_of(at)
        return UserError(f"{self._path}:{line}: not JSON ({found}), expected {self._expected}")

    def value(self) -> Any:
        """Decode the value at the position and move past it.

        Raises:
          UserError: not JSON; names the line.
        """
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._more():
                    continue
                raise self.fail(reason(error), error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self.fail(reason(error)) from error
            if end == len(self._text) and self._more():
                continue  # a number may go on
            self._at = end
            return value

    def items(self) -> Iterator[tuple[int, Any]]:
        """Yield (line, value) of each item of the list at the position, and move past the list."""
        self._at += 1
        more = self.peek() != "]"
        while more:
            line = self.line
            yield line, self.value()
            following = self.peek()
            if following not in (",", "]"):
                raise self.fail("the list is not closed")
            more = following == ","
            self._at += more
            self.peek()
        self._at += 1

    def members(self) -> Iterator[tuple[str, int, Any, bool]]:
        """Yield (key, line, value, False) of the object at the position, and (key, line, item, True) for items of lists."""
        self._at += 1
        more = self.peek() != "}"
        while more:
            if self.peek() != '"':
                raise self.fail("a key is not in double quotes")
            key = self.value()
            if self.peek() != ":":
                raise self.fail("a key has no value")
            self._at += 1
            if self.peek() == "[":
                for line, item in self.items():
                    yield key, line, item, True
            else:
                line = self.line
                yield key, line, self.value(), False
            following = self.peek()
            if following not in (",", "}"):
                raise self.fail("the object is not closed")
            more = following == ","
            self._at += more
        self._at += 1
