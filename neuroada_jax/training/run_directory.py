"""The directory of a run: whether it may be used, where a run in it resumes, and what a new run removes from it."""

import shutil
from pathlib import Path

from neuroada_jax import console, files
from neuroada_jax.errors import UserError
from neuroada_jax.training import checkpoint, trackers
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.config_file import to_yaml

FOLDERS = ("adapter", "merged", "checkpoints", "epochs", "validation", "tensorboard", "wandb")
FILES = (
    trackers.WANDB_ID,
    "results.json",
    "metrics.jsonl",
    "epochs.jsonl",
    "validation.jsonl",
    "loss.png",
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
    found = checkpoints.newest
    if found is None:
        if checkpoints.damaged or any((directory / each).exists() for each in ("results.json", "adapter")):
            raise UserError(f"{directory}: no checkpoint to resume from; --overwrite starts again")
        console.say("no checkpoint yet: starting from the beginning")
    return found


def start(config: RunConfig, *, resumed: bool) -> None:
    """Create the directory, remove stale files, and write config.yaml.

    Args:
      config: the run.
      resumed: remove the temporary files of interrupted writes alone. Otherwise everything that has the name of one of
        a run's results is removed.

    Raises:
      UserError: the directory cannot be written.
    """
    directory = config.directory
    stale = [f".{name}*" for name in (*FOLDERS, *FILES, "config.yaml")] + ([] if resumed else [*FOLDERS, *FILES])
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path in [path for pattern in stale for path in directory.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror})") from error
    files.write_text(directory / "config.yaml", to_yaml(config))


def written(config: RunConfig) -> dict[Path, int]:
    """Return when each config.yaml of the run, or of its seeds, was written; it is the first file of a run."""
    found = [*config.directory.glob("config.yaml"), *config.directory.glob("seed-*/config.yaml")]
    return {path: path.stat().st_mtime_ns for path in found}
