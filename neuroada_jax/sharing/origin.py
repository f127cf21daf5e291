"""What is shared: an adapter's directory, or a run's directory with its config, results and loss curve."""

from pathlib import Path
from typing import Any, NamedTuple

from neuroada_jax.adapters import native, peft
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained import hub
from neuroada_jax.sharing import public_names
from neuroada_jax.training import config_file, results
from neuroada_jax.training.config import RunConfig

RESULTS, CURVE, CARD = "results.json", "loss.png", "README.md"


class Origin(NamedTuple):
    """An adapter and what is known about its run.

    Attributes:
      directory: of the adapter.
      adapter: its content.
      results: content of the run's results.json; None without one.
      config: of the run; None without one.
      curve: the run's loss.png; None without one.
      card: a README.md beside the adapter, which takes the place of a new model card; None without one.
    """

    directory: Path
    adapter: native.Adapter
    results: dict[str, Any] | None
    config: RunConfig | None
    curve: Path | None
    card: Path | None


class Base(NamedTuple):
    """The base model as others know it.

    Attributes:
      name: a hub id, "package:NAME/FILE", or the last part of a local path; "" for parameters of the caller's own.
      hub_id: None where no hub id is known.
      revision: commit of the hub's repository; None if unknown.
    """

    name: str
    hub_id: str | None = None
    revision: str | None = None


def find(path: str) -> Origin:
    """Read an adapter's directory, or that of a run; an adapter in a run's directory comes with its run.

    Raises:
      UserError: neither is there, or a file of it is damaged.
    """
    given = Path(path)
    if native.is_adapter(path):
        directory = given
        above = given.absolute().parent
        is_runs = given.absolute().name == "adapter" and all((above / name).is_file() for name in ("config.yaml", RESULTS))
        run = above if is_runs else given
    elif native.is_adapter(str(given / "adapter")):
        directory, run = given / "adapter", given
    else:
        raise UserError(f"{path}: {_other(given)}")
    adapter = native.read(str(directory))
    files = {name: run / name for name in (RESULTS, CURVE, "config.yaml") if (run / name).is_file()}
    return Origin(
        directory,
        adapter,
        results.read(files[RESULTS]) if RESULTS in files else None,
        config_file.load(str(files["config.yaml"])) if "config.yaml" in files else None,
        files.get(CURVE),
        directory / CARD if (directory / CARD).is_file() else None,
    )


def _other(path: Path) -> str:
    """Return what a path is that holds no adapter, for a message."""
    if not path.is_dir():
        return "expected the directory of an adapter or of a run"
    if peft.is_adapter(str(path)):
        return "an adapter of PEFT, expected one of this library; `neuroada import` converts it"
    if (path / "config.json").is_file():
        return "a complete model, expected an adapter; `hf upload USER/NAME DIRECTORY` uploads models"
    seeds = sorted(each.name for each in path.glob("seed-*") if native.is_adapter(str(each / "adapter")))
    if seeds:
        return f"holds runs of several seeds; choose one of {', '.join(seeds)}"
    if (path / "config.yaml").is_file():
        return "this run has not finished, so that it has no adapter yet; `neuroada train CONFIG --resume` goes on"
    return "expected the directory of an adapter (adapter.json is missing) or of a run"


def base_of(origin: Origin, hub_id: str | None) -> Base:
    """Return the base model's public name.

    Args:
      origin: the adapter and its run.
      hub_id: given by the user; None to take the name that the adapter or the run's config has.

    Raises:
      UserError: `hub_id` has not the form USER/NAME.
    """
    about = origin.adapter.metadata["base"]
    revision = about.get("revision")
    revision = revision if isinstance(revision, str) else None
    if hub_id is not None:
        if not hub.is_id(hub_id):
            raise UserError(f"--base-model: found {hub_id!r}, expected the hub id of the base model, USER/NAME")
        return Base(hub_id, hub_id, revision if hub_id == about.get("source") else None)
    names = [str(about.get("source") or "")] + ([origin.config.model.path] if origin.config else [])
    if about.get("absolute"):  # of a local base model, whose name as typed may look like a hub id
        names = [about["absolute"]] + [name for name in names if name != about.get("source")]
    for name in names:
        snapshot = hub.snapshot_of(name)
        if snapshot:
            return Base(snapshot[0], *snapshot)
        if hub.is_id(name) and public_names.is_on_hub(name, origin.directory):
            return Base(name, name, revision)
    for name in names:
        if name.startswith("package:"):
            return Base(name)
    return Base(public_names.last_part(names[0]))
