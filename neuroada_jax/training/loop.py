"""The training loop: batches in, steps on the device, a line of metrics per step, a progress bar."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import optax

from neuroada_jax import console, files
from neuroada_jax.batches import AnyBatches
from neuroada_jax.training.step import AnyBatch, StepMetrics, TrainState


class Report(NamedTuple):
    """What a finished loop knows: the loss of every step, the tokens seen (padding left out), the step shapes used."""

    losses: list[float]
    tokens: int
    shapes: int


class NotFinite(Exception):
    """The loss or its gradient was NaN or infinite; the state is the one before that step."""

    def __init__(self, step: int, rows: np.ndarray, state: TrainState) -> None:
        super().__init__(f"step {step}")
        self.step, self.rows, self.state = step, rows, state


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
    log_every: int,
    metrics_path: Path,
    save: Callable[[TrainState], None] | None = None,
    save_every: int | None = None,
    after_epoch: Callable[[TrainState], None] | None = None,
) -> tuple[TrainState, Report]:
    """Takes the steps from `state.step` up to `total_steps`.

    The host waits for the device at log and save steps, and where an epoch ends, only; the next batch is built meanwhile.

    Args:
      state: where to start; donated.
      run_step: the jitted step.
      batches: what to train on, epoch after epoch.
      total_steps: updates to make.
      rates: learning rate by step, for the log.
      log_every: steps between two log steps.
      metrics_path: JSON lines, one per step; lines of steps that the state has not done are dropped.
      save: called with a good state every `save_every` steps, before the next step donates it.
      save_every: None for never.
      after_epoch: called with a good state at the end of every epoch and of the run, before it is saved.

    Returns: the last state and a report.

    Raises:
      NotFinite: a loss or gradient was NaN or infinite.
    """
    start = int(state.step)
    losses = _kept_losses(metrics_path, start)
    pending: list[_Pending] = []
    shapes: set[tuple[int, ...]] = set()
    tokens = 0
    began = last = time.perf_counter()

    def fetch(number: int) -> AnyBatch:
        return batches.batch(*divmod(number, batches.steps_per_epoch))

    with (
        ThreadPoolExecutor(1) as reader,
        metrics_path.open("a", encoding="utf-8") as log,
        console.bar("training", total_steps) as shown,
    ):
        ahead = reader.submit(fetch, start)
        for number in range(start, total_steps):
            batch = ahead.result()
            if number + 1 < total_steps:
                ahead = reader.submit(fetch, number + 1)
            shape = (batch.input_ids.shape[1], *batch.target_mask.shape[1:])
            if shape not in shapes:
                shapes.add(shape)
                what = " and ".join(f"{size} {name}" for size, name in zip(shape, ("tokens", "targets"), strict=False))
                console.say(f"compiling a step for {what} a row ({len(shapes)} of at most {len(batches.shapes)})")
            state, metrics = run_step(state, batch)
            pending.append(_Pending(number, metrics, int(batch.lengths.sum())))
            last_one = number + 1 == total_steps
            saving = save_every is not None and (number + 1) % save_every == 0
            epoch_ends = after_epoch is not None and (last_one or (number + 1) % batches.steps_per_epoch == 0)
            if (number + 1) % log_every and not last_one and not saving and not epoch_ends:
                continue

            window = sum(entry.tokens for entry in pending)
            written = _write(log, pending, rates)  # waits for the device
            if int(state.failed_step) >= 0:
                failed = int(state.failed_step)
                raise NotFinite(failed + 1, batches.rows(*divmod(failed, batches.steps_per_epoch)), state)
            losses += written
            tokens += window
            pending.clear()
            now = time.perf_counter()
            note = f"loss {losses[-1]:.4f}, {window / (now - last):.0f} tokens/s"
            if after_epoch is not None and epoch_ends:
                after_epoch(state)
            if save is not None and saving:
                save(state)
            last = time.perf_counter()
            shown.update(number + 1, total_steps, note)
            if not console.is_terminal():
                left = (now - began) / (number + 1 - start) * (total_steps - number - 1)
                console.say(f"step {number + 1} of {total_steps}: {note}, {left:.0f} s left")
    return state, Report(losses, tokens, len(shapes))


def _kept_losses(path: Path, steps: int) -> list[float]:
    """The losses of the first `steps` steps from an earlier part of the run; the file keeps these lines alone."""
    lines = path.read_text(encoding="utf-8").splitlines()[:steps] if path.exists() else []
    files.write_text(path, "".join(line + "\n" for line in lines))
    return [json.loads(line)["loss"] for line in lines]


def _write(log: IO[str], pending: list[_Pending], rates: optax.Schedule) -> list[float]:
    losses = []
    for entry in pending:
        line: dict[str, Any] = {
            "step": entry.step + 1,
            "loss": float(entry.metrics.loss),
            "learning_rate": float(rates(entry.step)),
            "gradient_norm": float(entry.metrics.gradient_norm),
            "targets": int(entry.metrics.targets),
            "tokens": entry.tokens,
        }
        losses.append(line["loss"])
        # JSON knows no NaN: a step that was not finite says null.
        finite = {key: value if np.isfinite(value) else None for key, value in line.items()}
        log.write(json.dumps(finite) + "\n")
    log.flush()
    return losses
