"""The directory of a run: whether it may be used, where a run in it resumes, and what a new run removes from it."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from neuroada_jax import console, files
from neuroada_jax.errors import UserError
from neuroada_jax.locks import Lock, check_unlocked
from neuroada_jax.training import checkpoint, peers, trackers
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.config_file import to_yaml

LOCK = ".neuroada-lock"  # of the run that is at work in the directory
Seen = tuple[dict[Path, int], list[str]]  # see `look`
_RESULTS = "results.json"
FOLDERS = ("adapter", "merged", "checkpoints", "epochs", "validation", "tensorboard", "wandb")
FILES = (
    trackers.WANDB_ID,
    _RESULTS,
    "metrics.jsonl",
    "epochs.jsonl",
    "validation.jsonl",
    "loss.png",
    "confusion-*.png",
    "predictions-*.jsonl",
)


def check(config: RunConfig, overwrite: bool, resume: bool, force_resume: bool) -> None:
    """Check that the directory is free, or holds one run that is to be replaced or resumed.

    Raises:
      UserError: it holds a run and neither is asked for, runs of several seeds, or no run to resume; or options that
        contradict each other.
    """
    if force_resume and not resume:
        raise UserError("--force-resume: only together with --resume")
    if not peers.current().is_first:
        return  # the directory is the first process's
    check_unlocked(config.directory / LOCK, str(config.directory))
    written = config.directory / "config.yaml"
    if overwrite and resume:
        raise UserError("give --overwrite or --resume, not both")
    if any(config.directory.glob("seed-*/config.yaml")):
        raise UserError(f"{config.directory} holds runs of several seeds; use another name, or remove them")
    if not written.exists():
        if resume:
            raise UserError(f"{config.directory} holds no run to resume")
        return
    if not overwrite and not resume:
        raise UserError(
            f"{config.directory} holds a run already; use --overwrite to replace it, --resume to go on, or another name"
        )


def newest_checkpoint(checkpoints: checkpoint.Checkpoints, directory: Path) -> checkpoint.CheckpointInfo | None:
    """Return the checkpoint to resume from; None for a run that was interrupted before its first one.

    Raises:
      UserError: every checkpoint is damaged, or the run finished without keeping any.
    """

    def find() -> checkpoint.CheckpointInfo | None:
        found = checkpoints.newest
        if found is None:
            if checkpoints.damaged or any((directory / each).exists() for each in (_RESULTS, "adapter")):
                finished = "the run has finished: " if (directory / _RESULTS).exists() else ""
                raise UserError(f"{directory}: {finished}no checkpoint to resume from; --overwrite starts again")
            console.say("no checkpoint yet: starting from the beginning")
        return found

    found = peers.current().from_first("newest checkpoint", find)
    return None if found is None else checkpoint.CheckpointInfo(*found)


def start(config: RunConfig, seen: Seen, *, resumed: bool, replaced: Sequence[Path] = ()) -> Lock:
    """Create the directory and lock it, remove stale files, and write config.yaml.

    Args:
      config: the run.
      seen: what was in the directory when it was checked.
      resumed: remove the temporary files of interrupted writes alone. Otherwise everything that has the name of one of
        a run's results is removed.
      replaced: what else is removed.

    Returns: the lock, to be released when the run has ended.

    Raises:
      UserError: the directory cannot be written, or another run is, or has been, at work there since it was checked.
    """
    directory = config.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror})") from error
    lock = Lock.acquire(directory / LOCK, str(directory))
    try:
        if look(config) != seen:
            raise UserError(f"{directory}: another run has been at work here meanwhile; start this one again")
        for name in (*FOLDERS, *FILES, "config.yaml"):
            files.sweep(directory / name)
        stale = [*([] if resumed else results_of(directory)), *replaced]
        for path in sorted(stale, key=lambda path: path.name != _RESULTS):  # it says that the rest is complete
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        files.write_text(directory / "config.yaml", to_yaml(config))
    except OSError as error:
        lock.release()
        raise UserError(f"{directory}: cannot be written ({error.strerror})") from error
    except BaseException:
        lock.release()
        raise
    return lock


def results_of(directory: Path) -> list[Path]:
    """Return everything in a directory that has the name of one of a run's results."""
    return [path for name in (*FOLDERS, *FILES) for path in directory.glob(name)]


def tidy(config: RunConfig) -> None:
    """Remove the best state of a finished run, its adapter now, and checkpoints that the config does not ask for."""
    for each in ("epochs", "validation", *(() if config.training.save_every else ("checkpoints",))):
        shutil.rmtree(config.directory / each, ignore_errors=True)


def look(config: RunConfig) -> Seen:
    """Return what of the run's directory changes with every run in it: the time of its config, and its checkpoints."""
    checkpoints = config.directory / "checkpoints"
    return written(config), sorted(each.name for each in checkpoints.iterdir()) if checkpoints.is_dir() else []


def written(config: RunConfig) -> dict[Path, int]:
    """Return when each config.yaml of the run, or of its seeds, was written; it is the first file of a run."""
    found = [*config.directory.glob("config.yaml"), *config.directory.glob("seed-*/config.yaml")]
    return {path: path.stat().st_mtime_ns for path in found}
