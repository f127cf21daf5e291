"""Checkpoints of a run through Orbax: step, values, columns, optimiser state. The only file that imports Orbax.

The base weights are not in a checkpoint. A batch is a pure function of (seed, epoch, index), and a dropout key one of
(seed, step, micro batch), so the step alone restores both; the rest that a resumed run needs is in `about`. The columns
are saved because those chosen by a gradient cost a pass over the data, and may differ where a GPU sums in another order.

A checkpoint gets its name only once all of it is written. Orbax notices most later damage, but not a flipped bit inside an
array, so every checkpoint has the digests of its files (except those at its top level, to which Orbax adds times later).
"""

import contextlib
import functools
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
import xxhash
from orbax.checkpoint import checkpoint_managers

from neuroada_jax import console, files
from neuroada_jax.core import bypass
from neuroada_jax.errors import UserError
from neuroada_jax.training import peers
from neuroada_jax.training.step import TrainState

FORMAT = 3
FORMER_FORMAT = 2  # of neuroada-jax 0.1: the same arrays under other names
ABOUT, DIGESTS = "about.json", "digests.json"


class CheckpointInfo(NamedTuple):
    """An intact checkpoint.

    Attributes:
      step: updates done.
      about: metadata of the run (`resuming.describe`), with "format", "step" and "arrays".
    """

    step: int
    about: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run's directory."""

    def __init__(self, directory: Path, keep_last: int = 2, keep_best: int = 0) -> None:
        """Name the directory and how many checkpoints to keep; nothing is created yet.

        Args:
          directory: of the checkpoints.
          keep_last: number of the newest that are kept.
          keep_best: number of those with the highest ranking score that are kept besides.
        """
        self._directory, self._keep_last, self._keep_best = directory, keep_last, keep_best
        self._quiet = contextlib.ExitStack()
        self._saving: CheckpointInfo | None = None  # being written in the background
        self.damaged: list[Path] = []  # skipped by `newest`

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's manager, created on first use: a run that saves nothing has no directory of checkpoints."""
        alone = peers.current().count == 1
        if not alone:  # the others have nothing to do with it
            self._directory.mkdir(parents=True, exist_ok=True)
        only_first = ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={0}, barrier_sync_key_prefix="first"
        )
        policies = [checkpoint_managers.LatestN(self._keep_last)]
        if self._keep_best:
            policies.append(checkpoint_managers.BestN(get_metric_fn=_merit, n=self._keep_best))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=_merit if self._keep_best else None,
            create=alone,
            multiprocessing_options=ocp.options.MultiprocessingOptions() if alone else only_first,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        return ocp.CheckpointManager(self._directory.resolve(), options=options)

    def __enter__(self) -> "Checkpoints":
        self._quiet.enter_context(_orbax_is_quiet())
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        with self._quiet:
            if "_manager" not in vars(self):
                return
            try:
                self._manager.close()  # waits for a save under way
            except Exception as failure:
                if error is None or issubclass(error, KeyboardInterrupt):  # otherwise the first error is more telling
                    raise self._not_saved(failure) from failure

    def save(self, state: TrainState, about: dict[str, Any] | None = None, merit: float | None = None) -> None:
        """Save in the background. The arrays are copied first, so the state may be donated at once.

        Does nothing if this step is saved already.

        Args:
          state: a good one.
          about: metadata that resuming needs, as JSON.
          merit: ranking score for `keep_best`, higher is better; None if unknown.

        Raises:
          UserError: this checkpoint, or the one before it that was still being written, could not be saved.
        """
        self._save(int(state.step), saved(state), about or {}, merit)

    def _save(self, step: int, content: dict[str, Any], about: dict[str, Any], merit: float | None) -> None:
        """Save the content of a state, as JAX arrays or, of several processes, as NumPy arrays."""
        self.wait()
        try:
            if step in self._manager.all_steps():
                return
            self._saving = CheckpointInfo(step, {"format": FORMAT, "step": step, "arrays": _arrays(content), **about})
            files.probe(self._directory)  # where this fails, Orbax's threads wait for ten minutes
            args = ocp.args.Composite(state=ocp.args.StandardSave(content))
            self._manager.save(step, args=args, metrics={"merit": merit} if self._keep_best else None)
        except Exception as error:  # Orbax raises OSError, ValueError, RuntimeError and others for a disk that is full
            raise self._not_saved(error) from error

    def wait(self) -> None:
        """Wait until everything is saved.

        Raises:
          UserError: a checkpoint could not be saved.
        """
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_saved(error) from error
        self._saving = None

    def _seal(self) -> None:
        """Write metadata and digests; Orbax calls this in its thread, once all is written and before the rename."""
        if self._saving is None:
            return
        (folder,) = self._directory.resolve().glob(f"{self._saving.step}.orbax-checkpoint-tmp*")
        files.write_text(folder / ABOUT, json.dumps(self._saving.about))
        sealed = [folder / ABOUT, *(path for path in (folder / "state").rglob("*") if path.is_file())]
        digests = {str(path.relative_to(folder)): _digest(path) for path in sealed}
        files.write_text(folder / DIGESTS, json.dumps(digests))

    def _not_saved(self, error: Exception) -> UserError:
        step = self._saving.step if self._saving else "new"
        others = [each for each in self._steps() if each != step]
        kept = f"the newest that is saved is that of step {others[0]}" if others else "none is saved"
        return UserError(f"{self._directory / str(step)}: the checkpoint cannot be saved ({_reason(error)}); {kept}")

    def _steps(self) -> list[int]:
        """Return the steps of all finished checkpoints, intact or damaged since, the newest first."""
        if not self._directory.is_dir():
            return []
        return sorted((int(path.name) for path in self._directory.iterdir() if path.name.isdigit()), reverse=True)

    @functools.cached_property
    def newest(self) -> CheckpointInfo | None:
        """The newest intact checkpoint; None if there is none. Warns of damaged ones, which are skipped.

        Raises:
          UserError: a checkpoint of another format.
        """
        for step in self._steps():
            folder = self._directory / str(step)
            if (folder / "default").is_dir():
                raise UserError(f"{folder}: expected checkpoint format {FORMAT}, found 1, which an older version wrote")
            try:
                about = _verified(folder)
            except UserError as damage:
                console.warn(f"{damage}: skipped")
                self.damaged.append(folder)
                continue
            if about.get("format") not in (FORMAT, FORMER_FORMAT):
                raise UserError(f"{folder}: expected checkpoint format {FORMAT}, found {about.get('format')}")
            return CheckpointInfo(step, about)
        return None

    def restore(self, state: TrainState) -> TrainState:
        """Restore the newest intact checkpoint into a freshly initialised state, whose columns need only the same shapes.

        The arrays get the shardings of those of `state`.

        Raises:
          UserError: there is no intact checkpoint, or it does not fit the state.
        """
        found = self._read(saved(state), ocp.utils.to_shape_dtype_struct)
        trained = bypass.Bypass(found["trainable"]["bypass"], found["columns"])
        base_entries = bypass.read(state.params, trained.columns)  # the original weights, since no step was taken yet
        complete = state._replace(
            **found, base_entries=base_entries, params=bypass.make_resident(state.params, trained, base_entries)
        )
        # Orbax commits arrays to their device, as device_put does. All must be committed, or the second step recompiles.
        return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), complete)

    def _read(self, expected: dict[str, Any], template: Callable[[Any], Any]) -> dict[str, Any]:
        """Return the content of the newest intact checkpoint.

        Args:
          expected: a tree of the same shapes and dtypes.
          template: makes of each of its arrays what tells Orbax how to restore it.

        Raises:
          UserError: see `restore`.
        """
        if self.newest is None:
            raise UserError(f"{self._directory}: no checkpoint to resume from")
        for folder in self.damaged:  # its step will be saved again
            aside = folder.with_name(f"{folder.name}.damaged")
            try:
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
            except OSError as error:
                raise UserError(f"{folder}: the damaged checkpoint cannot be renamed ({error.strerror})") from error
        former = self.newest.about["format"] == FORMER_FORMAT
        content = _with_former_names(expected) if former else expected
        step, here, there = self.newest.step, _arrays(content), self.newest.about["arrays"]
        if other := sorted(name for name in {**here, **there} if here.get(name) != there.get(name)):
            one = other[0]
            raise UserError(
                f"{self._directory / str(step)}: this checkpoint is of another model or config: {one}: expected "
                f"{here.get(one, 'none')}, found {there.get(one, 'none')}"
            )
        wanted = jax.tree.map(template, content)
        try:
            found: dict[str, Any] = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
            )["state"]
        except Exception as error:
            reason = _reason(error)
            raise UserError(f"{self._directory / str(step)}: this checkpoint cannot be resumed from ({reason})") from error
        # Both trees have the same leaves in the same order: the keys that differ sort to the same place.
        return jax.tree.unflatten(jax.tree.structure(expected), jax.tree.leaves(found)) if former else found


