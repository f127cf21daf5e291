"""Loss on validation rows during the training: it keeps the best state, and may end the run early."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Int

from neuroada_jax import console
from neuroada_jax.core.trees import Tree
from neuroada_jax.data.batches import AnyBatches
from neuroada_jax.data.rows import Rows
from neuroada_jax.errors import UserError
from neuroada_jax.training import modules, peers
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.kept_states import KeptStates
from neuroada_jax.training.loss_curve import loss_curve
from neuroada_jax.training.modes import Parallel
from neuroada_jax.training.step import AnyBatch, TrainState

Samples = Callable[[TrainState], list[dict[str, str]]]


class ValidationRows(NamedTuple):
    """The validation rows of a run, checked and tokenised.

    Attributes:
      batches: of all rows.
      prompts: of the rows whose continuations are shown, as text and as token ids.
    """

    batches: AnyBatches
    prompts: list[tuple[str, list[int]]]


def split(rows: Rows, share: float, seed: int, classes: Sequence[int] | None = None) -> tuple[Rows, Rows]:
    """Return (training rows, validation rows): a random share of the rows, both parts in the order of the file.

    Args:
      rows: all of them.
      share: of the rows, for validation.
      seed: of the choice.
      classes: of the rows: each gives the same share of its rows, up to rounding, and keeps one in training.

    Raises:
      UserError: the share leaves one of them empty.
    """
    count = round(share * len(rows))
    if not 0 < count < len(rows):
        raise UserError(
            f"data.validation: a share of {share} of {len(rows)} rows is {count}, expected 1 to {len(rows) - 1}"
        )
    rng = np.random.default_rng([seed, len(rows)])
    order = rng.permutation(len(rows))
    numbers = np.zeros(len(rows), int) if classes is None else np.asarray(classes)
    held_back = np.concatenate(
        [
            order[numbers[order] == number][:part]
            for number, part in enumerate(_parts(np.bincount(numbers), share, count, rng))
        ]
    )
    if not len(held_back):
        raise UserError(
            f"data.validation: each of the {len(np.unique(numbers))} labels of {rows.source} has one row, which is needed "
            "for training; expected a label with more, or validation rows in a file of their own"
        )
    left = np.setdiff1d(np.arange(len(rows)), held_back)
    return rows.part(left.tolist()), rows.part(np.sort(held_back).tolist())


def _parts(sizes: Int[np.ndarray, "classes"], share: float, count: int, rng: np.random.Generator) -> list[int]:
    """Return how many rows of each class are held back: its share, rounded so that they are `count`, but never all."""
    most = np.maximum(sizes - 1, 0)
    parts = np.minimum((share * sizes).astype(int), most)
    by_remainder = sorted(rng.permutation(len(sizes)).tolist(), key=lambda i: parts[i] - share * sizes[i])
    open_classes = [i for i in by_remainder if parts[i] < min(most[i], share * sizes[i] - 1e-9)]
    for i in open_classes[: max(count - int(parts.sum()), 0)]:
        parts[i] += 1
    return [int(part) for part in parts]


def mean_loss(
    module: nn.Module,
    losses: Callable[..., Array],
    state: TrainState,
    batches: AnyBatches,
    devices: Parallel,
    poll: Callable[[], None],
) -> float:
    """Return the mean loss over all labels, in nats, without dropout: one forward pass over the rows.

    Each of several processes scores its share of the batches if it has all weights, else its part of every batch.

    Args:
      module: the model.
      losses: (module, variables, batch) -> the loss of every label, as `step.make_sums` takes them.
      state: the state to score.
      batches: the rows.
      devices: of the run.
      poll: called after every batch; what it raises ends the scoring.
    """
    params, together, steps = devices.own(state.tuned), peers.current(), batches.steps_per_epoch
    poll = poll if not devices.shares_weights else lambda: None  # the others would wait for this process in a batch
    own = range(steps) if devices.shares_weights else range(together.index, steps, together.count)
    sums: list[list[float]] = []
    with console.bar("validating") as bar:
        report = console.reporter(bar)
        for done, index in enumerate(own, 1):
            each = _sums(module, losses, params, devices.spread(batches.batch(0, index)))
            sums.append([index, float(each[0]), float(each[1])])
            report(done, len(own))
            poll()
    shares = [sums] if devices.shares_weights else together.share("validation", sums, poll)
    total, labels = 0.0, 0.0
    for _, loss, count in sorted(each for share in shares for each in share):  # in the order of one process
        total, labels = total + loss, labels + count
    return total / labels


@functools.partial(jax.jit, static_argnames=("module", "losses"))
def _sums(module: nn.Module, losses: Callable[..., Array], params: Tree, batch: AnyBatch) -> tuple[Array, Array]:
    return jnp.sum(losses(module, {"params": params}, batch)), jnp.sum(batch.label_mask)


class Validation(KeptStates):
    """Scores states by their loss on the validation rows and keeps the adapter of the best.

    Its lines, in validation.jsonl: "step", "value" (the loss, None if not finite), and "samples" if there are any.
    """

    lower_is_better = True

    def __init__(
        self,
        directory: Path,
        loss: Callable[[TrainState], float],
        save: Callable[[Path, TrainState], None],
        done: int,
        *,
        perplexity: bool = False,
        patience: int | None = None,
        samples: Samples | None = None,
    ) -> None:
        """Continue after `done` steps.

        Args:
          directory: of the run.
          loss: scores a state.
          save: writes a state's adapter to a directory.
          done: steps done before the run was resumed; 0 for a new run.
          perplexity: whether exp(loss) is reported too.
          patience: validations without a lower loss after which the run ends; None: it never ends early.
          samples: generates a few continuations of validation prompts; None for none.
        """
        super().__init__(directory, "validation", save, done)
        self._loss, self._perplexity, self._patience, self._samples = loss, perplexity, patience, samples

    @property
    def stalled(self) -> bool:
        """Whether the last `patience` validations have not been better than the best before them."""
        scored = [line for line in self.lines if line["step"]]
        if self._patience is None or not scored:
            return False
        return len(scored) - 1 - scored.index(self.best) >= self._patience

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Score the state, unless its step has been scored already; return fields for its log line."""
        step = int(state.step)
        if self.line(step) is not None:
            return {}
        loss = self._loss(state)
        line: dict[str, Any] = {"step": step, "value": loss}
        if self._samples is not None:
            line["samples"] = self._samples(state)
        self.add(line, state)
        shown: dict[str, float] = {"validation_loss": loss}
        if self._perplexity:
            shown["validation_perplexity"] = math.exp(min(loss, 700.0))
        also = f", perplexity {shown['validation_perplexity']:.4g}" if self._perplexity else ""
        console.say(f"step {step}: validation loss {loss:.4f}{also}; {self._standing()}")
        for each in line.get("samples", ()):
            console.say(f"  {_line(each['prompt'])[-60:]} -> {_line(each['generation'])[:60]}")
        return shown

    def _standing(self) -> str:
        if self.lines[-1] is self.start:
            return "before the training"
        best = self.best
        if best is self.lines[-1]:
            return "the best so far"
        return f"the best is {-self.rank(best):.4f} at step {best['step']}"


