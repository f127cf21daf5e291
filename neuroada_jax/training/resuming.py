"""Metadata of a checkpoint, and whether a run with a given config, data and base model may resume from it."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import xxhash

from neuroada_jax import console
from neuroada_jax.adapters import native
from neuroada_jax.core.trees import Tree
from neuroada_jax.data.batches import AnyBatches
from neuroada_jax.errors import UserError
from neuroada_jax.evaluation.scoring import Score
from neuroada_jax.training.checkpoint import CheckpointInfo, Checkpoints
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.config_file import flatten_config, from_dict
from neuroada_jax.training.loop import History
from neuroada_jax.training.modes import Parallel
from neuroada_jax.training.signals import Stopped
from neuroada_jax.training.step import TrainState
from neuroada_jax.training.trackers import Line

if TYPE_CHECKING:
    from neuroada_jax.training.preparation import PreparedRows

# Fields that a resumed run may change: where and how often files are written, and how the same sums are computed.
# Every other field changes the trained values or the reported scores.
FREE = (
    "name",
    "output",
    "merge",
    "evaluation.batch_size",
    "training.log_every",
    "training.save_every",
    "training.keep_last",
    "training.keep_best",
    "training.remat",
)


# Fields by which a run chose what trains, at its beginning: in a resumed one they could only be recorded.
_CHOSEN = ("method", "bypass.", "lora.r", "lora.targets")

# Fields under the name that neuroada-jax 0.1 digested them by, so that the digests of its checkpoints still agree.
_DIGESTED_AS = {"is_label": "is_target"}


def digest_of_data(batches: AnyBatches) -> str:
    """Return the digest of the training examples; it differs where a token or their order does."""
    digest, examples = xxhash.xxh3_128(), batches.examples
    for field in dataclasses.fields(examples):
        value = getattr(examples, field.name)
        if isinstance(value, np.ndarray):
            digest.update(_DIGESTED_AS.get(field.name, field.name).encode())
            digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()


def digests_of_held_out(prepared: "PreparedRows") -> dict[str, str]:
    """Return the digests of the rows that are not trained on, by the field of the config that names them."""
    found = {} if prepared.validation is None else {"data.validation": digest_of_data(prepared.validation.batches)}
    for name, scorer in prepared.scorers.items():
        rows = xxhash.xxh3_64_hexdigest(repr(list(scorer.rows.rows)).encode("utf-8", "surrogatepass"))
        found[f"evaluation.sets: {name}"] = rows
    return found


def digests_of_rows(prepared: "PreparedRows") -> dict[str, Any]:
    """Return the digests of all rows of a run, and the date in their prompts; `check_data` compares them."""
    return {
        "date": prepared.objective.form.date,
        "examples": digest_of_data(prepared.batches),
        "held_out": digests_of_held_out(prepared),
    }


def digest_of_arrays(tree: Tree) -> str:
    """Return the digest of a tree of NumPy arrays, in its order."""
    digest = xxhash.xxh3_128()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()


def digest_of_base(devices: Parallel, state: TrainState, digests: Mapping[str, str]) -> str:
    """Return the digest of the base weights at the chosen entries; where none are chosen (LoRA), that of all `digests`."""
    if state.base_entries:
        return digest_of_arrays(devices.on_host(state.base_entries))
    return xxhash.xxh3_128_hexdigest(repr(sorted(digests.items())).encode())


def describe(prepared: "PreparedRows", base: str, before: dict[str, Score]) -> dict[str, Any]:
    """Return the metadata that is the same in all checkpoints of a run, as JSON; `base` is from `digest_of_base`."""
    return {
        "config": dataclasses.asdict(prepared.config),
        "versions": native.installed_versions(),
        **digests_of_rows(prepared),
        "base": base,
        "dropout_seed": prepared.objective.dropout_seed,
        "before": {name: score.to_json() for name, score in before.items()},
    }


def changed_fields(about: dict[str, Any], config: RunConfig) -> dict[str, str]:
    """Return the fields that differ from those of the checkpoint: dotted path -> "a then, b now"."""
    old = flatten_config(from_dict(about["config"], "the checkpoint's config"))
    new = flatten_config(config)
    return {key: f"{old.get(key)} then, {new.get(key)} now" for key in {**old, **new} if old.get(key) != new.get(key)}


def check_config(about: dict[str, Any], config: RunConfig, force: bool) -> None:
    """Report the fields that differ, and refuse those that change the result.

    Raises:
      UserError: a field that changes the result, without `force`, or one that chose what trains.
    """
    changed = changed_fields(about, config)
    if changed:
        console.say("changed since the last run: " + ", ".join(f"{key} ({how})" for key, how in changed.items()))
    if chosen := [f"{key} ({how})" for key, how in changed.items() if key.startswith(_CHOSEN)]:
        raise UserError(
            f"{config.directory}: what trains was chosen when the run began and cannot change: {', '.join(chosen)}"
        )
    dropout = about["dropout_seed"] is not None
    if refused := [f"{key} ({how})" for key, how in changed.items() if not _is_free(key, dropout)]:
        _refuse(f"{config.directory}: cannot resume with another config; changed: {', '.join(refused)}", force)


def check_data(about: dict[str, Any], directory: Path, prepared: "PreparedRows", force: bool) -> None:
    """Check that the rows are those that the run in `directory` began with.

    Raises:
      UserError: they differ, without `force`.
    """
    if about["examples"] != digest_of_data(prepared.batches):
        _refuse(f"{directory}: cannot resume on other training rows than those that the run began with", force)
    now = digests_of_held_out(prepared)
    then = about.get("held_out", now)  # earlier checkpoints lack it
    if other := [field for field in now if then.get(field) != now[field]]:
        _refuse(f"{directory}: cannot resume with other rows of {', '.join(other)} than the run began with", force)


def check_base(about: dict[str, Any], directory: Path, base: str, force: bool) -> None:
    """Check that the base weights (`digest_of_base`) are those the run began with; warn of other library versions.

    Raises:
      UserError: the weights differ, without `force`.
    """
    if about["base"] not in (None, base):  # None: of several processes, in 0.1
        _refuse(f"{directory}: cannot resume on another base model than the one that the run began with", force)
    then, now = about["versions"], native.installed_versions()
    if other := [f"{name} {then[name]} then, {now.get(name)} now" for name in then if now.get(name) != then[name]]:
        console.warn(f"other versions than the checkpoint's, so that the last digits may differ: {', '.join(other)}")


def _is_free(key: str, dropout: bool) -> bool:
    """Return whether a field may change.

    With dropout, devices that share a batch have different masks, so that their number changes the result.
    """
    section = key.partition(".")[0]
    return key in FREE or section in ("watchdog", "tracking") or (section == "parallel" and not dropout)


def _refuse(message: str, force: bool) -> None:
    if not force:
        raise UserError(f"{message} (--force-resume resumes anyway)")
    console.warn(f"{message}; resuming anyway (--force-resume)")


def scores_before(about: dict[str, Any]) -> dict[str, Score]:
    """Return the scores of the base model that the run began with, without predictions, which have their own files."""
    return {name: Score.from_json(content) for name, content in about["before"].items()}


def history(checkpoint: CheckpointInfo | None, lines: Sequence[Line]) -> History:
    """Return the history up to the checkpoint, from it and from the lines of metrics.jsonl; empty for a new run."""
    if checkpoint is None:
        return History()
    losses, rates = [math.nan] * checkpoint.step, [math.nan] * checkpoint.step
    lines = [line for line in lines if line["step"]]
    for line in lines:
        losses[line["step"] - 1] = math.nan if line["loss"] is None else line["loss"]
        rates[line["step"] - 1] = line["learning_rate"]
    progress = checkpoint.about["progress"]
    return History(
        losses=losses,
        learning_rates=rates,
        tokens=sum(line["tokens"] for line in lines),
        shapes={tuple(shape) for shape in progress["shapes"]},
        seconds=progress["seconds"],
        warnings=progress["warnings"],
    )


class Saver:
    """Saves a state as a checkpoint, with the metadata that resuming needs."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        about: dict[str, Any],
        batches: AnyBatches,
        history: History,
        score: Callable[[int], float | None] | None = None,
    ) -> None:
        """Take a run's checkpoints and the state of its progress.

        Args:
          checkpoints: of the run's directory.
          about: metadata that all of its checkpoints share, from `describe`.
          batches: the training data.
          history: of the run; the loop updates it.
          score: step -> the score of the epoch that ended there, by which `keep_best` ranks; None: rank by the mean loss
            since the previous checkpoint, the lower the better.
        """
        self._checkpoints, self._about, self._batches = checkpoints, about, batches
        self._history, self._score = history, score
        self._last = len(history.losses)  # steps at the previous save

    def __call__(self, state: TrainState) -> None:
        """Save a state in the background."""
        step, done = int(state.step), self._history
        epoch, index = divmod(step, self._batches.steps_per_epoch)
        changing = {
            "data": {"seed": self._batches.seed, "epoch": epoch, "index": index},  # of the next batch
            "progress": {"seconds": done.seconds, "shapes": sorted(done.shapes), "warnings": dict(done.warnings)},
        }
        self._checkpoints.save(state, self._about | changing, self._merit(step))
        self._last = len(done.losses)

    def _merit(self, step: int) -> float | None:
        if self._score is not None:
            return self._score(step)
        losses = [loss for loss in self._history.losses[self._last :] if math.isfinite(loss)]
        return -sum(losses) / len(losses) if losses else None

    @contextlib.contextmanager
    def on_stop(self, state: TrainState) -> Iterator[None]:
        """Save the state of the last step if the work inside, which follows the training, is interrupted."""
        try:
            yield
        except Stopped as stopped:
            self(state)
            self._checkpoints.wait()
            stopped.step = int(state.step)
            raise
