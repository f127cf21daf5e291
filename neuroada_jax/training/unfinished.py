"""Runs that are not finished, where their results are looked for: by commands, and by `na.load`."""

import shlex
from pathlib import Path

from neuroada_jax.errors import UserError
from neuroada_jax.training import config_file

_COMPLETE = ("adapter.json", "adapter_config.json", "config.json")  # of an adapter, PEFT's, a model


def check(*names: str | None) -> None:
    """Refuse the directory of a run, or a place in it, where an adapter or a model is looked for and is not.

    Args:
      names: paths, hub ids, or None, of adapters and models.

    Raises:
      UserError: it is the directory of a run, which names where the result is, or that of a run that is not finished,
        which names the command that resumes it.
    """
    for path in (Path(each) for each in names if each):
        if any((path / name).is_file() for name in _COMPLETE):
            continue
        for directory in (path, path.parent):
            _check_directory(path, directory)


def _check_directory(path: Path, directory: Path) -> None:
    if several := sorted(each.parent for each in directory.glob("seed-*/config.yaml")):
        every = ", ".join(str(each / "adapter") for each in several)
        raise UserError(f"{path}: {directory} holds runs of several seeds; give the adapter of one of them: {every}")
    config = directory / "config.yaml"
    if not config.is_file():
        return
    named = _directory_named_by(config)
    in_place = named is not None and named.resolve() == directory.resolve()
    if not in_place and not (directory / "metrics.jsonl").exists() and not (directory / "checkpoints").exists():
        return  # a config that the user has written, not one that a run has
    if path == directory and (path / "adapter" / "adapter.json").is_file():
        raise UserError(f"{path} is the directory of a run; its adapter is {path / 'adapter'}")
    if not (directory / "results.json").exists():
        moved = [] if in_place else [f"output={directory}"]
        resume = shlex.join(["neuroada", "train", str(config), *moved, "--resume"])
        raise UserError(f"{path}: the run in {directory} is not finished; resume it with: {resume}")


def _directory_named_by(config: Path) -> Path | None:
    """Return the directory of the run of a config file; None where the file is damaged."""
    try:
        return config_file.load(str(config)).directory
    except UserError:
        return None
