"""How a model's kernels are held: as the checkpoint has them, dequantised, or quantised while they are read.

`Model.quantization` is "none"; "stored:FORMAT", where codes are kept as the checkpoint has them ("stored" alone for a GGUF
file, whose tensors differ); or the format of `quantise.MADE` into which the kernels of the layers are quantised on load.
Embeddings, norms, routers and the output layer stay in the model's dtype, unless a checkpoint has a quantised output layer;
with "+embeddings" at the end, the embedding and the output layer of a decoder are held like the kernels.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import xxhash

from neuroada_jax import models
from neuroada_jax.core import quantise, quantised, trees
from neuroada_jax.core.gguf_blocks import BLOCKS
from neuroada_jax.core.quantised import QuantisedKernel
from neuroada_jax.core.quantised_formats import bits, check_inputs
from neuroada_jax.core.trees import ModulePath, Tree
from neuroada_jax.errors import UserError
from neuroada_jax.models import names
from neuroada_jax.pretrained import gguf_header, quantised_checkpoints, tensor_names
from neuroada_jax.pretrained.safetensors_directory import INDEX, SINGLE

_PLAIN = {"F32", "F16", "BF16"}  # GGUF types that are no blocks
_RECORDED = "adapter:"
NONE, STORED, EMBEDDINGS = "none", "stored", "+embeddings"
REQUESTS = ("auto", "none", "nf4", "int8", "fp8", "nf4_nested")
# A format for all layers of a stacked kernel, or one for each layer (None: not quantised) where they differ.
Formats = dict[ModulePath, str | tuple[str | None, ...]]


def made(model: models.Model) -> str | None:
    """Return the format in which a model's kernels are quantised on load, None where they are not."""
    name = model.quantization.removesuffix(EMBEDDINGS)
    return name if name in quantise.MADE else None


def is_stored(model: models.Model) -> bool:
    """Return whether a model's kernels are kept as its checkpoint has them."""
    return model.quantization.startswith(STORED)


def format_of(held: str | None) -> str:
    """Return the format of kernels in words, from `Model.quantization`; None is that of an adapter that has none."""
    if held in (None, NONE, STORED, STORED + EMBEDDINGS):  # the weights of a GGUF file are the same, packed or not
        return "unquantised"
    return str(held).rpartition(":")[2]


def of_adapter(base: Mapping[str, Any]) -> str | None:
    """Return how the base model that an adapter's metadata describe is to be read, for `resolve`."""
    held = base.get("quantization")
    return f"{_RECORDED}{held}" if str(held).removesuffix(EMBEDDINGS) in quantise.MADE else None


def needs_tensors(model: models.Model, path: str) -> bool:
    """Return whether the formats of a model's kernels are known from its tensors alone."""
    if not is_stored(model):
        return False
    index = [name for name in (SINGLE, INDEX) if os.path.isfile(os.path.join(path, name))]
    return path.endswith(".gguf") or bool(index)


def declared(path: str, hf_config: Mapping[str, Any]) -> str | None:
    """Return what a checkpoint is quantised as, None where it is not: its method and its format, or a GGUF file's blocks.

    Raises:
      UserError: a method that is not read.
    """
    if path.endswith(".gguf"):
        stored = {
            info.qtype.name for name, info in gguf_header.read_header(path).tensors.items() if name.startswith("blk.")
        }
        packed = sorted(stored - _PLAIN)
        return f"GGUF {', '.join(packed)}" if packed else None
    section = hf_config.get("quantization_config")
    return " ".join(quantised_checkpoints.declared(section)) if section else None


