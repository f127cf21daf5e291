"""Logging of a run's metrics: always to metrics.jsonl, and to TensorBoard, wandb and trackio where `tracking` names them.

No tracker is required, and none can end a run: if one fails, the run continues without it.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from neuroada_jax import console, files
from neuroada_jax.errors import UserError, install_line
from neuroada_jax.training.config import RunConfig

_FORMER_FIELDS = {"targets": "labels"}  # of metrics.jsonl, as neuroada-jax 0.1 named them
Line = dict[str, Any]  # the metrics of one step: "step", "loss", ...
WANDB_ID = "wandb-id.txt"  # with the id under which a resumed run continues in wandb


class Tracker(Protocol):
    """Sink for the metrics of finished steps, which come in order."""

    def write(self, lines: Sequence[Line]) -> None: ...

    def close(self) -> None: ...


def check(names: Sequence[str]) -> None:
    """Check that the packages of all trackers are installed.

    Raises:
      UserError: one is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"tracking: {name} is not installed; {install_line('tracking')}")


class Log:
    """Log of a run: metrics.jsonl, and the trackers that the config names.

    Attributes:
      lines: of metrics.jsonl, from the earlier part of a resumed run.
    """

    def __init__(self, config: RunConfig, done: int) -> None:
        """Open the log of a run that has done `done` steps.

        Raises:
          UserError: metrics.jsonl cannot be written.
        """
        file = JsonLines(config.directory / "metrics.jsonl", done)
        self.lines = file.lines
        self._file, self._others = file, dict[str, Tracker]()
        for name in config.tracking:
            self._guarded(name, functools.partial(self._start, name, config, done))

    def write(self, lines: Sequence[Line]) -> None:
        """Write the metrics of some steps; trackers get the finite ones only.

        Raises:
          UserError: metrics.jsonl cannot be written.
        """
        self._file.write(lines)
        for name, tracker in list(self._others.items()):
            self._guarded(name, functools.partial(tracker.write, lines))

    def add(self, step: int, fields: Line) -> None:
        """Add fields to the last line, or the line of step 0, which has no others: scores that come after it was written.

        Raises:
          UserError: metrics.jsonl cannot be written.
        """
        self._file.add(step, fields)
        for name, tracker in list(self._others.items()):
            self._guarded(name, functools.partial(tracker.write, [{"step": step, **fields}]))

    def close(self) -> None:
        """Close the file and all trackers."""
        self._file.close()
        for name, tracker in list(self._others.items()):
            self._guarded(name, tracker.close)

    def _start(self, name: str, config: RunConfig, done: int) -> None:
        self._others[name] = _TRACKERS[name](config, done)

    def _guarded(self, name: str, work: Callable[[], object]) -> None:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # standard output carries results only
                work()
        except Exception as error:  # any failure of a service, the network or a disk
            self._others.pop(name, None)
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            console.warn(f"tracking: {name} failed, the run continues without it ({reason})")


