"""Where the base model of an adapter is: as it was typed, at its absolute path, or beside the adapter."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from neuroada_jax.adapters.native import Adapter
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained import quantization
from neuroada_jax.pretrained.load import OpenedModel
from neuroada_jax.pretrained.source import ModelNotFound, open_tensors

Opened = TypeVar("Opened")


def place(base_model: OpenedModel) -> dict[str, str]:
    """Return the metadata of where a base model is: `source` as typed, and of a local one its `absolute` path.

    `native.write` adds the path that is `relative` to the adapter.
    """
    is_local = base_model.path == base_model.source
    return {"source": base_model.source} | ({"absolute": os.path.abspath(base_model.path)} if is_local else {})


def located(adapter: Adapter, directory: str) -> str | None:
    """Return the path of an adapter's base model on this machine; None where there is none, as for a hub id.

    Of several places that exist, the first whose tensors have the adapter's digests counts.

    Args:
      adapter: its metadata has the places.
      directory: that the adapter was read from.
    """
    existing = [each for each in _places(adapter.metadata.get("base", {}), directory) if os.path.exists(each)]
    different = {os.path.realpath(each): each for each in reversed(existing)}
    if len(different) < 2:
        return existing[0] if existing else None
    digests = adapter.metadata["base"].get("digests", {})
    return next((each for each in existing if _has_digests(each, digests)), existing[0])


def _places(base: Mapping[str, Any], directory: str) -> list[str]:
    """Return the paths at which a base model may be, the one that was typed first."""
    found = [base.get("source"), base.get("absolute")]
    if base.get("relative"):
        found.append(os.path.normpath(os.path.join(os.path.realpath(directory), base["relative"])))
    return list(dict.fromkeys(each for each in found if each))


def _has_digests(path: str, digests: Mapping[str, str]) -> bool:
    """Return whether none of the tensors of a model differs from its digest."""
    try:
        tensors = open_tensors(path)
        names = digests.keys() & set(tensors.names())
        return all(quantization.digest(tensors.raw(name)) == digests[name] for name in names)
    except UserError:
        return False


def open_base(adapter: Adapter, directory: str, model: str | None, open_source: Callable[[str], Opened]) -> Opened:
    """Open the base model of an adapter.

    Args:
      adapter: its metadata names the base model.
      directory: that the adapter was read from.
      model: the base model that the user gives by --model; None: the one that the adapter names.
      open_source: opens a path, hub id or package file, such as `load.open_model`.

    Raises:
      UserError: the adapter names no base model, or one that is not found; names the adapter and --model.
    """
    if model:
        return open_source(model)
    base, named = adapter.metadata.get("base", {}), Path(directory) / "adapter.json"
    if not base.get("source"):
        raise UserError(f"{named} names no base model; give it by --model")
    found = located(adapter, directory)
    if found is None and base.get("absolute"):  # a directory, whose name is not to be looked up on the hub
        places = ", ".join(_places(base, directory))
        raise UserError(
            f"the base model {base['source']!r}, named by {named}, does not exist (tried {places}); give it by --model"
        )
    try:
        return open_source(found or base["source"])
    except ModelNotFound as error:
        raise UserError(f"{error}; named by {named} as the base model, which --model gives by another path") from error
