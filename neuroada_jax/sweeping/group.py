"""A group of members that take their steps in one program: their training, their validation and the states they keep."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neuroada_jax import console
from neuroada_jax.core import bypass
from neuroada_jax.core.trees import Tree
from neuroada_jax.data.batches import AnyBatches
from neuroada_jax.models import Model
from neuroada_jax.sweeping import stack as stacks
from neuroada_jax.sweeping.grid import Member, counted, describe
from neuroada_jax.sweeping.stack import Stack
from neuroada_jax.training import modules
from neuroada_jax.training.loop import AHEAD
from neuroada_jax.training.preparation import PreparedRows
from neuroada_jax.training.signals import Stop, Stopped
from neuroada_jax.training.step import AnyBatch, StepMetrics, TrainState
from neuroada_jax.training.watchdog import IN_A_ROW, in_background

Shape = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Start:
    """A member before its first step.

    Attributes:
      member: its fields and config.
      rows: of its seed, prepared.
      state: its initial train state, without parameters and moments; members of equal connections share its arrays.
      progress: what an earlier process has done of its steps; None: nothing.
    """

    member: Member
    rows: PreparedRows
    state: TrainState
    progress: "Progress | None" = None

    @property
    def step(self) -> int:
        """The updates that are done already."""
        return self.progress.step if self.progress else 0

    @property
    def trained(self) -> int:
        """The number of trained values."""
        config, model = self.rows.config, self.rows.opened.model
        return modules.count_trained(config, model, self.state.trainable["bypass"]) + bypass.count(self.state.classifier)


@dataclasses.dataclass
class Course:
    """What a member has gone through.

    Attributes:
      lines: its validations: "step" and "value", None where that is not finite.
      diverged: the step that ended it, None for a sound member.
      skipped: steps that were not finite.
      in_a_row: of these, the last ones without a finite step between.
      stalled: whether `training.early_stopping` has ended it.
    """

    lines: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    diverged: int | None = None
    skipped: int = 0
    in_a_row: int = 0
    stalled: bool = False

    @property
    def best(self) -> dict[str, Any] | None:
        """The line of the first of the best validations; None without a finite one."""
        return min((line for line in self.lines if line["value"] is not None), key=lambda line: line["value"], default=None)

    @property
    def validation(self) -> float | None:
        """The lowest validation loss; None for a member that diverged."""
        return None if self.diverged is not None or self.best is None else self.best["value"]

    @property
    def over(self) -> bool:
        """Whether further steps cannot change the member any more."""
        return self.stalled or self.diverged is not None


class Progress(NamedTuple):
    """A member between two of its steps.

    Attributes:
      step: its updates.
      course: what it has gone through.
      state: its train state, with moments and without parameters.
      best: trained values, and the classifier, of its best validation.
    """

    step: int
    course: Course
    state: TrainState
    best: Tree


class Programs:
    """The step and the validation of members with equal shapes, compiled once for each number of members and shape."""

    def __init__(self, first: Start, model: Model, turns: bool | None = None) -> None:
        """Take any of the members, and the base model; `turns` as in `stack.in_turns`, None: as it says."""
        config, objective = first.rows.config, first.rows.objective
        module, dropout = model.module(config.training.remat_policy), objective.dropout_seed is not None
        self.step = stacks.make_step(module, config, objective.losses, dropout, turns)
        self.validation = stacks.make_validation(model.module(), objective.losses, turns)
        self._compiled: dict[tuple[int, Shape], Any] = {}

    def compiled(self, params: Tree, stack: Stack, batches: AnyBatch, shape: Shape) -> Any:
        """Return the step for stacked batches of a shape, compiled at its first use."""
        key = (stack.seeds.shape[0], shape)
        if key not in self._compiled:
            self._compiled[key] = self.step.lower(params, stack, batches).compile()
        return self._compiled[key]


class Group:
    """Members of equal shapes, from their first step, or from what is done of them (`Start.progress`), to their last.

    Their states are on the device inside of `on_device`; before and after it there are shapes in their place.
    """

    def __init__(self, starts: Sequence[Start], programs: Programs) -> None:
        """Take members of equal `grid.group_key`, equal steps and equal steps done, and their programs."""
        first = starts[0]
        self.starts, self.step, self.place = list(starts), first.step, ""  # among the groups, as progress shows it
        self.courses = [start.progress.course if start.progress else Course() for start in starts]
        self.config, self._programs = first.member.config, programs
        self.total, self._per_epoch = first.rows.total_steps, first.rows.batches.steps_per_epoch
        self.stack, self._best = jax.eval_shape(self._states)

    def _states(self) -> tuple[Stack, Tree]:
        """Return the stacked states of the members, and the trained values of their best validations."""
        states = [
            start.progress.state if start.progress else stacks.fresh(start.state, start.member.config)
            for start in self.starts
        ]
        best = [start.progress.best if start.progress else start.state.trainable for start in self.starts]
        stack = stacks.stacked(states, [start.member.config for start in self.starts], self.total)
        return stack, jax.tree.map(lambda *leaves: jnp.stack(leaves), *best)

    @contextlib.contextmanager
    def on_device(self) -> Iterator["Group"]:
        """Put the states on the device, and release them afterwards."""
        shapes = self.stack, self._best
        self.stack, self._best = self._states()
        try:
            yield self
        finally:
            self.stack, self._best = shapes

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.total or all(course.over for course in self.courses)

    def best_of(self, member: int) -> Tree:
        """Return the trained values, and the classifier, of a member's best validation."""
        return jax.tree.map(lambda leaf: leaf[member], self._best)

    def progress(self, member: int) -> Progress:
        """Return a member as it stands, off the device."""
        state: TrainState = jax.tree.map(lambda leaf: np.asarray(leaf[member]), self.stack.state)
        return Progress(self.step, self.courses[member], state, jax.tree.map(np.asarray, self.best_of(member)))

    def longest(self) -> Shape:
        """Return the shape of the longest batch that can occur."""
        shapes = [start.rows.batches.shapes[-1] for start in self.starts]
        return max(length for length, _ in shapes), max(labels for _, labels in shapes)

    def compiled(self, params: Tree) -> Any:
        """Return the compiled step at the longest shape."""
        return self._programs.compiled(params, self.stack, self._longest_batches(), self.longest())

    def trace(self, params: Tree) -> Any:
        """Return the trace of a step at the longest shape, whose work can be counted."""
        return self._programs.step.trace(params, self.stack, self._longest_batches())

    def _longest_batches(self) -> AnyBatch:
        return self._stacked([start.rows.batches for start in self.starts], 0, 0, self.longest())

    def advance(self, params: Tree, until: int, stop: Stop, save: Callable[["Group"], None]) -> Tree:
        """Take the steps up to `until`, validating where a run of its own would; return the weights, which are donated.

        Args:
          params: the frozen weights.
          until: the step to end with.
          stop: asked after every step, and between the batches of a validation, which then is made when the members go on.
          save: called every `training.save_every` steps, and where the sweep is to stop.

        Raises:
          Stopped: on request, once the members are saved.
        """
        training = self.config.training
        pending: list[StepMetrics] = []
        start, began = self.step, time.perf_counter()
        members = counted(len(self.starts)) + self.place
        with console.bar(f"training {members}", until) as bar, stop.held():
            if self._due and not all(course.over or self._has_line(course) for course in self.courses):
                params = self._validate(params, stop, save)
            ahead = in_background(functools.partial(self._batch, start)) if start < until else None
            while self.step < until and not self.finished:
                assert ahead is not None
                shape, batches = ahead.result()
                if self.step + 1 < until:
                    ahead = in_background(functools.partial(self._batch, self.step + 1))
                program = self._programs.compiled(params, self.stack, batches, shape)
                params, self.stack, metrics = program(params, self.stack, batches)
                self.step += 1
                pending.append(metrics)
                if len(pending) > AHEAD:
                    jax.block_until_ready(pending[-1 - AHEAD].loss)
                due = self._due
                saving = training.save_every is not None and self.step % training.save_every == 0
                if not (due or saving or stop.reached(self.step)) and self.step < until and self.step % training.log_every:
                    continue
                loss = self._look(pending)
                pending = []
                if due:
                    params = self._validate(params, stop, save)
                each = (time.perf_counter() - began) / (self.step - start)
                bar.update(self.step, until, f"lowest loss {loss:.4f}")
                if not console.is_terminal():
                    console.say(
                        f"step {self.step} of {until} of {members}: lowest loss {loss:.4f}, "
                        f"{each * (until - self.step):.0f} s left"
                    )
                if saving or stop.reached(self.step):
                    save(self)
                if stop.reached(self.step):  # perhaps while it was saved
                    raise Stopped(self.step)
        return params

    @property
    def _due(self) -> bool:
        """Whether the step that was taken is one after which a run of its own validates."""
        every = self.config.training.validate_every or self._per_epoch
        return self.step > 0 and (self.step == self.total or self.step % every == 0)

    def _has_line(self, course: Course) -> bool:
        return bool(course.lines) and course.lines[-1]["step"] == self.step

    def losses(self, params: Tree, stop: Stop) -> tuple[Tree, list[float]]:
        """Return the weights, and the validation loss of every member as it stands.

        Raises:
          Stopped: on request, between two batches.
        """
        batches = [start.rows.validation.batches for start in self.starts if start.rows.validation is not None]
        losses, labels = np.zeros(len(batches)), np.zeros(len(batches))
        for index in range(max(each.steps_per_epoch for each in batches)):
            shape = _common_shape(batches, 0, index)
            params, found = self._programs.validation(params, self.stack, self._stacked(batches, 0, index, shape))
            own = np.array([index < each.steps_per_epoch for each in batches])
            losses += np.where(own, np.asarray(found[0], np.float64), 0.0)
            labels += np.where(own, np.asarray(found[1], np.float64), 0.0)
            if stop.reached(self.step):
                raise Stopped(self.step)
        return params, [float(loss) for loss in losses / labels]

    def _validate(self, params: Tree, stop: Stop, save: Callable[["Group"], None]) -> Tree:
        """Validate every member, and keep the states that are better than all before; return the weights.

        Raises:
          Stopped: on request, once the members are saved as they were before.
        """
        try:
            params, values = self.losses(params, stop)
        except Stopped:
            save(self)
            raise
        at = jnp.asarray([self._note(course, value) for course, value in zip(self.courses, values, strict=True)])
        self._best = jax.tree.map(
            lambda old, new: jnp.where(at.reshape(-1, *[1] * (new.ndim - 1)), new, old),
            self._best,
            self.stack.state.trainable,
        )
        sound = [value for value in values if math.isfinite(value)]
        if sound:
            console.say(f"step {self.step}: validation losses {min(sound):.4f} to {max(sound):.4f}")
        return params

    def _note(self, course: Course, value: float) -> bool:
        """Add the validation of a member; return whether it is the best so far."""
        if course.over:
            return False
        before, line = course.best, {"step": self.step, "value": value if math.isfinite(value) else None}
        course.lines.append(line)
        patience = self.config.training.early_stopping
        best = course.best
        if patience is not None:
            since = len(course.lines) - 1 - (course.lines.index(best) if best is not None else 0)
            course.stalled = since >= patience
        return best is line and best is not before

    def _look(self, pending: Sequence[StepMetrics]) -> float:
        """Read the metrics of the steps since the last look; mark the members that diverged, and return the lowest loss."""
        section, first = self.config.watchdog, self.step - len(pending) + 1
        rows = [(np.asarray(metrics.finite), np.asarray(metrics.loss)) for metrics in pending]
        for number, (finite, _) in enumerate(rows, first):
            for start, course, sound in zip(self.starts, self.courses, finite.tolist(), strict=True):
                course.in_a_row = 0 if sound else course.in_a_row + 1
                course.skipped += not sound
                ended = course.skipped > section.max_skips or course.in_a_row >= IN_A_ROW
                ended |= number == self.total == course.skipped  # every step of the run
                if not (sound or course.over) and (section.nonfinite == "stop" or ended):
                    course.diverged = number
                    name = describe(start.member.fields)
                    console.warn(f"{name}: the loss became NaN or infinite at step {number}; it is left out")
        return min((float(loss) for loss in rows[-1][1] if np.isfinite(loss)), default=math.nan)

    def _batch(self, number: int) -> tuple[Shape, AnyBatch]:
        """Return the batches of a step, each as a run of its own would have it but for padding."""
        batches = [start.rows.batches for start in self.starts]
        epoch, index = divmod(number, self._per_epoch)
        shape = _common_shape(batches, epoch, index)
        return shape, self._stacked(batches, epoch, index, shape)

    def _stacked(self, batches: Sequence[AnyBatches], epoch: int, index: int, shape: Shape) -> AnyBatch:
        filled = [each.batch(epoch, min(index, each.steps_per_epoch - 1), shape) for each in batches]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *filled)


def _common_shape(batches: Sequence[AnyBatches], epoch: int, index: int) -> Shape:
    """Return the (T, M) that holds a batch of every member."""
    shapes = [each.shape_of(epoch, min(index, each.steps_per_epoch - 1)) for each in batches]
    return max(length for length, _ in shapes), max(labels for _, labels in shapes)
