"""Where a run's metrics go: metrics.jsonl, always."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuroada_jax import console, files
from neuroada_jax.errors import UserError

Line = dict[str, Any]  # of one step: "step", "loss", ...


class JsonLines:
    """metrics.jsonl: a line for every step, in order, and never half of one.

    lines: those of the steps that an earlier part of the run did.
    """

    def __init__(self, path: Path, done: int) -> None:
        """Goes on after `done` steps: what an interrupted run wrote beyond them is dropped.

        Raises:
          UserError: the file cannot be written.
        """
        self._path, self.lines = path, _whole_lines(path, done)
        if len(self.lines) < done:
            console.warn(f"{path}: {done - len(self.lines)} of the {done} lines are missing")
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, lines: Sequence[Line]) -> None:
        """Appends them in one piece.

        Raises:
          UserError: they could not be; the file is as before.
        """
        # JSON knows no NaN: a step that was not finite says null.
        text = "".join(json.dumps({key: number(value) for key, value in line.items()}) + "\n" for line in lines).encode()
        before = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, text)
            if written < len(text):  # the rest says why
                os.write(self._file, text[written:])
        except OSError as error:
            os.truncate(self._path, before)
            raise UserError(f"{self._path}: cannot be written ({error.strerror})") from error

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def number(value: Any) -> Any:
    """The value, or None for a number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _whole_lines(path: Path, done: int) -> list[Line]:
    """The lines of steps up to `done`, until the first that is not whole or repeats a step."""
    lines: list[Line] = []
    last = 0
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        step = line.get("step") if isinstance(line, dict) else None
        if not isinstance(step, int) or not last < step <= done:
            break
        lines.append(line)
        last = step
    return lines
