"""Pretrained models: opened from Hugging Face directories, hub ids and GGUF files, loaded tensor by tensor.

Each tensor is read by itself and written into the (donated) stacked buffer on the device, so that host memory stays within
about one tensor of the model's size.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import transformers
import xxhash

from neuroada_jax import console, devices, models
from neuroada_jax.core import trees
from neuroada_jax.core.trees import ModulePath, Tree
from neuroada_jax.errors import UserError
from neuroada_jax.models import Labels, names
from neuroada_jax.pretrained import placing, quantization, tensor_checks, tensor_names
from neuroada_jax.pretrained.placing import OnKernel
from neuroada_jax.pretrained.source import (
    HUB_FILES,
    TensorSource,
    config_dtype,
    open_directory,
    open_tensors,
    read_config,
    resolve,
)
from neuroada_jax.pretrained.tokenizer import load_tokenizer, without_image_token


@dataclasses.dataclass(frozen=True, eq=False)
class OpenedModel:
    """A model whose config has been read and whose tensors have not.

    Attributes:
      model: architecture and config.
      path: the local directory or GGUF file.
      source: the path, hub id or package file that the user named.
    """

    model: models.Model
    path: str
    source: str

    def with_labels(self, labels: Labels | Sequence[str]) -> "OpenedModel":
        """Return this encoder with a classifier for these labels, or for labels of these names."""
        model = models.from_hf_config(self.model.hf_config, self.model.config.dtype, labels)
        model = model._replace(quantization=self.model.quantization)
        return OpenedModel(model, self.path, self.source)

    def abstract_params(self) -> Tree:
        """Return the shapes of the parameters as `load` returns them, from the headers alone."""
        try:
            tensors = open_tensors(self.path) if quantization.needs_tensors(self.model, self.path) else None
            return quantization.abstract_params(self.model, quantization.formats(self.model, tensors))
        except UserError as error:
            raise _at(self.path, error) from error

    def stored_as(self) -> tuple[str, float]:
        """Return `quantization.stored_as`, from the headers of the tensors where these say more than the config."""
        try:
            tensors = open_tensors(self.path) if quantization.needs_tensors(self.model, self.path) else None
            return quantization.stored_as(self.path, self.model, read_config(self.path), tensors)
        except UserError as error:
            raise _at(self.path, error) from error

    def missing(self) -> list[str]:
        """Return the Hugging Face names of the optional tensors that the checkpoint lacks, from its headers alone."""
        stored = tensor_names.assign(self.model, open_tensors(self.path).names()).stored
        return [name for name in _optional(self.model) if name not in stored]

    def load(
        self,
        seed: int = 0,
        shardings: Tree | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        tensors: TensorSource | None = None,
        on_kernel: OnKernel | None = None,
    ) -> "LoadedModel":
        """Read the weights; arguments as in `load_params`, with the model's own tensors where none are given.

        Raises:
          UserError: a file or tensor that is missing, truncated or of another shape.
        """
        try:
            source = tensors or open_tensors(self.path)
            params, digests = load_params(self.model, source, on_progress, seed, shardings, on_kernel)
        except UserError as error:
            raise _at(self.path, error) from error
        return LoadedModel(self.model, self.path, self.source, digests, params)


@dataclasses.dataclass(frozen=True, eq=False)
class IdentifiedModel(OpenedModel):
    """A model whose tensors have been read once; their digests are kept, the parameters need not be.

    Attributes:
      digests: Hugging Face tensor name -> hex digest of its stored bytes; adapters recognise their base model by them.
    """

    digests: dict[str, str]

    @property
    def initialised(self) -> list[str]:
        """The Hugging Face names of the tensors that the checkpoint lacks, so that they were initialised from a seed."""
        return [name for name in _optional(self.model) if name not in self.digests]


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel(IdentifiedModel):
    """A model with its parameters.

    Attributes:
      params: parameter tree.
    """

    params: Tree

    def without_params(self) -> IdentifiedModel:
        """Return the model without parameters, for a caller that hands them to a training state, which donates them."""
        return IdentifiedModel(self.model, self.path, self.source, self.digests)


def _at(path: str, error: UserError) -> UserError:
    """Return an error that names the model's path."""
    return UserError(str(error) if path in str(error) else f"{path}: {error}")


