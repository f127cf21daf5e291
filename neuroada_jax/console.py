"""Output for the user: messages and progress on standard error, tables and results on standard output."""

import contextlib
import importlib.util
import os
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import rich.box
import rich.cells
import rich.console
import rich.measure
import rich.progress
import rich.table
import rich.text

from neuroada_jax import credentials
from neuroada_jax.errors import NeuroadaWarning, install_line

# In a notebook rich animates bars with ipywidgets; without that package progress is printed in lines, as to a file.
_NOTEBOOK = None if importlib.util.find_spec("ipywidgets") else False


class _Console(rich.console.Console):
    """A console that leaves a closed pipe to the caller, where rich ends the process."""

    def on_broken_pipe(self) -> None:
        """Drop what is not written, and raise the error again."""
        del self._buffer[:]
        raise BrokenPipeError


_err = _Console(stderr=True, highlight=False, force_jupyter=_NOTEBOOK)
_out = _Console(highlight=False)
if not _out.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
    _out = _Console(highlight=False, width=120)  # a file or a pipe: rich would assume 80 columns
_BAR_WIDTH = 106  # columns that a bar of 30 takes with everything beside it


# What moves the cursor, colours, turns the direction of writing, breaks lines or is no character; \n and \t may stay.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST = 2000  # characters of a message


def visible(text: str) -> str:
    r"""Return a text with control characters spelt out, such as \x1b, which texts of files may hold, and secrets hidden."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], credentials.hidden(text))


def one_line(text: str) -> str:
    """Return a message as one line of at most `LONGEST` characters, control characters spelt out."""
    shown = visible(" ".join(text[: 4 * LONGEST].split()))
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 4]} ..."


_collectors: list[list[str]] = []  # of `collected`; the last one gets what is said


def say(message: str) -> None:
    """Print a line on standard error."""
    if _collectors:
        _collectors[-1].append(visible(message))
        return
    _err.print(visible(message), markup=False, soft_wrap=True)


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """Collect what is said in a list, which a result then shows, instead of printing it; bars and warnings stay."""
    _collectors.append([])
    try:
        yield _collectors[-1]
    finally:
        _collectors.pop()


def silence() -> None:
    """Suppress all output of this module from now on: of several processes of a run, only the first shows it."""
    _err.quiet = _out.quiet = True


def warn(message: str) -> None:
    """Issue a NeuroadaWarning; the command line shows it as one line."""
    if _err.quiet:
        return
    warnings.warn(message, NeuroadaWarning, stacklevel=2)


def write(text: str) -> None:
    """Print a line of a result on standard output; a long one goes on, indented, in the next, broken between words."""
    wrapped = textwrap.wrap(text, _out.width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    _out.print(visible("\n".join(wrapped)), markup=False, soft_wrap=True)


def result(text: str) -> None:
    """Print a text of any length on standard output: as it is in a file or pipe, with `visible` in a terminal."""
    print(visible(text) if _out.is_terminal else text)


def figures(name: str, what: str) -> Any:
    """Return the module `matplotlib.figure`; None where it is not installed, which is said.

    Args:
      name: of the picture's file.
      what: the picture shows.
    """
    try:
        import matplotlib.figure
    except ImportError:
        say(f"no {name}: install matplotlib ({install_line('plots')}) to have the {what} drawn")
        return None
    return matplotlib.figure


def has_colour() -> bool:
    """Return whether standard output shows colours: a terminal, and NO_COLOR is not set."""
    return _out.color_system is not None and not _out.no_color


def width() -> int:
    """Return the columns of standard output."""
    return _out.width


def cells(text: str) -> int:
    """Return the columns that a text takes in a terminal."""
    return rich.cells.cell_len(text)


def styled(parts: Sequence[tuple[str, str]]) -> None:
    """Print (text, style of rich) pairs as one line on standard output, not wrapped."""
    _out.print(rich.text.Text.assemble(*((visible(text), style) for text, style in parts)), soft_wrap=True)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output, the first field aligned to the left and the others to the right.

    Where the terminal is too narrow for it, the padding goes; where that is not enough, every row becomes a paragraph.
    """
    write(title)
    for padding in (1, 0):
        grid = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, padding), show_edge=padding > 0)
        grid.show_header = any(header)
        for position, name in enumerate(header):
            grid.add_column(name, justify="right" if position else "left")
        for row in rows:
            grid.add_row(*map(visible, row))
        if rich.measure.Measurement.get(_out, _out.options.update(max_width=10**6), grid).maximum <= _out.width:
            _out.print(grid)
            return
    write("")
    for name, *values in rows:
        named = zip(header[1:], values, strict=True)
        fields = ", ".join(f"{field} {value}" for field, value in named if value) if any(header) else " ".join(values)
        write(f"{name.strip()}: {fields}")
    write("")


class Bar:
    """Handle of a progress bar."""

    def __init__(self, progress: rich.progress.Progress, task: rich.progress.TaskID) -> None:
        self._progress, self._task = progress, task

    def update(self, done: int, total: int, note: str = "") -> None:
        """Move the bar to `done` of `total` and show `note` after it."""
        self._progress.update(self._task, completed=done, total=total, note=note)


class _Line(rich.progress.ProgressColumn):
    """All of a task in one text without a bar, cut where the terminal ends."""

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        """Return the text."""
        left = "?" if task.time_remaining is None else f"{task.time_remaining:.0f} s"
        done, total = f"{task.completed:.0f}", "?" if task.total is None else f"{task.total:.0f}"
        line = f"{task.description} {done}/{total}, {left} left"
        if task.fields["note"]:
            line += f", {task.fields['note']}"
        return rich.text.Text(line, no_wrap=True, overflow="ellipsis")


def _bar_columns() -> list[rich.progress.ProgressColumn]:
    if _err.width < _BAR_WIDTH:
        return [_Line()]
    return [
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=30),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left"),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[note]}"),
    ]


@contextlib.contextmanager
def bar(description: str, total: int | None = None) -> Iterator[Bar]:
    """Show a progress bar with time left and a note; where standard error is no terminal, only its last state.

    In a terminal that is too narrow for the bar, the rest of it stands alone.
    """
    progress = rich.progress.Progress(*_bar_columns(), console=_err)
    with progress:
        yield Bar(progress, progress.add_task(description, total=total, note=""))


def reporter(shown: Bar) -> Callable[[int, int], None]:
    """Return the (done, total) callback of a bar, for the `on_progress` of long functions."""
    return lambda done, total: shown.update(done, total)


def is_terminal() -> bool:
    """Return whether progress bars are animated; if not, long operations print a line now and then instead."""
    return _err.is_terminal or _err.is_jupyter


def size(number: int | float) -> str:
    """Return a number of bytes in decimal units, such as 1.23 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.2f} {unit}"
        number /= 1000
    return f"{number:.2f} TB"
