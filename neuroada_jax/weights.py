"""Checkpoints into parameter trees: Hugging Face directories, hub ids and GGUF files, streamed tensor by tensor.

Host memory stays near one tensor above the model's size: each tensor is read by itself and written straight into the
(donated) stacked buffer on the device.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any, NamedTuple, Protocol, runtime_checkable

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import transformers
import xxhash
from jax import lax

from neuroada_jax import console, gguf_weights, models
from neuroada_jax.core import trees
from neuroada_jax.core.trees import Path, Tree
from neuroada_jax.errors import UserError
from neuroada_jax.files import read_json
from neuroada_jax.models import names
from neuroada_jax.safetensors_weights import SafetensorsDirectory
from neuroada_jax.tokenizer import load_tokenizer

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
_HUB_COPIES = ["consolidated*", "original/*"]  # Mistral and Llama repositories hold the weights a second time

Progress = Callable[[int, int], None]


@runtime_checkable
class TensorSource(Protocol):
    """A checkpoint on disk, seen as Hugging Face tensor names."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> np.ndarray: ...

    def raw(self, name: str) -> Any: ...


class LoadedModel(NamedTuple):
    """A model with its weights.

    Attributes:
      model: architecture and config.
      params: parameter tree.
      digests: Hugging Face tensor name -> hex digest of its stored bytes; adapters use them to recognise their base.
      path: the local directory or GGUF file that was read.
      source: the path or hub id that was asked for.
    """

    model: models.Model
    params: Tree
    digests: dict[str, str]
    path: str
    source: str

    @property
    def drawn(self) -> list[str]:
        """The Hugging Face names of the tensors that the checkpoint lacks: a head that starts from a seed."""
        return [name for name in _optional(self.model) if name not in self.digests]


def lacking(opened: LoadedModel) -> list[str]:
    """What `drawn` will be once the weights are read, from the names in the checkpoint alone."""
    available, prefix = set(open_tensors(opened.path).names()), opened.model.architecture.prefix
    return [name for name in _optional(opened.model) if available.isdisjoint(names.spellings(name, prefix))]


def _optional(model: models.Model) -> list[str]:
    """The Hugging Face names of the tensors that a checkpoint may lack."""
    slots = names.checkpoint_names(model.abstract_params(), model.stack)
    return [name for name, slot in slots.items() if _is_below(slot.path, model.architecture.optional)]


def _is_below(path: Path, modules: tuple[Path, ...]) -> bool:
    return any(path[: len(module)] == module for module in modules)


def resolve(source: str, files: list[str] = _HUB_FILES) -> str:
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
        return gguf_weights.read_config(path)
    if not os.path.isdir(path):
        raise UserError(f"{path}: expected a model directory or a .gguf file")
    return read_json(FilePath(path) / "config.json")


def open_tensors(path: str) -> TensorSource:
    """The tensors of a local model directory or GGUF file."""
    return gguf_weights.GGUFTensors(path) if path.endswith(".gguf") else SafetensorsDirectory(path)


def config_dtype(name: str, hf_config: dict[str, Any]) -> Any:
    """The jnp dtype for "float32", "bfloat16" or "auto": the checkpoint's own, bfloat16 for float16, else float32."""
    if name == "auto":
        declared = hf_config.get("dtype") or hf_config.get("torch_dtype")
        name = "bfloat16" if declared in ("bfloat16", "float16") else "float32"
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]