class TensorBoard:
    """Writer of event files in <run>/tensorboard."""

    def __init__(self, config: RunConfig, done: int) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer import event_file_writer

        self._event = event_pb2.Event
        self._writer = event_file_writer.EventFileWriter(str(config.directory / "tensorboard"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # readers then drop later steps of the earlier part
        self._writer.add_event(self._event(wall_time=time.time(), step=done + 1, session_log=start))

    def write(self, lines: Sequence[Line]) -> None:
        for line in lines:
            event = self._event(wall_time=time.time(), step=line["step"])
            for name, value in _measured(line).items():
                event.summary.value.add(tag=name, simple_value=value)
            self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Run of the wandb project `neuroada-jax`; with WANDB_MODE=offline it stays in <run>/wandb."""

    def __init__(self, config: RunConfig, done: int) -> None:
        import wandb

        path = config.directory / WANDB_ID
        if not (done and path.exists()):
            files.write_text(path, secrets.token_hex(8) + "\n")
        self._run = wandb.init(
            project="neuroada-jax",
            name=config.name,
            id=path.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(config.directory),
            config=dataclasses.asdict(config),
        )

    def write(self, lines: Sequence[Line]) -> None:
        for line in lines:
            self._run.log(_measured(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Run of the local trackio project `neuroada-jax` (in TRACKIO_DIR, if set)."""

    def __init__(self, config: RunConfig, done: int) -> None:
        import trackio

        content = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        self._finish = trackio.finish
        self._run = trackio.init(
            "neuroada-jax",
            name=config.name,
            config=content,
            resume="allow" if done else "never",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def write(self, lines: Sequence[Line]) -> None:
        for line in lines:
            self._run.log(_measured(line), step=line["step"])

    def close(self) -> None:
        self._finish()  # `self._run.finish` would be called again at exit, and print


_TRACKERS: dict[str, Callable[[RunConfig, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def _measured(line: Line) -> dict[str, float]:
    """Return the finite metrics of a line, without the step."""
    return {key: float(value) for key, value in line.items() if key != "step" and math.isfinite(value)}


class JsonLines:
    """Writer of metrics.jsonl, which has one complete line for every step, in order.

    With validation rows, a line of step 0 with the scores of the state before the training comes first.

    Attributes:
      lines: of the earlier part of a resumed run.
    """

    def __init__(self, path: Path, done: int) -> None:
        """Open the file of a run that has done `done` steps; lines of later steps, from an interruption, are dropped.

        Raises:
          UserError: the file cannot be written.
        """
        self._path, self.lines, damaged = path, *_complete_lines(path, done)
        found = sum(line["step"] > 0 for line in self.lines)
        if found < done:
            first = f"; line {damaged} is damaged" if damaged else ""
            console.warn(f"{path}: {done - found} of the {done} lines are missing{first}")
        self._file = self._rewritten()

    def _rewritten(self) -> int:
        files.write_text(self._path, "".join(json.dumps(files.finite(line)) + "\n" for line in self.lines))
        return os.open(self._path, os.O_WRONLY | os.O_APPEND)

    def add(self, step: int, fields: Line) -> None:
        """Add fields to the line of the last step before the run goes on; step 0 gets a line of its own.

        Raises:
          UserError: the file cannot be written.
        """
        if step and not (self.lines and self.lines[-1]["step"] == step):
            return  # the line is missing, as the warning has said
        before, line = (self.lines[:-1], self.lines[-1]) if step else ([], {"step": 0})
        self.lines[:] = [*before, {**line, **fields}]
        os.close(self._file)
        self._file = self._rewritten()

    def write(self, lines: Sequence[Line]) -> None:
        """Append the lines of some steps in a single write.

        Raises:
          UserError: it failed; the file is unchanged.
        """
        # JSON has no NaN: non-finite metrics become null.
        text = "".join(json.dumps(files.finite(line)) + "\n" for line in lines).encode()
        before = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, text)
            if written < len(text):  # writing the rest raises the reason
                os.write(self._file, text[written:])
        except OSError as error:
            os.truncate(self._path, before)
            raise UserError(f"{self._path}: cannot be written ({error.strerror})") from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _complete_lines(path: Path, done: int) -> tuple[list[Line], int | None]:
    """Return the sound lines of steps up to `done` in order, and the number of the first damaged line among them."""
    lines: list[Line] = []
    last, damaged = -1, None
    for number, found in files.json_lines(path) if path.exists() else []:
        if _is_sound(found) and found["step"] > done:
            break
        if not _is_sound(found) or found["step"] <= last:
            damaged = damaged or number
            continue
        lines.append({_FORMER_FIELDS.get(name, name): value for name, value in found.items()})
        last = found["step"]
    return lines, damaged


def _is_sound(line: Any) -> bool:
    """Return whether a line has the metrics that a resumed run reads, and numbers alone."""
    if not isinstance(line, dict) or type(line.get("step")) is not int or line["step"] < 0:
        return False
    # Step 0 has the scores before the first step alone.
    if line["step"] and not ({"loss", "learning_rate"} <= line.keys() and type(line.get("tokens")) is int):
        return False
    return all(isinstance(value, int | float | None) and abs(value or 0) < 2**63 for value in line.values())
