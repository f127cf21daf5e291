"""The folder of a sweep: which members have finished, so that a killed sweep goes on, and what the choice leaves."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from neuroada_jax import console, files
from neuroada_jax.errors import UserError
from neuroada_jax.locks import Lock, check_unlocked
from neuroada_jax.sweeping import grid, progress
from neuroada_jax.sweeping.choice import FINISHED
from neuroada_jax.sweeping.grid import Member, describe
from neuroada_jax.sweeping.group import Progress
from neuroada_jax.training import config_file
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.run_directory import LOCK
from neuroada_jax.training.step import TrainState

BASE = "sweep.yaml"  # the config that the grid is laid over
_PROGRESS = "progress.safetensors"  # of a member that has not ended
_HALVING = "halving.json"  # which members a halving has kept and dropped
_BEST = ("best/adapter", "best/config.yaml")  # best/run is a run of the user's
_RESULTS = ("sweep.json", "sweep.png", "members", _HALVING, *_BEST, BASE)


def written(directory: Path) -> int | None:
    """Return when a sweep last began or went on in a folder, in ns; None where none has."""
    path = directory / BASE
    return path.stat().st_mtime_ns if path.exists() else None


class Store:
    """The files of a sweep; every one is written completely or not at all."""

    def __init__(self, directory: Path) -> None:
        """Take the folder; `opened` creates and locks it."""
        self.directory = directory
        self._finished: dict[str, Path] = {}  # folders by the digests of the members whose records they hold

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
        for name in (BASE, "sweep.json", "sweep.png", "members/x", "best/config.yaml"):
            files.check_writable(self.directory / name)
        if (self.directory / "config.yaml").exists() or any(self.directory.glob("seed-*/config.yaml")):
            raise UserError(f"{self.directory} holds a run; give the sweep another folder with output=FOLDER")
        written = self.directory / BASE
        if overwrite or not written.exists():
            return
        old = config_file.flatten_config(config_file.load(str(written)))
        new = config_file.flatten_config(config)
        changed = [
            f"{name} ({old.get(name)} then, {new.get(name)} now)"
            for name in new
            if old.get(name) != new.get(name) and name not in (*swept, "seeds") and not name.startswith(grid.FREE)
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
                files.remove(self.directory / name)
            files.write_text(self.directory / BASE, config_file.to_yaml(config))
            self._finished = self._records_by_digest()
            yield

    def folder(self, member: Member) -> Path:
        """Return the folder of a member; of one that has finished in a grid of other fields, that of then."""
        own = self.directory / "members" / member.name
        return own if own.exists() else self._finished.get(member.digest, own)

    def _records_by_digest(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in sorted(self.directory.glob("members/*/member.json")):
            with contextlib.suppress(UserError):  # a damaged one is named when its member is asked for
                content = files.read_json(path)
                found[str(content.get("member"))] = path.parent
        return found

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
        if content["member"] != member.digest:
            console.warn(f"{path} is of a run with another config than that of {describe(member.fields)}, which runs again")
            return None
        if content["status"] == FINISHED and content["adapter"] != _digest_of_files(self.adapter(member)):
            console.warn(f"{path.parent} no longer has the adapter that was written: {describe(member.fields)} runs again")
            return None
        return {**content, "fields": member.fields, "cell": member.cell}  # as this grid has them

    def write(self, member: Member, record: dict[str, Any]) -> None:
        """Write the record of a member, which has no progress any more; its adapter, if any, is there already."""
        content = {**record, "member": member.digest, "adapter": _digest_of_files(self.adapter(member))}
        text = files.to_json({**content, "digest": files.digest(content)}, indent=1)
        files.write_text(self.folder(member) / "member.json", text + "\n")
        path = self.folder(member) / _PROGRESS
        files.sweep(path)  # what a process that was killed left beside it
        files.remove(path)

    def progress(self, member: Member, fresh: TrainState) -> tuple[Progress, dict[str, Any]] | None:
        """Return the progress of a member that has not ended, and what it was trained on; None where there is none."""
        path = self.folder(member) / _PROGRESS
        return progress.read(path, fresh, member.digest) if path.exists() else None

    def write_progress(self, member: Member, done: Progress, about: dict[str, Any]) -> None:
        """Write the progress of a member; arguments as in `progress.write`."""
        progress.write(self.folder(member) / _PROGRESS, done, {**about, "member": member.digest})

    def halving(self) -> dict[str, dict[str, Any]]:
        """Return what a halving has decided, by the digest of a member: whether it is "kept", and its "validation" loss.

        Raises:
          UserError: a damaged file.
        """
        path = self.directory / _HALVING
        if not path.exists():
            return {}
        content = files.read_json(path)
        if content.pop("digest", None) != files.digest(content):
            raise UserError(f"{path}: damaged, expected the members that a halving has kept; remove it to decide again")
        return content

    def write_halving(self, decided: dict[str, dict[str, Any]]) -> None:
        """Write what a halving has decided, at once, before any member is dropped."""
        content = files.finite(decided)
        files.write_text(self.directory / _HALVING, files.to_json({**content, "digest": files.digest(content)}) + "\n")

    def remove_best(self) -> None:
        """Remove what an earlier choice has left."""
        for name in _BEST:
            files.remove(self.directory / name)

    def write_best(self, adapter: Path, config: RunConfig) -> None:
        """Copy the chosen adapter to best/adapter and write best/config.yaml."""
        best = self.directory / "best"
        with files.new_directory(best / "adapter", replace=True) as new:
            for path in adapter.iterdir():
                shutil.copyfile(path, new / path.name)
        files.write_text(best / "config.yaml", config_file.to_yaml(config))


def _digest_of_files(directory: Path) -> str | None:
    """Return the digest of a directory's files; None where there is no such directory."""
    if not directory.is_dir():
        return None
    content = {}
    for path in sorted(directory.rglob("*")):
        content[path.name] = xxhash.xxh3_128_hexdigest(path.read_bytes()) if path.is_file() else "no file"
    return files.digest(content)
