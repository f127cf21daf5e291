"""JSON of any size, of which one value at a time is in memory."""

import codecs
import gzip
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neuroada_jax import files
from neuroada_jax.data.row_bounds import LARGEST_ROW
from neuroada_jax.errors import UserError

_SPACES, _SPACE = {" ", "\t", "\n", "\r"}, re.compile(r"[ \t\n\r]*")
PIECE = 1 << 20  # bytes that are read at a time, or as many as are left of a longer value
_BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_OTHER_BYTES = re.compile(rb"[\x80-\xff]")
_CHARACTER = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")


def without_bom(data: bytes, path: Path) -> bytes:
    """Return the beginning of a text file without the byte order mark of UTF-8.

    Raises:
      UserError: the mark of another encoding.
    """
    for bom, name in _BOMS.items():
        if data.startswith(bom):
            raise UserError(f"{path}: {name} text, expected UTF-8; convert it: {_conversion(name, path)}")
    return data.removeprefix(codecs.BOM_UTF8)


def _conversion(encoding: str, path: Path) -> str:
    """Return the command that writes a file in UTF-8 beside it."""
    names = [shlex.quote(str(name)) for name in (path, path.with_name(f"utf8-{path.name}"))]
    if path.suffix.lower() == ".gz":
        return f"gzip -dc {names[0]} | iconv -f {encoding} -t UTF-8 | gzip > {names[1]}"
    return f"iconv -f {encoding} -t UTF-8 {names[0]} > {names[1]}"


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
    found, hint = f"not UTF-8 (byte 0x{byte:02x}: {error.reason}), expected UTF-8 text", ""
    # Text with characters that are complete in UTF-8 is UTF-8 with some damage, which no conversion mends.
    if _OTHER_BYTES.search(error.object) and not _CHARACTER.search(error.object):
        windows = any(0x80 <= each < 0xA0 for each in error.object)  # control characters in Latin-1
        name, encoding = ("Windows-1252", "WINDOWS-1252") if windows else ("Latin-1", "LATIN1")
        hint = f"; if it is {name}, convert it: {_conversion(encoding, path)}"
    return UserError(f"{path}:{line}: {found}{hint}")


def without_nul(data: bytes, path: Path, line: int) -> bytes:
    """Return bytes that begin in a line.

    Raises:
      UserError: one of them is NUL; names the line.
    """
    at = data.find(b"\0")
    if at >= 0:
        line += data.count(b"\n", 0, at)
        encoding = _wide_encoding(path)
        hint = f"; if it is {encoding}, convert it: {_conversion(encoding, path)}" if encoding else ""
        raise UserError(f"{path}:{line}: found a NUL byte, expected UTF-8 text{hint}")
    return data


def _wide_encoding(path: Path) -> str | None:
    """Return the encoding of two or four bytes a character that a file without a byte order mark seems to have."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
        beginning = file.read(4096)
    first, second = beginning[::2].count(0), beginning[1::2].count(0)
    if 5 * (first + second) > 3 * len(beginning):
        return "UTF-32LE" if beginning[0] else "UTF-32BE"
    if 4 * max(first, second) < len(beginning):  # less than half of the characters would be of Latin script
        return None
    return "UTF-16LE" if second > first else "UTF-16BE"


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
        self._decoder = json.JSONDecoder(object_pairs_hook=files.unique_names)
        self._text, self._at, self._start = "", 0, 0
        self._line, self._counted = 1, 0  # the line of the character `_counted`
        self._utf8, self._began = codecs.getincrementaldecoder("utf-8")(), False

    @property
    def line(self) -> int:
        """The line of the position."""
        self._line, self._counted = self._line_of(self._at), self._at
        return self._line

    @property
    def text(self) -> str:
        """The text of the value that the position has just moved past."""
        return self._text[self._start : self._at]

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
            if self._text[self._at : self._at + 1] in _SPACES:
                self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches any text
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
                if len(self._text) - self._at > LARGEST_ROW:
                    raise self.fail(f"within {LARGEST_ROW:,} characters: {reason(error)}") from error
                if self._more():
                    continue
                raise self.fail(reason(error), error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self.fail(reason(error)) from error
            if end == len(self._text) and self._more():
                continue  # a number may go on
            if end - self._at > LARGEST_ROW:
                raise self.fail(f"a value of more than {LARGEST_ROW:,} characters")
            self._start, self._at = self._at, end
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
