"""Adapters by name: a directory on this machine, or a repository of the Hugging Face hub that is downloaded."""

import os
from pathlib import Path

import huggingface_hub

from neuroada_jax.adapters import native
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained import hub

FILES = ("adapter.json", "adapter.safetensors")
# Small files by which a repository without adapter.json is recognised: an adapter of PEFT, and a complete model.
_PEFT_CONFIG, _MODEL_CONFIG = "adapter_config.json", "config.json"


def read(adapter: str) -> native.Adapter:
    """Read an adapter by its name; see `directory` and `native.read`."""
    return native.read(directory(adapter))


def directory(adapter: str) -> str:
    """Return the local directory of an adapter, downloaded if it is a hub id.

    Args:
      adapter: a path, or a hub id such as "user/name" or "user/name@revision". A path that exists wins; what has not the
        form of a hub id is returned as it is.

    Raises:
      UserError: a hub id that cannot be downloaded, or whose repository holds something else.
    """
    if not _is_remote(adapter):
        return adapter
    folder = _download(adapter)
    if not (folder / FILES[0]).is_file():
        raise UserError(f"{adapter}: {_other(folder, adapter)}")
    if not (folder / FILES[1]).is_file():
        raise UserError(f"{adapter}: this repository of the hub has {FILES[0]} but no {FILES[1]}")
    return str(folder)


def directory_if_adapter(name: str) -> str | None:
    """Return the local directory of a name that is an adapter's, downloaded if need be; None for any other name."""
    if not _is_remote(name):
        return name if native.is_adapter(name) else None
    try:
        found = _download(name, FILES[:1])
    except UserError:
        return None
    return directory(name) if (found / FILES[0]).is_file() else None


def _is_remote(name: str) -> bool:
    return "/" in name and not os.path.exists(name) and hub.is_id(name.partition("@")[0])


def _download(name: str, files: tuple[str, ...] = (*FILES, _PEFT_CONFIG, _MODEL_CONFIG)) -> Path:
    repository, _, revision = name.partition("@")
    try:
        with hub.quiet():
            found = huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=list(files))
    except Exception as error:  # a dozen types: offline, gated, unknown or malformed id
        raise UserError(
            f"{name!r} is neither a local directory nor an adapter that could be downloaded: {hub.reason(error)}"
        ) from error
    return Path(found)


def _other(folder: Path, name: str) -> str:
    """Return what a downloaded repository without adapter.json is, for a message."""
    found = "no adapter in this repository of the hub (adapter.json is missing)"
    if (folder / _PEFT_CONFIG).is_file():
        download = f"hf download {name.partition('@')[0]} --local-dir DIRECTORY"
        return f"{found}, but an adapter of PEFT; download it with `{download}`, and convert it with `neuroada import`"
    if (folder / _MODEL_CONFIG).is_file():
        return f"{found}, but a complete model; give it as --model, without --adapter"
    return found
