"""The folder of a sweep: which members have finished, so that a killed sweep goes on, and what the choice leaves."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neuroada_jax import console, files
from neuroada_jax.errors import UserError
from neuroada_jax.locks import Lock, check_unlocked
from neuroada_jax.sweeping import progress
from neuroada_jax.sweeping.choice import FINISHED
from neuroada_jax.sweeping.grid import Member, describe
from neuroada_jax.sweeping.group import Progress
from neuroada_jax.training import config_file, resuming
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.run_directory import LOCK
from neuroada_jax.training.step import TrainState

BASE = "sweep.yaml"  # the config that the grid is laid over
_PROGRESS = "progress.safetensors"  # of a member that has not ended
_RESULTS = ("sweep.json", "sweep.png", "members", "best", BASE)


class Store:
    """The files of a sweep; every one is written completely or not at all."""

    def __init__(self, directory: Path) -> None:
        """Take the folder; `opened` creates and locks it."""
        self.directory = directory

    def check(self, config: RunConfig, swept: list[str], overwrite: bool) -> None:
        """Check that the folder is free, or holds a sweep of the same config; writes nothing.

        Args:
          config: the config that the grid is laid over.
          swept: fields of the grid, which may differ.
          overwrite: replace the sweep.

        Raises:
          UserError: the folder holds a run, or a sweep of another config, or is in use.
        """
        check_unlocked(self.directory / LOCK, str(self.directory))
        files.check_writable(self.directory / BASE)
        if (self.directory / "config.yaml").exists() or any(self.directory.glob("seed-*/config.yaml")):
            raise UserError(f"{self.directory} holds a run; give the sweep another folder with output=FOLDER")
        written = self.directory / BASE
        if overwrite or not written.exists():
            return
        old = config_file.flatten_config(config_file.load(str(written)))
        new = config_file.flatten_config(config)
        free = (*resuming.FREE, *swept, "seeds", "training.validation_samples")
        changed = [
            f"{name} ({old.get(name)} then, {new.get(name)} now)"
            for name in new
            if old.get(name) != new.get(name)
            and name not in free
            and not name.startswith(("parallel.", "tracking", "evaluation.before"))
        ]
        if changed:
            raise UserError(
                f"{self.directory} holds a sweep of another config: {', '.join(changed)}; --overwrite replaces it, or give "
                "another folder with output=FOLDER"
            )

    @contextlib.contextmanager
    def opened(self, config: RunConfig, overwrite: bool) -> Iterator[None]:
        """Create and lock the folder, and release it afterwards.

        Raises:
          UserError: it cannot be written, or another process is at work in it.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.directory}: cannot be written ({error.strerror})") from error
        with Lock.acquire(self.directory / LOCK, str(self.directory)):
            for name in _RESULTS:
                files.sweep(self.directory / name)
            for name in _RESULTS if overwrite else ():
                path = self.directory / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            files.write_text(self.directory / BASE, config_file.to_yaml(config))
            yield

    def folder(self, member: Member) -> Path:
        """Return the folder of a member."""
        return self.directory / "members" / member.name

    def adapter(self, member: Member) -> Path:
        """Return where the adapter of a member is."""
        return self.folder(member) / "adapter"

    def record(self, member: Member) -> dict[str, Any] | None:
        """Return the record of a member that has ended, None where it has to run.

        Raises:
          UserError: a record that is damaged.
        """
        path = self.folder(member) / "member.json"
        if not path.exists():
            return None
        content = files.read_json(path)
        if content.pop("digest", None) != files.digest(content):
            raise UserError(f"{path}: damaged, expected the record of a member; remove its folder to run the member again")
        if content["status"] == FINISHED and not self.adapter(member).exists():
            console.warn(f"{path.parent} has no adapter any more: {describe(member.fields)} runs again")
            return None
        return content

    def write(self, member: Member, record: dict[str, Any]) -> None:
        """Write the record of a member, which has no progress any more; its adapter, if any, is there already."""
        content = {**record, "digest": files.digest(record)}
        files.write_text(self.folder(member) / "member.json", files.to_json(content, indent=1) + "\n")
        path = self.folder(member) / _PROGRESS
        files.sweep(path)  # what a process that was killed left beside it
        path.unlink(missing_ok=True)

    def progress(self, member: Member, fresh: TrainState) -> tuple[Progress, dict[str, Any]] | None:
        """Return the progress of a member that has not ended, and what it was trained on; None where there is none."""
        path = self.folder(member) / _PROGRESS
        return progress.read(path, fresh) if path.exists() else None

    def write_progress(self, member: Member, done: Progress, about: dict[str, Any]) -> None:
        """Write the progress of a member; arguments as in `progress.write`."""
        progress.write(self.folder(member) / _PROGRESS, done, about)

    def write_best(self, adapter: Path, config: RunConfig) -> None:
        """Copy the chosen adapter to best/adapter and write best/config.yaml."""
        best = self.directory / "best"
        with files.new_directory(best / "adapter", replace=True) as new:
            for path in adapter.iterdir():
                shutil.copyfile(path, new / path.name)
        files.write_text(best / "config.yaml", config_file.to_yaml(config))
