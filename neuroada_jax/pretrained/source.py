"""Where a pretrained model comes from: a directory, a GGUF file, the hub or a package; its config and its tensors."""

import importlib.util
import os
from pathlib import Path as FilePath
from typing import Any, Protocol, runtime_checkable

import huggingface_hub
import jax.numpy as jnp
import numpy as np

from neuroada_jax.errors import UserError
from neuroada_jax.files import read_json
from neuroada_jax.pretrained import gguf_file
from neuroada_jax.pretrained.safetensors_directory import SafetensorsDirectory

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
_HUB_COPIES = ["consolidated*", "original/*"]  # Mistral and Llama repositories hold the weights a second time


@runtime_checkable
class TensorSource(Protocol):
    """A checkpoint on disk, seen as Hugging Face tensor names."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> np.ndarray: ...

    def raw(self, name: str) -> Any: ...


def resolve(source: str, files: list[str] = HUB_FILES) -> str:
    """The local directory or file behind `source`.

    Args:
      source: a path; a hub id such as "HuggingFaceTB/SmolLM2-135M", which is downloaded; or "package:NAME/FILE" for a file
        that an installed Python package ships (the package is not imported).
      files: patterns of the files that are downloaded from the hub.

    Raises:
      UserError: there is no such path, package or file, and it is no hub id or the hub does not have it.
    """
    if source.startswith("package:"):
        return _in_package(source)
    if os.path.exists(source):
        return source
    looks_like_hub_id = source.count("/") <= 1 and not source.startswith((".", "/", "~")) and not source.endswith(".gguf")
    if not looks_like_hub_id:
        raise UserError(f"model {source} does not exist")
    try:
        return huggingface_hub.snapshot_download(source, allow_patterns=files, ignore_patterns=_HUB_COPIES)
    except Exception as error:  # the hub raises a dozen kinds: offline, gated, unknown, malformed id
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model {source!r} is neither a local path nor a model that the hub could give; check the spelling and the "
            f"network ({reason})"
        ) from error


def _in_package(source: str) -> str:
    package, _, file = source.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"model {source}: the Python package {package!r} is not installed")
    path = FilePath(spec.submodule_search_locations[0]) / file
    if not path.exists():
        raise UserError(f"model {source}: the package {package!r} has no {file!r}")
    return str(path)


def read_config(path: str) -> dict[str, Any]:
    """The Hugging Face config of a local model directory or GGUF file."""
    if path.endswith(".gguf"):
        return gguf_file.read_config(path)
    if not os.path.isdir(path):
        raise UserError(f"{path}: expected a model directory or a .gguf file")
    return read_json(FilePath(path) / "config.json")


def open_tensors(path: str) -> TensorSource:
    """The tensors of a local model directory or GGUF file."""
    return gguf_file.GGUFTensors(path) if path.endswith(".gguf") else SafetensorsDirectory(path)


def config_dtype(name: str, hf_config: dict[str, Any]) -> Any:
    """The jnp dtype for "float32", "bfloat16" or "auto": the checkpoint's own, bfloat16 for float16, else float32."""
    if name == "auto":
        declared = hf_config.get("dtype") or hf_config.get("torch_dtype")
        name = "bfloat16" if declared in ("bfloat16", "float16") else "float32"
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]