def is_frozen(kept: KeptStates) -> bool:
    """Return whether all validations of a run, at least two, gave the same loss to six digits, or none a finite one."""
    values = [line["value"] for line in kept.lines]
    if len(values) < 2 or None in values:
        return len(values) >= 2 and not any(value is not None for value in values)
    return max(values) - min(values) <= 1e-6 * abs(values[-1])


def warn_without_gain(kept: KeptStates) -> None:
    """Warn where all validations gave the same, or the best state is no better than the one before the training."""
    best, start = kept.best["value"], kept.start
    if is_frozen(kept):
        found = "not a number" if best is None else f"{best:.4f}"
        console.warn(
            f"the validation loss is {found} in each of {len(kept.lines)} validations: training changes nothing of what "
            "the model says of these rows; look at the learning rate and the rows"
        )
        return
    if start is None or start["value"] is None or (best is not None and best < start["value"]):
        return
    found = "not a number" if best is None else f"{best:.4f} (step {kept.best['step']})"
    console.warn(
        f"the lowest validation loss of the training, {found}, is no lower than before it, {start['value']:.4f}: the base "
        "model is as good on these rows; try a lower optimizer.learning_rate, or more rows"
    )


def draw_losses(config: RunConfig, losses: Sequence[float], kept: KeptStates | None) -> None:
    """Write loss.png of a run, with its validation losses if its state was chosen by them."""
    lines, best = (kept.lines, kept.best["step"]) if isinstance(kept, Validation) else ([], None)
    model, rate = Path(config.model.path).name, config.optimizer.learning_rate
    title = f"{config.name}: {model}, {modules.size_of(config)}, rate {rate:g}"
    loss_curve(config.directory / "loss.png", losses, title, lines, best)


def _line(text: str) -> str:
    """Return a text on one line."""
    return repr(text)[1:-1]


class Evaluations:
    """The scores of states during a run: epochs on an evaluation set, and validations.

    Attributes:
      finished: whether the run may end early.
    """

    def __init__(
        self,
        steps_per_epoch: int,
        total_steps: int,
        after_epoch: Callable[[TrainState], None] | None = None,
        validation: Validation | None = None,
        validate_every: int | None = None,
    ) -> None:
        """Take what is due when.

        Args:
          steps_per_epoch: an epoch's score is due at its end.
          total_steps: everything is due at the end of the run.
          after_epoch: scores an epoch.
          validation: scores a state on the validation rows.
          validate_every: steps between two validations; None: at the end of every epoch.
        """
        self._total = total_steps
        self._due: list[tuple[int, Callable[[TrainState], Mapping[str, float] | None]]] = []
        if validation is not None:
            self._due.append((validate_every or steps_per_epoch, validation))
        if after_epoch is not None:
            self._due.append((steps_per_epoch, after_epoch))
        self._validation = validation

    @property
    def finished(self) -> bool:
        """Whether the run may end before its last step."""
        return self._validation is not None and self._validation.stalled

    def due(self, steps: int) -> bool:
        """Return whether anything is to be scored after so many steps."""
        return any(self._is_due(every, steps) for every, _ in self._due)

    def _is_due(self, every: int, steps: int) -> bool:
        return steps > 0 and (steps == self._total or steps % every == 0)

    def at_start(self, state: TrainState) -> dict[str, float]:
        """Score the state that a run starts with: before the first step, on the validation rows; else what is due.

        Returns: fields for the log line of its step; none where an earlier part of the run has scored it.
        """
        if int(state.step):
            return self(state)
        return {} if self._validation is None else self._validation(state)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Score a state by everything that is due; return fields for the log line of its step."""
        step, fields = int(state.step), dict[str, float]()
        for every, score in self._due:
            if self._is_due(every, step):
                fields |= score(state) or {}
        return fields
