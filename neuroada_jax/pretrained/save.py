"""Merged models as Hugging Face directories: config, generation config, tokenizer, sharded safetensors."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import transformers

from neuroada_jax import files
from neuroada_jax.core import trees
from neuroada_jax.core.trees import ModulePath, Tree
from neuroada_jax.models import names
from neuroada_jax.pretrained.load import OpenedModel

SHARD_BYTES = 5 * 10**9


def save(
    directory: Path,
    base_model: OpenedModel,
    params: Tree,
    tokenizer: transformers.PreTrainedTokenizerBase | None,
    *,
    replace: bool = False,
) -> None:
    """Write `params` atomically as a checkpoint that transformers loads.

    Args:
      directory: destination; must not exist unless `replace`.
      base_model: the model with this architecture and config.
      params: merged parameters; their dtype becomes the checkpoint's.
      tokenizer: saved beside the weights; None for no tokenizer.
      replace: overwrite an existing directory.

    Raises:
      UserError: the directory exists or cannot be written.
    """
    leaves: dict[ModulePath, jax.Array] = dict(trees.flatten(params))
    slots = names.checkpoint_names(params, base_model.model.layers_path)
    dtype = np.dtype(next(iter(leaves.values())).dtype)

    def tensor(name: str) -> np.ndarray:
        slot = slots[name]
        return np.asarray(leaves[slot.path] if slot.layer is None else leaves[slot.path][slot.layer])

    def size(slot: names.Slot) -> int:
        leaf = leaves[slot.path]
        return leaf.nbytes if slot.layer is None else leaf.nbytes // leaf.shape[0]

    plan = huggingface_hub.split_state_dict_into_shards_factory(
        slots,  # in place of the tensors, so that only one shard at a time is on the host
        get_storage_size=size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    with files.new_directory(directory, replace=replace) as temporary:
        for file, members in plan.filename_to_tensors.items():
            shard = {name: tensor(name) for name in members}
            safetensors.numpy.save_file(shard, str(temporary / file), metadata={"format": "pt"})
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            _write_json(temporary / "model.safetensors.index.json", index)
        _write_json(temporary / "config.json", _config(base_model, dtype))
        if base_model.model.architecture.is_decoder:
            _copy_generation_config(base_model, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _config(base_model: OpenedModel, dtype: np.dtype) -> dict[str, Any]:
    config = dict(base_model.model.hf_config)
    config.pop("torch_dtype", None)
    config["dtype"] = "bfloat16" if dtype == jnp.bfloat16 else str(dtype)
    # The class of the saved model: a bare encoder has a classifier now.
    config["architectures"] = [base_model.model.architecture.transformers_class]
    return config


def _copy_generation_config(base_model: OpenedModel, directory: Path) -> None:
    source = Path(base_model.path) / "generation_config.json"
    if source.is_file():
        shutil.copy(source, directory)
        return
    config = base_model.model.hf_config
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
    _write_json(directory / "generation_config.json", ids)
