"""The training loop: batches in, steps on the device, a log line for each step, a progress bar."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax

from neuroada_jax import console
from neuroada_jax.data.batches import AnyBatches
from neuroada_jax.training.signals import Stop, Stopped
from neuroada_jax.training.step import AnyBatch, StepMetrics, TrainState
from neuroada_jax.training.trackers import Line
from neuroada_jax.training.validation import Evaluations
from neuroada_jax.training.watchdog import Failed, Watchdog, in_background

# Steps that may wait for the device. JAX would let 32 of them wait, and a request to stop for all: minutes of slow steps.
AHEAD = 2


@dataclasses.dataclass
class History:
    """The course of a run so far, including the steps before it was resumed.

    Attributes:
      losses: mean loss per label of every step, in nats; NaN where it was not finite or is not known.
      learning_rates: of every step, as many as losses.
      tokens: seen in training, without padding.
      shapes: of the batches, (T, M) or (T,); as many as compiled steps.
      seconds: of training, without the scores of epochs.
      warnings: the watchdog's counts by kind.
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    learning_rates: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    shapes: set[tuple[int, ...]] = dataclasses.field(default_factory=set)
    seconds: float = 0.0
    warnings: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, lines: Sequence[Line], shapes: set[tuple[int, ...]], seconds: float) -> None:
        """Add the log lines of further steps; `seconds` and `shapes` are those of the run up to here."""
        self.losses += [line["loss"] for line in lines]
        self.learning_rates += [line["learning_rate"] for line in lines]
        self.tokens += sum(line["tokens"] for line in lines)
        self.shapes |= shapes
        self.seconds = seconds


class NotFinite(Exception):
    """A loss or its gradient was NaN or infinite, and the run may not go on.

    Attributes:
      rows: the numbers of the training rows of the step's batch.
      state: the last good one.
    """

    def __init__(self, message: str, rows: np.ndarray, state: TrainState) -> None:
        super().__init__(message)
        self.rows, self.state = rows, state


class Settings(NamedTuple):
    """How far and how often.

    Attributes:
      total_steps: updates of the complete run.
      rates: learning rate by update, for the log.
      log_every: steps between two log steps.
      save_every: steps between two saves; None: save only where the run is to stop.
    """

    total_steps: int
    rates: optax.Schedule
    log_every: int
    save_every: int | None = None


class Hooks(NamedTuple):
    """Functions that the loop calls.

    Attributes:
      on_lines: called with the log lines of finished steps, in order.
      save: called with a good state every `save_every` steps and after the last one, and when the run is to stop.
      evaluations: scores good states where they are due, before they are saved; and first of all the state to start
        with: that before the training, or one whose score an interruption may have prevented. Its states are saved too.
      on_late: called with the step of the state to start with, and the fields that its log line lacks.
    """

    on_lines: Callable[[Sequence[Line]], None]
    save: Callable[[TrainState], None]
    evaluations: Evaluations = Evaluations(1, 0)
    on_late: Callable[[int, dict[str, float]], None] = lambda step, fields: None


class _Step(NamedTuple):
    """A step that was dispatched and whose metrics have not been read."""

    number: int
    metrics: StepMetrics
    tokens: int