@functools.partial(jax.jit, donate_argnums=0)
def _place(buffer: jax.Array, tensor: jax.Array, layer: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(buffer, tensor.astype(buffer.dtype), layer, 0)


def _draw(name: str, shape: tuple[int, ...], spread: float, seed: int) -> np.ndarray:
    """A new tensor of a head, float32: a normal weight or a zero bias, as transformers has them."""
    if name.endswith(".bias"):
        return np.zeros(shape, np.float32)
    random = np.random.default_rng([seed, xxhash.xxh32_intdigest(name.encode())])  # the same whatever else is drawn
    return spread * random.standard_normal(shape, np.float32)


def load_params(
    model: models.Model,
    tensors: TensorSource,
    on_progress: Progress | None = None,
    seed: int = 0,
    shardings: Tree | None = None,
) -> tuple[Tree, dict[str, str]]:
    """The parameter tree of `model` and the digest of every tensor's stored bytes.

    Args:
      model: what to fill.
      tensors: where from.
      on_progress: called with (tensors done, tensors in all).
      seed: where a head comes from that the checkpoint lacks; such tensors have no digest.
      shardings: where each leaf of the tree goes; None for the default device. No device ever holds more than its part of
        the tree and one tensor.

    Raises:
      UserError: a tensor that the model needs is missing or has another shape.
    """
    flat: dict[tuple[str, ...], Any] = dict(trees.flatten(model.abstract_params()))
    places = dict(trees.flatten(shardings or jax.tree.map(lambda _: None, model.abstract_params())))
    slots = names.checkpoint_names(model.abstract_params(), model.stack)
    available, architecture = set(tensors.names()), model.architecture
    digests = {}
    filled: dict[tuple[str, ...], jax.Array] = {}
    for done, (name, slot) in enumerate(slots.items()):
        leaf = flat[slot.path]
        expected = leaf.shape if slot.layer is None else leaf.shape[1:]
        stored = next((each for each in names.spellings(name, architecture.prefix) if each in available), None)
        if stored is not None:
            if tensors.shape(stored) != expected:
                raise UserError(f"tensor {stored!r} has shape {list(tensors.shape(stored))}, expected {list(expected)}")
            digests[name] = xxhash.xxh3_128_hexdigest(tensors.raw(stored))
            tensor = tensors.read(stored)
        elif _is_below(slot.path, architecture.optional):
            tensor = _draw(name, expected, model.hf_config.get("initializer_range", 0.02), seed)
        else:
            raise UserError(f"tensor {name!r} is missing from the checkpoint; expected shape {list(expected)}")
        if slot.layer is None:
            filled[slot.path] = jax.device_put(jnp.asarray(tensor).astype(leaf.dtype), places[slot.path])
        else:
            if slot.path not in filled:
                filled[slot.path] = jnp.zeros(leaf.shape, leaf.dtype, device=places[slot.path])
            placed = _place(filled[slot.path], np.asarray(tensor), np.int32(slot.layer))
            filled[slot.path] = placed.block_until_ready()  # else tensors queue up in host memory
        del tensor
        if on_progress:
            on_progress(done + 1, len(slots))
    return trees.unflatten(filled), digests


def open_model(
    source: str, dtype: str = "auto", *, config_only: bool = False, labels: Sequence[str] | None = None
) -> LoadedModel:
    """Everything about a model but its weights: `params` and `digests` are empty until `read_weights`.

    Args:
      source: local Hugging Face directory, hub id or GGUF file.
      dtype: "float32", "bfloat16" or "auto": as the checkpoint says; float16 becomes bfloat16.
      config_only: download no weights, where the source is a hub id; they cannot be read afterwards.
      labels: of an encoder's head, one for regression; None: as the model's config says.

    Raises:
      UserError: the path does not exist, or its architecture or config is not supported.
    """
    path = resolve(source, ["config.json"] if config_only else _HUB_FILES)
    hf_config = read_config(path)
    try:
        model = models.from_hf_config(hf_config, config_dtype(dtype, hf_config), labels)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return LoadedModel(model, {}, {}, path, source)


def read_weights(
    opened: LoadedModel, on_progress: Progress | None = None, seed: int = 0, shardings: Tree | None = None
) -> LoadedModel:
    """The opened model with its weights; `seed` and `shardings` as in `load_params`.

    Raises:
      UserError: a file or tensor that is missing, truncated or of another shape.
    """
    try:
        params, digests = load_params(opened.model, open_tensors(opened.path), on_progress, seed, shardings)
    except UserError as error:
        raise UserError(str(error) if opened.path in str(error) else f"{opened.path}: {error}") from error
    return opened._replace(params=params, digests=digests)


def load_model(
    source: str,
    dtype: str = "auto",
    on_progress: Progress | None = None,
    *,
    labels: Sequence[str] | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Opens a model and reads its weights; see `open_model` and `read_weights`."""
    return read_weights(open_model(source, dtype, labels=labels), on_progress, seed)


def open_base(
    source: str, dtype: str, labels: Sequence[str] | None = None
) -> tuple[LoadedModel, transformers.PreTrainedTokenizerFast]:
    """A model without its weights yet, and its tokenizer.

    Raises:
      UserError: see `open_model` and `tokenizer.load_tokenizer`; also a tokenizer that has more tokens than the
        model has embeddings.
    """
    opened = open_model(source, dtype, labels=labels)
    tokenizer = load_tokenizer(opened.path)
    if len(tokenizer) > opened.model.config.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, more than the {opened.model.config.vocab_size} "
            "embeddings of the model"
        )
    return opened, tokenizer


def with_labels(opened: LoadedModel, labels: Sequence[str]) -> LoadedModel:
    """The opened encoder, without its weights yet, with a head for these labels; one label means regression."""
    model = models.from_hf_config(opened.model.hf_config, opened.model.config.dtype, labels)
    return opened._replace(model=model)


def with_weights(opened: LoadedModel, seed: int = 0, shardings: Tree | None = None) -> LoadedModel:
    """The opened model with its weights, read under a progress bar; says which of them come from `seed`.

    Arguments as in `load_params`.
    """
    with console.bar("loading weights") as shown:
        loaded = read_weights(opened, console.reporter(shown), seed, shardings)
    if loaded.drawn:
        console.say(
            f"{opened.path} has no {', '.join(loaded.drawn)}: drawn from seed {seed}, to be trained or to be an adapter's"
        )
    return loaded
