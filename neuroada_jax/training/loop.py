"""The training loop: batches in, steps on the device, a line of metrics per step, a progress bar."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import optax

from neuroada_jax import console
from neuroada_jax.data.batches import AnyBatches
from neuroada_jax.training.signals import Stop, Stopped
from neuroada_jax.training.step import AnyBatch, StepMetrics, TrainState
from neuroada_jax.training.trackers import Line, Log
from neuroada_jax.training.watchdog import Failed, Watchdog, in_background


@dataclasses.dataclass
class Report:
    """What the loop knows of a run, the parts before it was resumed included.

    losses: of every step, NaN where there was none.
    tokens: seen, padding left out.
    shapes: of the steps used.
    seconds: of training, epochs' scores left out.
    warnings: what the watchdog counted.
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    shapes: set[tuple[int, ...]] = dataclasses.field(default_factory=set)
    seconds: float = 0.0
    warnings: dict[str, int] = dataclasses.field(default_factory=dict)


class NotFinite(Exception):
    """A loss or its gradient was NaN or infinite, and the run may not go on; the state is the last good one."""

    def __init__(self, message: str, rows: np.ndarray, state: TrainState) -> None:
        super().__init__(message)
        self.rows, self.state = rows, state


class _Pending(NamedTuple):
    step: int
    metrics: StepMetrics
    tokens: int


def run(
    state: TrainState,
    run_step: Callable[[TrainState, AnyBatch], tuple[TrainState, StepMetrics]],
    batches: AnyBatches,
    total_steps: int,
    rates: optax.Schedule,
    report: Report,
    log: Log,
    watchdog: Watchdog,
    stop: Stop,
    *,
    log_every: int,
    save: Callable[[TrainState], None],
    save_every: int | None = None,
    after_epoch: Callable[[TrainState], None] | None = None,
) -> TrainState:
    """Takes the steps from `state.step` up to `total_steps`.

    The host waits for the device at log and save steps, and where an epoch ends, only; the next batch is built meanwhile.

    Args:
      state: where to start; donated.
      run_step: the jitted step.
      batches: what to train on, epoch after epoch.
      total_steps: updates to make.
      rates: learning rate by step, for the log.
      report: of the earlier parts of the run; brought up to date.
      log: gets a line for every step.
      watchdog: sees every batch, call and line.
      stop: looked at after every step. While an epoch is scored, a request interrupts that.
      log_every: steps between two log steps.
      save: called with a good state every `save_every` steps and after the last one, and when the run is to stop.
      save_every: None for never, but when the run is to stop.
      after_epoch: called with a good state at the end of every epoch and of the run, before it is saved; and first of all
        with a state that starts there, whose score an interruption may have left out. Its states are saved too.

    Returns: the last state.

    Raises:
      NotFinite: a loss or gradient was NaN or infinite, or too many were.
      UserError: a batch that did not come, or a file that cannot be written.
      Stopped: on request, when the state is saved.
    """
    start = int(state.step)
    pending: list[_Pending] = []

    def fetch(number: int) -> AnyBatch:
        return batches.batch(*divmod(number, batches.steps_per_epoch))

    def epoch_ends(steps: int) -> bool:
        return after_epoch is not None and steps > 0 and (steps == total_steps or steps % batches.steps_per_epoch == 0)

    if after_epoch is not None and epoch_ends(start):
        after_epoch(state)
    began = last = time.perf_counter()
    earlier, compiled = report.seconds, set[tuple[int, ...]]()
    with console.bar("training", total_steps) as shown, stop.held():
        ahead = in_background(functools.partial(fetch, start))
        for number in range(start, total_steps):
            batch = watchdog.wait(ahead, number + 1)
            if number + 1 < total_steps:
                ahead = in_background(functools.partial(fetch, number + 1))
            with watchdog.compiling(number + 1, expected=_announce(batch, compiled, len(batches.shapes))):
                state, metrics = run_step(state, batch)
            pending.append(_Pending(number, metrics, int(batch.lengths.sum())))
            last_one = number + 1 == total_steps
            scoring, stopping = epoch_ends(number + 1), stop.requested
            saving = save_every is not None and ((number + 1) % save_every == 0 or last_one or scoring)
            if (number + 1) % log_every and not (last_one or saving or scoring or stopping):
                continue

            window = sum(entry.tokens for entry in pending)
            lines = _lines(pending, rates, watchdog)  # waits for the device
            pending.clear()
            log.write(lines)
            try:
                watchdog.look(lines)
            except Failed as failed:
                raise NotFinite(
                    str(failed), batches.rows(*divmod(failed.step - 1, batches.steps_per_epoch)), state
                ) from None
            report.losses += [line["loss"] for line in lines]
            report.tokens += window
            report.shapes |= compiled
            now = time.perf_counter()
            report.seconds = earlier + now - began
            note = f"loss {report.losses[-1]:.4f}, {window / (now - last):.0f} tokens/s"
            if after_epoch is not None and scoring and not stopping:
                try:
                    with stop.held(False):
                        after_epoch(state)
                except Stopped:
                    stopping = True
                began += time.perf_counter() - now
            stopping = stopping or stop.requested
            if saving or stopping:
                save(state)
            if stopping:
                raise Stopped(number + 1)
            last = time.perf_counter()
            shown.update(number + 1, total_steps, note)
            if not console.is_terminal():
                left = (now - began) / (number + 1 - start) * (total_steps - number - 1)
                console.say(f"step {number + 1} of {total_steps}: {note}, {left:.0f} s left")
    return state


def _announce(batch: AnyBatch, compiled: set[tuple[int, ...]], possible: int) -> bool:
    """Whether the batch has a shape that was not compiled yet, and says which."""
    shape = (batch.input_ids.shape[1], *batch.label_mask.shape[1:])
    if shape in compiled:
        return False
    compiled.add(shape)
    what = " and ".join(f"{size} {name}" for size, name in zip(shape, ("tokens", "targets"), strict=False))
    console.say(f"compiling a step for {what} a row ({len(compiled)} of at most {possible})")
    return True


def _lines(pending: list[_Pending], rates: optax.Schedule, watchdog: Watchdog) -> list[Line]:
    """What metrics.jsonl says of some steps. A step that is left out does not move the learning rate on."""
    lines: list[Line] = []
    skipped = watchdog.counts["skipped"]
    for entry in pending:
        lines.append(
            {
                "step": entry.step + 1,
                "loss": float(entry.metrics.loss),
                "learning_rate": float(rates(entry.step - skipped)),
                "gradient_norm": float(entry.metrics.gradient_norm),
                "targets": int(entry.metrics.targets),
                "tokens": entry.tokens,
            }
        )
        if not entry.metrics.finite:
            lines[-1]["finite"] = False
            skipped += 1
    return lines