_OTHER_LABELS = (
    "; its classifier is for another number of labels: begin with a checkpoint without one (in transformers: "
    "AutoModel.from_pretrained(MODEL).save_pretrained(FOLDER))"
)


def _optional(model: models.Model) -> list[str]:
    """Return the Hugging Face names of the tensors that a checkpoint may lack."""
    slots = names.checkpoint_names(model.abstract_params(), model.layers_path)
    return [name for name, slot in slots.items() if _is_below(slot.path, model.architecture.optional)]


def _is_below(path: ModulePath, modules: tuple[ModulePath, ...]) -> bool:
    return any(path[: len(module)] == module for module in modules)


def _initial_tensor(name: str, shape: tuple[int, ...], stddev: float, seed: int) -> np.ndarray:
    """Initialise a float32 tensor as transformers does: a normal weight, a norm's weight of ones or a zero bias."""
    if name.endswith(".bias"):
        return np.zeros(shape, np.float32)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    # A generator of its own, so that a tensor does not depend on which others are initialised.
    random = np.random.default_rng([seed, xxhash.xxh32_intdigest(name.encode())])
    return stddev * random.standard_normal(shape, np.float32)


def load_params(
    model: models.Model,
    tensors: TensorSource,
    on_progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
    shardings: Tree | None = None,
    on_kernel: OnKernel | None = None,
) -> tuple[Tree, dict[str, str]]:
    """Read the parameter tree of `model`, and the digest of every tensor's stored bytes.

    Args:
      model: architecture and config.
      tensors: the checkpoint.
      on_progress: called with (tensors done, tensors in total).
      seed: initialises the optional tensors that the checkpoint lacks; they have no digest.
      shardings: the sharding of each leaf of the tree; None for the default device. No device holds more than its part of
        the tree, and one tensor besides.
      on_kernel: called with (path, layer, weight) of every kernel that is quantised here, before it is.

    Raises:
      UserError: a tensor that the model needs is missing, has another shape or holds NaN or infinities, or the machine
        has too little memory for all of them.
    """
    formats = quantization.formats(model, tensors)
    flat: dict[tuple[str, ...], Any] = dict(trees.flatten(model.abstract_params()))
    held: dict[tuple[str, ...], Any] = dict(trees.flatten(quantization.abstract_params(model, formats)))
    leaf_shardings = dict(trees.flatten(shardings)) if shardings else dict.fromkeys(held)
    slots = names.checkpoint_names(model.abstract_params(), model.layers_path)
    found, architecture = tensor_names.assign(model, tensors.names()).stored, model.architecture
    shapes = {name: flat[slot.path].shape[len(slot.place) :] for name, slot in slots.items()}
    optional = {name: _is_below(slot.path, architecture.optional) for name, slot in slots.items()}
    for name in shapes:
        if name not in found and not optional[name]:
            untied = " (tie_word_embeddings is false)" if name == tensor_names.HEAD else ""
            raise UserError(f"tensor {name!r} is missing from the checkpoint{untied}; expected shape {list(shapes[name])}")
    hints = {name: _OTHER_LABELS if optional[name] else "" for name in shapes}
    tensor_checks.check_shapes(tensors, ((found[name], shapes[name], hints[name]) for name in shapes if name in found))
    tensor_checks.check_memory(*quantization.separate_parts(held, leaf_shardings))
    digests = {}
    filled: dict[tuple[str, ...], Any] = {}
    for done, (name, slot) in enumerate(slots.items()):
        form = formats.get(slot.path)
        if isinstance(form, tuple):  # one for each layer
            form = form[slot.layer or 0]
        if name in found:
            tensor, digests[name] = placing.read(model, tensors, found[name], slot, form, on_kernel)
        else:
            tensor = _initial_tensor(name, shapes[name], model.hf_config.get("initializer_range", 0.02), seed)
        if form is not None:
            tensor = quantization.node(tensor, form, flat[slot.path].dtype)
        placing.place(filled, slot, held[slot.path], leaf_shardings[slot.path], tensor)
        del tensor
        if name in found and hasattr(tensors, "release"):
            tensors.release(found[name])
        if on_progress:
            on_progress(done + 1, len(slots))
    return trees.unflatten(filled), digests


