"""The folder that is uploaded: an adapter without anything of this machine, its model card, scores and loss curve."""

import hashlib
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from neuroada_jax import files
from neuroada_jax.adapters import native
from neuroada_jax.sharing import model_card, public_names
from neuroada_jax.sharing.origin import CARD, CURVE, RESULTS, Base, Origin


class File(NamedTuple):
    """A file of the folder.

    Attributes:
      name: in the folder and in the repository.
      size: in bytes.
      sha256: hex digest.
    """

    name: str
    size: int
    sha256: str


def write(origin: Origin, base: Base, repository: str, destination: Path) -> list[File]:
    """Write the folder, complete or not at all, and return its files.

    Args:
      origin: the adapter and its run.
      base: the base model's public name.
      repository: hub id that the folder is for; the model card names it.
      destination: the folder to create.

    Raises:
      UserError: the folder exists or cannot be written, or the results are not those of a run.
    """
    adapter = origin.adapter._replace(metadata=public_metadata(origin.adapter.metadata, base))
    results = None if origin.results is None else public_results(origin.results)
    card = origin.card.read_text(encoding="utf-8", errors="replace") if origin.card else None
    if card is None:
        subject = model_card.Subject(
            repository, adapter, base, results, origin.config, origin.directory, origin.curve is not None
        )
        card = model_card.render(subject)
    with files.new_directory(destination) as temporary:
        native.write(temporary / "adapter", adapter)
        for path in (temporary / "adapter").iterdir():
            path.rename(temporary / path.name)
        (temporary / "adapter").rmdir()
        (temporary / CARD).write_text(card, encoding="utf-8")
        if results is not None:
            (temporary / RESULTS).write_text(files.to_json(results, indent=2) + "\n", encoding="utf-8")
        if origin.curve:
            shutil.copyfile(origin.curve, temporary / CURVE)
    return listed(destination)


def listed(folder: Path) -> list[File]:
    """Return the files of a folder that `write` made."""
    contents = [(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]
    return [File(name, len(content), hashlib.sha256(content).hexdigest()) for name, content in contents]


def public_metadata(metadata: dict[str, Any], base: Base) -> dict[str, Any]:
    """Return the content of adapter.json without paths of this machine, and with the base model's public name.

    The prompt form stays as it is: prompts are made of it.
    """
    kept = {"prompt": metadata["prompt"]} if "prompt" in metadata else {}
    digests = metadata["base"]["digests"]
    local = ("digests", "absolute", "relative")  # the digests stay as they are, the places of a local model go
    about = public_names.without_paths({key: value for key, value in metadata["base"].items() if key not in local})
    if base.name:
        about["source"] = base.name
    if base.revision:
        about["revision"] = base.revision
    return public_names.without_paths(metadata) | {"base": about | {"digests": digests}} | kept


def public_results(results: dict[str, Any]) -> dict[str, Any]:
    """Return the content of results.json without paths of this machine."""
    return public_names.without_paths({key: value for key, value in results.items() if key != "directory"})
