"""Merged models as Hugging Face directories: config, generation config, tokenizer, sharded safetensors."""

import copy
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import transformers

from neuroada_jax import files
from neuroada_jax.core import low_rank, quantised, trees
from neuroada_jax.core.trees import ModulePath, Tree
from neuroada_jax.data.prompts import PromptForm
from neuroada_jax.models import config_fields, names
from neuroada_jax.pretrained import prompt_form
from neuroada_jax.pretrained.load import OpenedModel
from neuroada_jax.pretrained.requantise import Requantiser

SHARD_BYTES = 5 * 10**9


def save(
    directory: Path,
    base_model: OpenedModel,
    params: Tree,
    tokenizer: transformers.PreTrainedTokenizerBase | None,
    *,
    form: PromptForm | None = None,
    replace: bool = False,
    requantiser: Requantiser | None = None,
) -> None:
    """Write `params` atomically as a checkpoint that transformers loads.

    Args:
      directory: destination; must not exist unless `replace`.
      base_model: the model with this architecture and config.
      params: parameters with connections merged in; low-rank factors beside their kernels are merged in one tensor at a
        time. Their dtype becomes the checkpoint's.
      tokenizer: saved beside the weights; None for no tokenizer.
      form: of the prompts that the weights were trained on, with its template's complete text: it is saved too, its
        template as the tokenizer's, and its end tokens end transformers' generations. None if unknown.
      replace: overwrite an existing directory.
      requantiser: quantises the kernels of the layers; None: they are written as they are.

    Raises:
      UserError: the directory exists or cannot be written, or an end token is not one token of the tokenizer.
    """
    end_ids = prompt_form.end_ids(form, tokenizer, base_model.source) if form and tokenizer is not None else []
    params, factors = low_rank.split(params)
    leaves: dict[ModulePath, Any] = dict(trees.flatten(params))
    slots = names.checkpoint_names(params, base_model.model.layers_path)
    dtype = np.dtype(next(leaf for leaf in leaves.values() if not isinstance(leaf, tuple)).dtype)

    def tensors(name: str) -> dict[str, np.ndarray]:
        if requantiser is not None and requantiser.takes(slots[name]):
            return requantiser.tensors(name, slots[name])
        return {name: np.asarray(dense(slots[name]))}

    def dense(slot: names.Slot) -> Any:
        tensor, own = slot.of(leaves[slot.path]), factors.get(slot.path[:-1])
        if own is None or slot.path[-1] != "kernel":
            return quantised.dense(tensor)
        return low_rank.merge_kernel(tensor, *map(slot.of, own))

    def size(slot: names.Slot) -> int:
        shape = quantised.shape(leaves[slot.path])[len(slot.place) :]
        if requantiser is not None and requantiser.takes(slot):
            return requantiser.nbytes(shape)
        return math.prod(shape) * dtype.itemsize

    plan = huggingface_hub.split_state_dict_into_shards_factory(
        slots,  # in place of the tensors, so that only one shard at a time is on the host
        get_storage_size=size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    with files.new_directory(directory, replace=replace) as temporary:
        weight_map: dict[str, str] = {}
        for file, members in plan.filename_to_tensors.items():
            shard = {stored: tensor for name in members for stored, tensor in tensors(name).items()}
            weight_map |= dict.fromkeys(shard, file)
            safetensors.numpy.save_file(shard, str(temporary / file), metadata={"format": "pt"})
        if plan.is_sharded:
            _write_json(temporary / "model.safetensors.index.json", {"metadata": plan.metadata, "weight_map": weight_map})
        section = {} if requantiser is None else {"quantization_config": requantiser.section}
        _write_json(temporary / "config.json", {**_config(base_model, dtype), **section})
        if base_model.model.architecture.is_decoder:
            _copy_generation_config(base_model, temporary, end_ids)
        if tokenizer is not None:
            _with_template(tokenizer, form).save_pretrained(str(temporary))
            _without_circumstances(temporary / "tokenizer_config.json")
        if form is not None:
            prompt_form.write(temporary, form, is_decoder=base_model.model.architecture.is_decoder)


def _without_circumstances(path: Path) -> None:
    """Remove from a tokenizer's config how it was loaded: from this disk, and without the hub."""
    if path.is_file():
        content = files.read_json(path)
        kept = {name: value for name, value in content.items() if name not in ("is_local", "local_files_only")}
        if kept != content:
            path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _config(base_model: OpenedModel, dtype: np.dtype) -> dict[str, Any]:
    config = dict(base_model.model.hf_config)
    for field in ("torch_dtype", "transformers_weights"):  # the older name of dtype, and the file that was read
        config.pop(field, None)
    config["dtype"] = "bfloat16" if dtype == jnp.bfloat16 else str(dtype)
    # The class of the saved model: a bare encoder has a classifier now.
    config["architectures"] = [base_model.model.architecture.transformers_class]
    return config


def _with_template(tokenizer: Any, form: PromptForm | None) -> Any:
    """Return the tokenizer with the form's chat template; the caller's own stays as it is."""
    template = None if form is None else form.chat_template
    if template is None or template == prompt_form.own_template(tokenizer):
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def _copy_generation_config(base_model: OpenedModel, directory: Path, end_ids: Sequence[int]) -> None:
    """Write the base model's generation config, with further end tokens behind its own."""
    source, config = Path(base_model.path) / "generation_config.json", base_model.model.hf_config
    if source.is_file():
        content = files.read_json(source)
    else:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        content = {key: config[key] for key in ids if config.get(key) is not None}
    named = content if "eos_token_id" in content else config
    own = config_fields.token_ids(named, f"{source}: ")["eos_token_id"]
    joined = list(dict.fromkeys([*own, *end_ids]))
    if joined != own:
        content["eos_token_id"] = joined
    elif source.is_file():
        shutil.copy(source, directory)
        return
    _write_json(directory / source.name, content)