def open_model(
    source: str,
    dtype: str = "auto",
    *,
    config_only: bool = False,
    labels: Labels | Sequence[str] | None = None,
    quantization_of: str | None = None,
) -> OpenedModel:
    """Find a model and read its config; its weights are read by `OpenedModel.load`.

    Args:
      source: local Hugging Face directory, hub id, GGUF file or package file; see `source.resolve`.
      dtype: "float32", "bfloat16" or "auto" for the dtype of the checkpoint; float16 becomes bfloat16.
      config_only: download the config of a hub id only; its weights cannot be loaded afterwards.
      labels: of an encoder's classifier, or their names; None: those of the model's config.
      quantization_of: its kernels; see `quantization.resolve`.

    Raises:
      UserError: the path does not exist, its architecture or config is not supported, or JAX cannot start
        (`devices.check`), which `config_only` does not ask.
    """
    if not config_only:
        devices.check()
    path = resolve(source, ["config.json"] if config_only else HUB_FILES)
    hf_config = read_config(path)
    if os.path.exists(os.path.join(path, "adapter_config.json")):
        raise UserError(
            f"{path}: a PEFT adapter (adapter_config.json) lies beside the model, and transformers would load both; "
            "merge it into the model, or move it elsewhere"
        )
    try:
        held = quantization.resolve(quantization_of, path, hf_config)
        if not config_only:
            quantization.check_device(held)
        hf_config = {name: value for name, value in hf_config.items() if name != "quantization_config"}
        model = models.from_hf_config(hf_config, config_dtype(dtype, hf_config), labels)
        if model.architecture.is_decoder and model.config.tied and not _tied_in_effect(model, path, config_only):
            hf_config = {**hf_config, "tie_word_embeddings": False}
            model = models.from_hf_config(hf_config, model.config.dtype)
    except UserError as error:
        raise _at(path, error) from error
    model = model._replace(quantization=held)
    if model.ignored:
        names = ", ".join(model.ignored)
        console.warn(f"{path}: config.json: ignored, as transformers does for {hf_config['model_type']}: {names}")
    return OpenedModel(model, path, source)


def _tied_in_effect(model: models.Model, path: str, config_only: bool) -> bool:
    """Return whether a model whose config ties the output layer to the embedding has them tied.

    As in transformers, they are tied unless the checkpoint stores both with different values.
    """
    if path.endswith(".gguf"):
        return True  # the config is made from the tensors
    try:
        tensors = open_directory(path)
    except UserError:
        if config_only:
            return True  # the weights were not downloaded, or not completely: nothing but the config is known
        raise
    stored = tensor_names.assign(model, tensors.names()).stored
    head, embedding = stored.get(tensor_names.HEAD), stored.get(tensor_names.EMBEDDING)
    return head is None or embedding in (None, head) or tensors.same_values(head, embedding)


def load_model(
    source: str,
    dtype: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
    *,
    labels: Labels | Sequence[str] | None = None,
    seed: int = 0,
    quantization_of: str | None = None,
) -> LoadedModel:
    """Open a model and read its weights; see `open_model` and `OpenedModel.load`."""
    return open_model(source, dtype, labels=labels, quantization_of=quantization_of).load(seed, on_progress=on_progress)


