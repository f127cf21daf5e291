"""Sources of pretrained models: a directory, a GGUF file, the hub or a Python package; access to config and tensors."""

import importlib.util
import os
from pathlib import Path as FilePath
from typing import Any, Protocol, runtime_checkable

import huggingface_hub
import jax.numpy as jnp
import numpy as np

from neuroada_jax.errors import UserError
from neuroada_jax.files import read_json
from neuroada_jax.pretrained import gguf_config, gguf_file, hub, quantised_checkpoints, text_parts
from neuroada_jax.pretrained.packed_tensors import PackedTensors
from neuroada_jax.pretrained.safetensors_directory import SafetensorsDirectory

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
_HUB_COPIES = ["consolidated*", "original/*"]  # second copies of the weights in Mistral and Llama repositories


class ModelNotFound(UserError):
    """A model that is neither on this machine nor on the hub."""


@runtime_checkable
class TensorSource(Protocol):
    """A checkpoint on disk, under Hugging Face tensor names.

    One that may be quantised also has `format_of(name)`, a tensor's format or None, and `packed(name, raw)`, its arrays.
    """

    def names(self) -> list[str]:
        """Return the names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the header."""

    def read(self, name: str, raw: Any = None) -> np.ndarray:
        """Read a tensor; `raw` is what `raw` returned, where it was read already."""

    def raw(self, name: str) -> Any:
        """Return the stored bytes of a tensor as a buffer."""


def resolve(source: str, files: list[str] = HUB_FILES) -> str:
    """Return the local directory or file of a source, downloaded if it is a hub id.

    Args:
      source: a path; a hub id such as "HuggingFaceTB/SmolLM2-135M"; or "package:NAME/FILE" for a file that an installed
        Python package ships (the package is not imported).
      files: patterns of the files to download from the hub.

    Raises:
      ModelNotFound: the path, package or file does not exist, and the source is not a hub id that can be downloaded.
    """
    if source.startswith("package:"):
        return _in_package(source)
    if os.path.exists(source):
        return source
    looks_like_hub_id = source.count("/") <= 1 and not source.startswith((".", "/", "~")) and not source.endswith(".gguf")
    if not looks_like_hub_id:
        raise ModelNotFound(f"model {source} does not exist")
    try:
        with hub.quiet():
            return huggingface_hub.snapshot_download(source, allow_patterns=files, ignore_patterns=_HUB_COPIES)
    except Exception as error:  # a dozen types: offline, gated, unknown or malformed id
        raise ModelNotFound(
            f"model {source!r} is neither a local path nor a model that could be downloaded: {hub.reason(error)}"
        ) from error


def _in_package(source: str) -> str:
    package, _, file = source.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelNotFound(f"model {source}: the Python package {package!r} is not installed")
    path = FilePath(spec.submodule_search_locations[0]) / file
    if not path.exists():
        raise ModelNotFound(f"model {source}: the package {package!r} has no {file!r}")
    return str(path)


def read_config(path: str) -> dict[str, Any]:
    """Read the Hugging Face config of a local model directory, or of its text part alone, or of a GGUF file."""
    if path.endswith(".gguf"):
        return gguf_config.read_config(path)
    if not os.path.isdir(path):
        raise UserError(f"{path}: expected a model directory or a .gguf file")
    config = read_json(FilePath(path) / "config.json")
    return text_parts.config_of(config, path) if text_parts.has_other_parts(config) else config


def has_other_parts(path: str) -> bool:
    """Return whether only the text part of a local model directory is used."""
    return os.path.isdir(path) and text_parts.has_other_parts(read_json(FilePath(path) / "config.json"))


def open_tensors(path: str) -> TensorSource:
    """Open the tensors of a local model directory or GGUF file."""
    return gguf_file.GGUFTensors(path) if path.endswith(".gguf") else open_directory(path)


def open_directory(path: str) -> SafetensorsDirectory | PackedTensors:
    """Open the tensors of a local model directory: those that transformers would load."""
    config = read_config(path)
    file = config.get("transformers_weights")
    if file is not None and not (isinstance(file, str) and file.endswith((".safetensors", ".safetensors.index.json"))):
        raise UserError(
            f"{path}/config.json: transformers_weights: expected a .safetensors file or its index, found {file!r}"
        )
    directory = SafetensorsDirectory(path, file)
    if has_other_parts(path):
        directory.rename(text_parts.name_of)
    section = config.get("quantization_config")
    return quantised_checkpoints.open_packed(directory, section) if section else directory


def config_dtype(name: str, hf_config: dict[str, Any]) -> Any:
    """Return the dtype for "float32", "bfloat16" or "auto": the checkpoint's, with bfloat16 for float16, else float32."""
    if name == "auto":
        declared = hf_config.get("dtype") or hf_config.get("torch_dtype")
        name = "bfloat16" if declared in ("bfloat16", "float16") else "float32"
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]