def resolve(requested: str | None, path: str, hf_config: Mapping[str, Any]) -> str:
    """Return `Model.quantization` for what was asked for.

    Args:
      requested: one of `REQUESTS`; None: quantised checkpoints as they are, and GGUF files dequantised.
      path: the local directory or GGUF file.
      hf_config: its config.

    Raises:
      UserError: the checkpoint is quantised already, or in a way that is not read; or no device for fp8.
    """
    if requested is not None and requested.startswith(_RECORDED):
        # The kernels that an adapter was trained on were quantised on load; a checkpoint that has the codes is as good.
        requested = None if declared(path, hf_config) else requested.removeprefix(_RECORDED)
    if requested is not None and requested.endswith(EMBEDDINGS):
        held = resolve(requested.removesuffix(EMBEDDINGS), path, hf_config)
        if held == NONE or held.startswith(f"{STORED}:"):
            where = "is not quantised" if held == NONE else "has no quantised embedding"
            raise UserError(f"model.quantize_embeddings: the checkpoint {where}; expected false")
        return held + EMBEDDINGS
    if requested not in (None, *REQUESTS):
        raise UserError(f"quantization: expected one of {', '.join(REQUESTS)}, found {requested!r}")
    found = declared(path, hf_config)
    if requested is None:
        requested = NONE if path.endswith(".gguf") else "auto"
    if requested == "auto":
        if found is None:
            return NONE
        if path.endswith(".gguf") and (other := set(found.removeprefix("GGUF ").split(", ")) - set(BLOCKS)):
            raise UserError(
                f"model.quantization: blocks of {', '.join(sorted(other))} are not kept packed, only {', '.join(BLOCKS)}; "
                "expected none"
            )
        return STORED if path.endswith(".gguf") else f"{STORED}:{found.partition(' ')[2]}"
    if requested != NONE and found is not None:
        raise UserError(
            f"model.quantization: {requested} asked for, but the checkpoint is quantised already ({found}); expected auto, "
            "to keep its codes, or none, to dequantise them"
        )
    return requested


def check_device(quantization: str) -> None:
    """Check that the devices have the numbers of a format.

    Raises:
      UserError: a GPU without fp8.
    """
    held = format_of(quantization.removesuffix(EMBEDDINGS))
    if not held.startswith("fp8"):
        return
    others = "none" if quantization.startswith(STORED) else "nf4 or int8"
    for device in jax.devices():
        capability = getattr(device, "compute_capability", None)
        if device.platform == "gpu" and capability is not None and float(capability) < 8.9:
            raise UserError(
                f"model.quantization: fp8 needs a GPU of compute capability 8.9 or higher, found {device.device_kind} "
                f"({capability}); expected {others}"
            )


def formats(model: models.Model, tensors: Any = None) -> Formats:
    """Return the formats of a model's quantised kernels by the path of their leaf.

    Args:
      model: its `quantization` says which.
      tensors: the checkpoint, for "stored"; None: all kernels as its config says.

    Raises:
      UserError: a format whose blocks do not divide a map's inputs, codes for what is no kernel, or blocks of a GGUF file
        that are not kept packed.
    """
    if model.quantization == NONE:
        return {}
    abstract = model.abstract_params()
    kernels = {
        (*path, "kernel"): kernel
        for path, kernel in trees.kernels(abstract)
        if names.is_stacked(path, model.layers_path) and not names.is_router(abstract, path)
    }
    if model.quantization.endswith(EMBEDDINGS):
        kernels |= _vocabulary(model, abstract)
    if not is_stored(model) or tensors is None:
        held = model.quantization.removesuffix(EMBEDDINGS)
        name = held.partition(":")[2] or held
        for path, kernel in kernels.items():
            check_inputs(name, kernel.shape[-1], ".".join(path[:-1]))
        return dict.fromkeys(kernels, name)
    return _stored_formats(model, tensors, abstract)


def _vocabulary(model: models.Model, abstract: Tree) -> dict[ModulePath, Any]:
    """Return the shapes of a decoder's embedding and output layer.

    Raises:
      UserError: an encoder.
    """
    if not model.architecture.is_decoder:
        raise UserError(f"model.quantize_embeddings: {model.hf_config['model_type']} is an encoder; expected false")
    slots, leaves = names.checkpoint_names(abstract, model.layers_path), dict(trees.flatten(abstract))
    held = [slots[name].path for name in (tensor_names.EMBEDDING, tensor_names.HEAD) if name in slots]
    return {path: leaves[path] for path in held}