def run(
    state: TrainState,
    run_step: Callable[[TrainState, AnyBatch], tuple[TrainState, StepMetrics]],
    batches: AnyBatches,
    settings: Settings,
    history: History,
    watchdog: Watchdog,
    stop: Stop,
    hooks: Hooks,
) -> TrainState:
    """Take the steps from `state.step` up to `settings.total_steps`.

    The host waits for the device at log and save steps and at the end of an epoch, and where it is more than `AHEAD` steps
    ahead; the next batch is built meanwhile.

    Args:
      state: where to start; donated.
      run_step: the jitted step.
      batches: the training data, epoch after epoch.
      settings: see `Settings`.
      history: of earlier steps; updated in place.
      watchdog: monitors every batch, compilation and log line.
      stop: checked after every step. While an epoch is scored, a request interrupts the scoring.
      hooks: see `Hooks`.

    Returns: the last state.

    Raises:
      NotFinite: a loss or gradient was NaN or infinite, or too many were.
      UserError: a batch that did not arrive in time, or a file that cannot be written.
      Stopped: on request, once the state is saved.
    """
    start, total, evaluations = int(state.step), settings.total_steps, hooks.evaluations
    pending: list[_Step] = []

    def fetch(number: int) -> AnyBatch:
        return batches.batch(*divmod(number, batches.steps_per_epoch))

    if fields := evaluations.at_start(state):
        hooks.on_late(start, fields)
    if evaluations.finished:
        return state
    began = last = time.perf_counter()
    earlier, compiled = history.seconds, set[tuple[int, ...]]()
    with console.bar("training", total) as bar, stop.held():
        ahead = in_background(functools.partial(fetch, start))
        for number in range(start, total):
            done = number + 1
            batch = watchdog.wait(ahead, done)
            if done < total:
                ahead = in_background(functools.partial(fetch, done))
            with watchdog.compiling(done, expected=_announce(batch, compiled, len(batches.shapes))):
                state, metrics = run_step(state, batch)
            pending.append(_Step(number, metrics, int(batch.lengths.sum())))
            if len(pending) > AHEAD:
                jax.block_until_ready(pending[-1 - AHEAD].metrics.loss)
            scoring, stopping, every = evaluations.due(done), stop.reached(done, 0), settings.save_every
            saving = every is not None and (done % every == 0 or done == total or scoring)
            if done % settings.log_every and not (done == total or saving or scoring or stopping):
                continue

            lines = _lines(pending, settings.rates, watchdog)  # waits for the device
            pending.clear()
            _check_finite(lines, watchdog, batches, state, hooks)
            now = time.perf_counter()
            history.add(lines, compiled, earlier + now - began)
            if scoring and not stopping:
                stopping = _interrupted(stop, evaluations, state, lines[-1])
                began += time.perf_counter() - now
            hooks.on_lines(lines)
            stopping = stopping or stop.reached(done, 2)
            _show(bar, done, total, _note(lines, now - last), (now - began) / (done - start))
            if saving or stopping:
                hooks.save(state)
            if stopping:
                raise Stopped(done)
            last = time.perf_counter()
            if scoring and evaluations.finished:
                break
    return state


def _show(bar: console.Bar, done: int, total: int, note: str, seconds_a_step: float) -> None:
    """Move the bar; where there is no terminal for it, print a line."""
    bar.update(done, total, note)
    if not console.is_terminal():
        console.say(f"step {done} of {total}: {note}, {seconds_a_step * (total - done):.0f} s left")


def _note(lines: list[Line], seconds: float) -> str:
    """Return what the progress bar shows of the last steps."""
    validation = f", validation {lines[-1]['validation_loss']:.4f}" if "validation_loss" in lines[-1] else ""
    return f"loss {lines[-1]['loss']:.4f}{validation}, {sum(line['tokens'] for line in lines) / seconds:.0f} tokens/s"


def _check_finite(lines: list[Line], watchdog: Watchdog, batches: AnyBatches, state: TrainState, hooks: Hooks) -> None:
    """Show the lines to the watchdog; log them and raise NotFinite, with the rows of the batch, if it ends the run."""
    try:
        watchdog.look(lines)
    except Failed as failed:
        hooks.on_lines(lines)
        rows = batches.row_numbers(*divmod(failed.step - 1, batches.steps_per_epoch))
        raise NotFinite(str(failed), rows, state) from None


def _interrupted(stop: Stop, evaluations: Evaluations, state: TrainState, line: Line) -> bool:
    """Score a state, add the results to the log line of its step, and return whether a request to stop interrupted that."""
    try:
        with stop.scoring(line["step"], 1):
            line |= evaluations(state)
    except Stopped:
        return True
    return stop.reached(line["step"], 1)


def _announce(batch: AnyBatch, compiled: set[tuple[int, ...]], possible: int) -> bool:
    """Return whether the batch has a shape that has not been compiled yet, and if so report it."""
    shape = (batch.input_ids.shape[1], *batch.label_mask.shape[1:])
    if shape in compiled:
        return False
    compiled.add(shape)
    sizes = " and ".join(f"{size} {name}" for size, name in zip(shape, ("tokens", "labels"), strict=False))
    console.say(f"compiling a step for {sizes} a row ({len(compiled)} of at most {possible})")
    return True


def _lines(pending: list[_Step], rates: optax.Schedule, watchdog: Watchdog) -> list[Line]:
    """Return the log lines of steps. A skipped step does not advance the learning rate's schedule."""
    lines: list[Line] = []
    skipped = watchdog.counts["skipped"]
    for entry in pending:
        lines.append(
            {
                "step": entry.number + 1,
                "loss": float(entry.metrics.loss),
                "learning_rate": float(rates(entry.number - skipped)),
                "gradient_norm": float(entry.metrics.gradient_norm),
                "labels": int(entry.metrics.labels),
                "tokens": entry.tokens,
            }
        )
        if not entry.metrics.finite:
            lines[-1]["finite"] = False
            skipped += 1
    return lines
