"""Quantised checkpoints as their libraries write them: bitsandbytes' nf4 and int8 directories."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from helpers import random_tensors, write_safetensors

from neuroada_jax.core.quantise import quantise
from neuroada_jax.core.quantised_formats import NF4

# Blocks of 64 need these widths.
SIZES: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SECTIONS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_nested": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


def stored(name: str, weight: np.ndarray, form: str) -> dict[str, np.ndarray]:
    """The tensors that bitsandbytes stores for a weight."""
    parts = {part: np.asarray(array) for part, array in quantise(weight, form).items()}
    if form == "int8":
        return {name: parts["codes"], f"{name.removesuffix('weight')}SCB": parts["scale"].reshape(-1)}
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    tensors = {name: parts["codes"].reshape(-1, 1), f"{name}.absmax": parts["absmax"].reshape(-1), f"{name}.quant_map": NF4}
    if form == "nf4_nested":
        scales = parts["absmax"].size
        rows, width = np.arange(0, scales, 256) // parts["absmax"].shape[1], parts["absmax"].shape[1]
        places = (np.arange(0, scales, 256) - rows * width + parts["phase"][rows, 0]) // 256
        tensors[f"{name}.nested_absmax"] = parts["nested"][rows, places]
        tensors[f"{name}.nested_quant_map"] = parts["table"][0]
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(parts["offset"][0, 0])}
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors


def write_bitsandbytes(
    directory: Path, form: str, tokenizer: Any = None, sizes: dict[str, Any] = SIZES, **changes: np.ndarray | None
) -> Path:
    """A directory whose layers are quantised; `changes` replaces stored tensors by name, None removes one."""
    tensors = {}
    for name, weight in random_tensors(sizes).items():
        is_kernel = name.endswith("_proj.weight") or ".experts." in name
        tensors |= stored(name, weight, form) if is_kernel else {name: weight}
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    write_safetensors(directory, tensors)
    (directory / "config.json").write_text(json.dumps({**sizes, "quantization_config": SECTIONS[form]}))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))
    return directory