def open_with_tokenizer(
    source: str,
    dtype: str,
    labels: Labels | Sequence[str] | None = None,
    *,
    config_only: bool = False,
    quantization_of: str | None = None,
) -> tuple[OpenedModel, transformers.PreTrainedTokenizerFast]:
    """Open a model and read its tokenizer; arguments as in `open_model`.

    With `config_only`, the source is a local path or the repository's tokenizer has been downloaded.

    Raises:
      UserError: see `open_model` and `tokenizer.load_tokenizer`; also a tokenizer that has more tokens than the
        model has embeddings.
    """
    opened = open_model(source, dtype, labels=labels, config_only=config_only, quantization_of=quantization_of)
    tokenizer = without_image_token(load_tokenizer(opened.path), opened.model.config.vocab_size)
    if len(tokenizer) > opened.model.config.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, more than the {opened.model.config.vocab_size} "
            "embeddings of the model"
        )
    return opened, tokenizer


def load_with_progress(
    opened: OpenedModel,
    seed: int = 0,
    shardings: Tree | None = None,
    *,
    replaced: bool = False,
    on_kernel: OnKernel | None = None,
) -> LoadedModel:
    """Read the weights under a progress bar; report unused tensors, and those that were initialised from `seed`.

    Arguments as in `load_params`; `replaced`: an adapter brings these tensors, so that nothing is to be said of them.
    """
    tensors = open_tensors(opened.path)
    with console.bar("loading weights") as shown:
        loaded = opened.load(seed, shardings, console.reporter(shown), tensors, on_kernel)
    for note in getattr(tensors, "notes", []):
        console.say(note)
    if unused := tensor_names.line(opened.source, opened.model, tensors.names()):
        console.say(unused)
    if _is_untied_by_its_tensors(opened):
        console.say(
            f"{opened.source}: {tensor_names.HEAD} differs from {tensor_names.EMBEDDING}, so they are not tied, as in "
            "transformers, though config.json has tie_word_embeddings true"
        )
    if loaded.initialised and not replaced:
        console.say(
            f"{opened.path} has no {', '.join(loaded.initialised)}: initialised from seed {seed}, to be trained or "
            "replaced by an adapter"
        )
    return loaded


def _is_untied_by_its_tensors(opened: OpenedModel) -> bool:
    if not opened.model.architecture.is_decoder or opened.model.config.tied or opened.path.endswith(".gguf"):
        return False
    return bool(read_config(opened.path).get("tie_word_embeddings"))


def with_params(opened: OpenedModel, loaded: LoadedModel, seed: int = 0) -> LoadedModel:
    """Return the opened model with the weights of `loaded`, as if they had been read from its checkpoint.

    Args:
      opened: architecture and config; its classifier may differ from that of `loaded`.
      loaded: the same model in memory; its arrays are shared, not copied.
      seed: initialises the tensors that the checkpoint lacks; those of `loaded` are not used.

    Raises:
      UserError: an array that is missing or has another shape or dtype.
    """
    slots = names.checkpoint_names(opened.model.abstract_params(), opened.model.layers_path)
    wanted, found = dict(trees.flatten(opened.model.abstract_params())), dict(trees.flatten(loaded.params))
    for name in IdentifiedModel(opened.model, opened.path, opened.source, loaded.digests).initialised:
        leaf = wanted[slots[name].path]
        tensor = _initial_tensor(name, leaf.shape, opened.model.hf_config.get("initializer_range", 0.02), seed)
        found[slots[name].path] = jnp.asarray(tensor).astype(leaf.dtype)
    for path, leaf in wanted.items():
        have = "none"
        if path in found:  # the layers of a kernel lie apart where they are quantised differently
            first, stack = (found[path][0], [len(found[path])]) if isinstance(found[path], tuple) else (found[path], [])
            have = f"{first.dtype} {[*stack, *first.shape]}"
        if have != f"{leaf.dtype} {list(leaf.shape)}":
            raise UserError(
                f"{loaded.source}: {'.'.join(path)}: expected {leaf.dtype} {list(leaf.shape)}, found {have} in memory"
            )
    params = trees.unflatten({path: found[path] for path in wanted})
    return LoadedModel(opened.model, opened.path, opened.source, loaded.digests, params)
