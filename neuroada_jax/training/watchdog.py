"""Detection of silent failures in long runs: skipped steps, loss spikes, stalled input, recompilation."""

import collections
import contextlib
import itertools
import math
import operator
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

import jax

from neuroada_jax import console
from neuroada_jax.errors import UserError
from neuroada_jax.training.config import WatchdogSection
from neuroada_jax.training.trackers import Line

WINDOW, FEWEST = 100, 20  # finite losses that a spike is measured against: the most recent ones, and the fewest
FROZEN = 50  # finite losses that are all the same, to six digits, before a warning
EXPLODED = 5.0  # times the first loss
IN_A_ROW = 20  # steps that are not finite, one after the other, before a run ends
FLOOR = 0.01  # least deviation as a share of the median: that of nearly equal losses is almost 0
COMPILED = "/jax/core/compile/backend_compile_duration"

Made = TypeVar("Made")


class Failed(Exception):
    """Failure of a run at a step that was not finite."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class Watchdog:
    """Monitor of a training loop that warns of failures and counts them."""

    def __init__(
        self,
        section: WatchdogSection,
        counts: dict[str, int] | None = None,
        earlier: Sequence[Line] = (),
        last: int | None = None,
    ) -> None:
        """Continue with the counts and metrics of the earlier part of a resumed run.

        Args:
          section: `watchdog` of the config.
          counts: numbers of "skipped", "spikes", "stalls" and "compiled_again" so far, and whether the loss was "frozen" or
            "exploded"; updated in place.
          earlier: lines of metrics.jsonl so far.
          last: the run's last step; None where it is not known.
        """
        self._section, self.counts = section, {} if counts is None else counts
        for kind in ("skipped", "spikes", "stalls", "compiled_again", "frozen", "exploded"):
            self.counts.setdefault(kind, 0)
        steps = [line.get("finite", True) for line in earlier if line["step"]]
        self._in_a_row = len(list(itertools.takewhile(operator.not_, reversed(steps))))
        self._last, self._any_finite = last, any(steps)
        losses = [line["loss"] for line in earlier if line.get("loss") is not None]
        self._losses = collections.deque(losses, WINDOW)
        self._first = losses[0] if losses else None

    def wait(self, batch: "Future[Made]", step: int) -> Made:
        """Wait for the batch of a step and return it.

        Raises:
          UserError: it did not arrive within `watchdog.stall_stop` seconds.
        """
        began = time.perf_counter()
        limits = (self._section.stall_warn, self._section.stall_stop)
        for limit in sorted(limit for limit in limits if limit is not None):
            with contextlib.suppress(TimeoutError):
                return batch.result(max(0.0, limit - (time.perf_counter() - began)))
            if limit == self._section.stall_stop:
                raise UserError(f"the batch of step {step} did not arrive within {limit:g} s (watchdog.stall_stop)")
            self.counts["stalls"] += 1
            console.warn(f"waiting for the batch of step {step} for {limit:g} s (watchdog.stall_warn)")
        return batch.result()

    @contextlib.contextmanager
    def compiling(self, step: int, expected: bool) -> Iterator[None]:
        """Warn if the enclosed call of a step compiles although that is not expected."""
        seconds: list[float] = []

        def listen(event: str, duration_secs: float, **_: str | int) -> None:
            if event == COMPILED:
                seconds.append(duration_secs)

        if expected:
            yield
            return
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        if seconds:
            self.counts["compiled_again"] += 1
            console.warn(
                f"step {step} was compiled again ({sum(seconds):.1f} s), although its shape was compiled before; "
                f"{self.counts['compiled_again']} so far"
            )

    def look(self, lines: Sequence[Line]) -> None:
        """Check the lines of the steps since the last call.

        A spike is a loss more than `watchdog.spike` deviations above the median of the last 100 finite losses, once there
        are 20. The deviation is 1.4826 times the median absolute distance from that median, which for a normal distribution
        is the standard deviation, and at least 1 % of the median. Both are robust: spikes hardly change them.

        Raises:
          Failed: a step was not finite; with `watchdog.nonfinite: skip`, more than `watchdog.max_skips` of them, `IN_A_ROW`
            one after the other, or all of the run.
        """
        worst: tuple[float, Line, float] | None = None
        for line in lines:
            if line.get("finite", True):
                self._any_finite = True
            else:
                self._not_finite(line["step"])
            if not math.isfinite(line["loss"]):
                continue
            self._in_a_row = 0 if line.get("finite", True) else self._in_a_row
            self._first = line["loss"] if self._first is None else self._first
            above, median = self._deviations(line["loss"])
            if self._section.spike is not None and above > self._section.spike:
                self.counts["spikes"] += 1
                worst = max(worst or (above, line, median), (above, line, median), key=lambda each: each[0])
            self._losses.append(line["loss"])
        self._look_at_course()
        if worst:
            above, line, median = worst
            console.warn(
                f"step {line['step']}: loss {line['loss']:.4f} is a spike, {above:.0f} deviations above the median "
                f"{median:.4f} of the previous steps"
            )

    def _look_at_course(self) -> None:
        """Warn once of a loss that does not move, and once of one that is far above the first."""
        if not self._losses or self._first is None:
            return
        recent = list(self._losses)[-FROZEN:]
        if not self.counts["frozen"] and len(recent) == FROZEN and max(recent) - min(recent) <= 1e-6 * abs(recent[-1]):
            self.counts["frozen"] = 1
            console.warn(
                f"the loss has been {recent[-1]:.4f} for {FROZEN} steps: nothing is learnt; look at the learning "
                "rate and the rows"
            )
        if not self.counts["exploded"] and min(recent[-3:]) > EXPLODED * max(self._first, 1.0):
            self.counts["exploded"] = 1
            console.warn(
                f"the loss is {recent[-1]:.4g}, and was {self._first:.4g} at first: the learning rate may be far too high"
            )

    def _not_finite(self, step: int) -> None:
        most = self._section.max_skips
        if self._section.nonfinite == "stop":
            raise Failed(step, f"the loss or its gradient became NaN or infinite at step {step}")
        self._in_a_row += 1
        if self._in_a_row == IN_A_ROW:
            raise Failed(
                step, f"the loss or its gradient is NaN or infinite in each of the last {IN_A_ROW} steps, to {step}"
            )
        if step == self._last and not self._any_finite:
            raise Failed(step, f"the loss or its gradient is NaN or infinite in every step of the run, 1 to {step}")
        if self.counts["skipped"] == most:
            raise Failed(step, f"the loss or its gradient is NaN or infinite at step {step}, after {most} skipped steps")
        self.counts["skipped"] += 1
        console.warn(
            f"step {step} is skipped: NaN or infinite loss or gradient ({self.counts['skipped']} of at most {most})"
        )

    def _deviations(self, loss: float) -> tuple[float, float]:
        """Return by how many deviations a loss exceeds the median of the previous ones, and that median."""
        if len(self._losses) < FEWEST:
            return 0.0, math.nan
        median = statistics.median(self._losses)
        distance = statistics.median(abs(each - median) for each in self._losses)
        return (loss - median) / max(1.4826 * distance, FLOOR * abs(median), 1e-12), median


def in_background(work: Callable[[], Made]) -> "Future[Made]":
    """Start work in a daemon thread and return its future; work that hangs does not keep the process from ending."""
    future: Future[Made] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="batch", daemon=True).start()
    return future
