"""Texts of unknown content in Markdown: they stay on their line, in their cell, and are neither markup nor HTML."""

import html
import re
from collections.abc import Sequence

_LONGEST = 300  # characters of a text


def text(value: object) -> str:
    """Return a value as plain text for a paragraph or a cell: one line, every character of Markdown and HTML escaped."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in str(value)).split())
    line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
    return re.sub(r"([\\`*_{}\[\]|~$])", r"\\\1", html.escape(line, quote=False))


def code(value: str) -> str:
    """Return a text as code within a line or a cell; control characters are written as escapes."""
    line = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in value)
    fence = "`" * (_longest_run(line) + 1)
    pad = " " if not line.strip() or line[0] in "` " or line[-1] in "` " else ""
    return f"{fence}{pad}{line}{pad}{fence}".replace("|", "\\|")


def block(value: str, language: str = "") -> list[str]:
    """Return the lines of a code block with a text of any content."""
    fence = "`" * max(3, _longest_run(value) + 1)
    return [f"{fence}{language}", *value.replace("\r\n", "\n").replace("\r", "\n").split("\n"), fence]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Return the lines of a table; cells are Markdown already.

    Args:
      header: of the fields.
      rows: of cells.
      right: numbers of the fields that are aligned to the right.
    """
    rule = ["---:" if number in right else "---" for number in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def _longest_run(value: str) -> int:
    """Return the length of the longest run of backticks."""
    return max((len(run) for run in re.findall("`+", value)), default=0)
