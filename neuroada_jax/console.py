"""Output for the user: messages and progress on standard error, tables and results on standard output."""

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence

import rich.box
import rich.console
import rich.progress
import rich.table

from neuroada_jax.errors import NeuroadaWarning

# In a notebook rich animates bars with ipywidgets; without that package progress is printed in lines, as to a file.
_NOTEBOOK = None if importlib.util.find_spec("ipywidgets") else False
_err = rich.console.Console(stderr=True, highlight=False, force_jupyter=_NOTEBOOK)
_out = rich.console.Console(highlight=False)
if not _out.is_terminal:
    _out = rich.console.Console(highlight=False, width=120)  # a file or a pipe: rich would assume 80 columns


def say(message: str) -> None:
    """Print a line on standard error."""
    _err.print(message, markup=False, soft_wrap=True)


def silence() -> None:
    """Suppress all output of this module from now on: of several processes of a run, only the first shows it."""
    _err.quiet = _out.quiet = True


def warn(message: str) -> None:
    """Issue a NeuroadaWarning; the command line shows it as one line."""
    warnings.warn(message, NeuroadaWarning, stacklevel=2)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output, the first field aligned to the left and the others to the right."""
    grid = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    for position, name in enumerate(header):
        grid.add_column(name, justify="right" if position else "left", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    _out.print(grid)


class Bar:
    """Handle of a progress bar."""

    def __init__(self, progress: rich.progress.Progress, task: rich.progress.TaskID) -> None:
        self._progress, self._task = progress, task

    def update(self, done: int, total: int, note: str = "") -> None:
        """Move the bar to `done` of `total` and show `note` after it."""
        self._progress.update(self._task, completed=done, total=total, note=note)


@contextlib.contextmanager
def bar(description: str, total: int | None = None) -> Iterator[Bar]:
    """Show a progress bar with time left and a note; where standard error is no terminal, only its last state."""
    progress = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=30),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left"),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[note]}"),
        console=_err,
    )
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
