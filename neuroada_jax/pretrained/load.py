"""Checkpoints into parameter trees: Hugging Face directories, hub ids and GGUF files, streamed tensor by tensor.

Host memory stays near one tensor above the model's size: each tensor is read by itself and written straight into the
(donated) stacked buffer on the device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import transformers
import xxhash
from jax import lax

from neuroada_jax import console, models
from neuroada_jax.core import trees
from neuroada_jax.core.trees import ModulePath, Tree
from neuroada_jax.errors import UserError
from neuroada_jax.models import names
from neuroada_jax.pretrained.source import HUB_FILES, TensorSource, config_dtype, open_tensors, read_config, resolve
from neuroada_jax.pretrained.tokenizer import load_tokenizer

Progress = Callable[[int, int], None]


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
    slots = names.checkpoint_names(model.abstract_params(), model.layers_path)
    return [name for name, slot in slots.items() if _is_below(slot.path, model.architecture.optional)]


def _is_below(path: ModulePath, modules: tuple[ModulePath, ...]) -> bool:
    return any(path[: len(module)] == module for module in modules)


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
    slots = names.checkpoint_names(model.abstract_params(), model.layers_path)
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
    path = resolve(source, ["config.json"] if config_only else HUB_FILES)
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