def _stored_formats(model: models.Model, tensors: Any, abstract: Tree) -> Formats:
    """Return the formats in which a checkpoint stores the kernels."""
    stored = tensor_names.assign(model, tensors.names()).stored
    found: dict[ModulePath, dict[int | None, str | None]] = {}
    vocabulary = _vocabulary(model, abstract) if model.quantization.endswith(EMBEDDINGS) else {}
    leaves = dict(trees.flatten(abstract))
    packs_layers_only = getattr(tensors, "packs_layers_only", False)
    for name, slot in names.checkpoint_names(abstract, model.layers_path).items():
        if name not in stored and slot.layer is not None and slot.path[-1] == "kernel":
            shape = list(leaves[slot.path].shape[len(slot.place) :])
            raise UserError(f"tensor {name!r} is missing from the checkpoint; expected shape {shape}")
        own = tensors.format_of(stored[name]) if name in stored else None
        if packs_layers_only and slot.layer is None and slot.path not in vocabulary:
            own = None
        if own is not None and slot.path[-1] != "kernel" and slot.path not in vocabulary:
            raise UserError(f"tensor {stored[name]!r} is quantised ({own}), and is not the weight of a linear map")
        of_layers = found.setdefault(slot.path, {})
        if of_layers.setdefault(slot.layer, own) != own:
            other = of_layers[slot.layer] or "unquantised"
            raise UserError(
                f"tensor {stored[name]!r} is {own or 'unquantised'}, and other experts of its layer are {other}"
            )
    merged: Formats = {}
    for path, of_layers in found.items():
        each = tuple(of_layers.values())
        if each[0] is not None and len(set(each)) == 1:
            merged[path] = each[0]
        elif any(each):
            merged[path] = each
    if vocabulary and not vocabulary.keys() & merged.keys():
        raise UserError("model.quantize_embeddings: the checkpoint has no quantised embedding; expected false")
    if not merged and model.quantization.startswith(f"{STORED}:"):
        raise UserError(
            f"config.json: quantization_config: {tensors.method}, but no tensor is quantised; expected codes, or a "
            "config.json without quantization_config"
        )
    return merged


def abstract_params(model: models.Model, of: Formats) -> Tree:
    """Return the shapes of a model's parameters with quantised kernels in these formats."""
    flat = dict(trees.flatten(model.abstract_params()))
    for path, name in of.items():
        leaf = flat[path]
        if isinstance(name, str):
            flat[path] = quantised.abstract(leaf, name)
        else:
            one = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
            flat[path] = tuple(one if each is None else quantised.abstract(one, each) for each in name)
    return trees.unflatten(flat)


def separate_parts(leaves: Mapping[Any, Any], shardings: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Return the leaves and shardings of a flat tree with those of quantised kernels apart, array by array."""
    parts, where = dict[Any, Any](), dict[Any, Any]()
    for path, leaf in leaves.items():
        own = shardings.get(path)
        of_parts = jax.tree.leaves(own)
        for number, part in enumerate(jax.tree.leaves(leaf)):
            parts[(path, number)] = part
            where[(path, number)] = of_parts[number] if len(of_parts) > 1 else own
    return parts, where


def make(tensor: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """Return the arrays of a weight in a format, quantised on the default device."""
    return {part: np.asarray(array) for part, array in quantise.quantise(np.asarray(tensor), name).items()}


def digest(raw: Any) -> str:
    """Return the digest of a tensor's stored bytes, or of the arrays of a quantised one."""
    if not isinstance(raw, Mapping):
        return xxhash.xxh3_128_hexdigest(raw)
    found = xxhash.xxh3_128()
    for name in sorted(raw):
        found.update(name.encode())
        found.update(np.ascontiguousarray(raw[name]).view(np.uint8).data)
    return found.hexdigest()


def node(parts: Mapping[str, Any], name: str, dtype: Any) -> QuantisedKernel:
    """Return the quantised kernel with these arrays."""
    return QuantisedKernel(dict(parts), name, np.dtype(dtype))


def stored_as(path: str, model: models.Model, hf_config: Mapping[str, Any], tensors: Any = None) -> tuple[str, float]:
    """Return what a checkpoint is quantised as, "none" where it is not, and the mean bits of its layers' weights.

    Args:
      path: the local directory or GGUF file.
      model: opened from it, without a request for another quantisation.
      hf_config: its config, with `quantization_config`.
      tensors: the checkpoint, in which some maps may not be quantised; None: there is a config alone.
    """
    if path.endswith(".gguf"):
        infos = gguf_header.read_header(path).tensors
        kernels = [info for name, info in infos.items() if name.startswith("blk.") and len(info.shape) > 1]
        found = declared(path, hf_config) or NONE
        return found, 8 * sum(info.nbytes for info in kernels) / sum(math.prod(info.shape) for info in kernels)
    declared_dtype = model.hf_config.get("dtype") or model.hf_config.get("torch_dtype")
    plain = 16.0 if declared_dtype in ("bfloat16", "float16") else 32.0
    if not is_stored(model):
        return NONE, plain
    of, entries, total = formats(model, tensors), 0, 0.0
    for path_of, kernel in trees.kernels(model.abstract_params()):
        if not names.is_stacked(path_of, model.layers_path):
            continue
        own = of.get((*path_of, "kernel"))
        each = own if isinstance(own, tuple) else (own,)
        mean = sum(plain if name is None else bits(name, kernel.shape[-1]) for name in each) / len(each)
        entries, total = entries + math.prod(kernel.shape), total + mean * math.prod(kernel.shape)
    return declared(path, hf_config) or NONE, total / entries