def saved(state: TrainState) -> dict[str, Any]:
    """Return the part of a state, abstract or real, that a checkpoint holds."""
    kept = ("step", "trainable", "columns", "opt_state")
    return {field: getattr(state, field) for field in kept}


def _with_former_names(content: Any) -> Any:
    """Return the content of a checkpoint under the names that neuroada-jax 0.1 used."""
    if isinstance(content, dict):
        names = {"opt_state": "optimizer"} | ({"classifier": "head"} if "bypass" in content else {})
        return {names.get(key, key): _with_former_names(node) for key, node in content.items()}
    if isinstance(content, tuple):
        parts = [_with_former_names(node) for node in content]
        return type(content)(*parts) if hasattr(content, "_fields") else tuple(parts)
    return content


def _arrays(content: dict[str, Any]) -> dict[str, str]:
    """Return dtype and shape of every saved array by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(content)
    return {jax.tree_util.keystr(path, simple=True, separator="."): str(jax.typeof(leaf)) for path, leaf in leaves}


def _verified(folder: Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint after checking the digests of its files.

    Raises:
      UserError: a file that is missing or differs from what was written.
    """
    if not (folder / DIGESTS).exists():
        raise UserError(f"{folder}: damaged, {DIGESTS} is missing")
    for name, digest in files.read_json(folder / DIGESTS).items():
        try:
            found = _digest(folder / name)
        except OSError as error:
            raise UserError(f"{folder}: damaged, {name} cannot be read ({error.strerror})") from error
        if found != digest:
            raise UserError(f"{folder}: damaged, {name} is not what was written")
    return files.read_json(folder / ABOUT)


def _digest(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def _merit(metrics: dict[str, float | None]) -> float:
    """Return the ranking score of a checkpoint; -inf where none was recorded, since Orbax needs a number."""
    merit = metrics["merit"]
    return -float("inf") if merit is None else merit


@contextlib.contextmanager
def _orbax_is_quiet() -> Iterator[None]:
    """Silence Orbax's log of errors that it also raises, and the output of its other writes after one has failed."""
    log, hook = logging.getLogger("absl"), sys.unraisablehook

    def not_of_orbax(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    def other_than_a_closed_loop(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    log.addFilter(not_of_orbax)
    sys.unraisablehook = other_than_a_closed_loop
    try:
        yield
    finally:
        sys.unraisablehook = hook
        log.removeFilter(not_of_orbax)


def _reason(error: Exception) -> str:
    """Return the first informative line of an error of Orbax or of a library below it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if below := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore's
        return os.strerror(int(below[1]))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
