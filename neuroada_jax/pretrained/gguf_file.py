"""Config and weights of a GGUF file, under Hugging Face names and in Hugging Face layout.

Blocks are dequantised by `gguf.quants.dequantize`, one tensor at a time, from the memory map.
"""

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.quants import dequantize

from neuroada_jax.core.gguf_blocks import BLOCKS, split_fields
from neuroada_jax.errors import UserError
from neuroada_jax.models.config_fields import shown
from neuroada_jax.pretrained.gguf_header import Header, TensorInfo, read_header

_PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}

# architecture in the file -> (model_type, class). Mistral is written as "llama": see read_config.
_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_TABLE = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")  # tables, not parameters


def _open_model(path: str | Path) -> tuple[Header, str]:
    """Return header and architecture of a complete, supported model; UserError otherwise."""
    header = read_header(path)
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in _ARCHITECTURES or _number(header.metadata, path, f"{arch}.expert_count", 0):
        known = isinstance(arch, str) and arch in _ARCHITECTURES
        kind = f"{arch!r} with experts" if known else f"{shown(arch)}"
        raise UserError(f"{path}: GGUF architecture {kind} is not supported, expected one of {', '.join(_ARCHITECTURES)}")
    parts = _number(header.metadata, path, "split.count", 1)
    if parts > 1:
        raise UserError(f"{path}: one of {parts} GGUF parts, expected one file (join them: llama-gguf-split --merge)")
    return header, arch


class GGUFTensors:
    """Tensors of one GGUF file under Hugging Face names, decoded one at a time from the memory map.

    Attributes:
      packs_layers_only: whether blocks of the embedding and the output layer are always dequantised.

    Raises:
      UserError: the file is truncated or not supported.
    """

    packs_layers_only = True

    def __init__(self, path: str | Path):
        self.path = path
        header, self._arch = _open_model(path)
        self._header = header
        heads = _required(header.metadata, path, f"{self._arch}.attention.head_count")
        kv_heads = _number(header.metadata, path, f"{self._arch}.attention.head_count_kv", heads)
        self._heads = {"q_proj": heads, "k_proj": kv_heads}
        self._tensors = {}
        for name, info in header.tensors.items():
            layer = _LAYER_NAME.fullmatch(name)
            if name in _TOP:
                self._tensors[_TOP[name]] = info
            elif layer and layer[2] in _LAYER:
                self._tensors[f"model.layers.{layer[1]}.{_LAYER[layer[2]]}.{layer[3]}"] = info
            elif not _ROPE_TABLE.fullmatch(name):
                self._tensors[f"{name} (GGUF)"] = info  # a name that no tensor of the model can have

    def names(self) -> list[str]:
        """Return the Hugging Face names in file order, without `rope_freqs.weight`, which belongs to the config.

        A tensor that no dense model of the architecture has is marked "(GGUF)" and keeps its name in the file.
        """
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the decoded shape: (O, I) of a linear map, (V, D) of an embedding, (O,) of a norm or bias."""
        return self._info(name).shape

    def raw(self, name: str) -> memoryview:
        """Return the stored bytes, read-only: still quantised, q and k still in llama.cpp's order of neurons."""
        return self._header.raw(self._info(name))

    def read(self, name: str, raw: memoryview | None = None) -> np.ndarray:
        """Read one tensor in Hugging Face layout: f32, f16, bf16 as stored (maybe a read-only view), blocks as f32.

        Args:
          name: of the tensor.
          raw: its stored bytes, where they are read already.

        Raises:
          UserError: the tensor's block format has no decoder.
        """
        array = _decode(self.path, name, self.raw(name) if raw is None else raw, self._info(name))
        return self._in_order(name, array)

    def format_of(self, name: str) -> str | None:
        """Return the format of blocks that can be kept packed, None for other tensors."""
        kind = self._info(name).qtype.name
        return kind if kind in BLOCKS else None

    def packed(self, name: str, raw: memoryview | None = None) -> dict[str, np.ndarray]:
        """Return the fields of a packed tensor's blocks, q and k in Hugging Face's order; arguments of `read`."""
        info = self._info(name)
        stored = np.frombuffer(self.raw(name) if raw is None else raw, np.uint8).reshape(*info.shape[:-1], -1)
        fields = split_fields(stored, BLOCKS[info.qtype.name])
        return {field: self._in_order(name, part) for field, part in fields.items()}

    def _in_order(self, name: str, array: np.ndarray) -> np.ndarray:
        """Return an array (O, ...) of a tensor with its neurons in Hugging Face's order."""
        heads = self._heads.get(name.rpartition(".")[0].rpartition(".")[2])
        if self._arch != "llama" or not heads:
            return array
        if heads < 0 or array.shape[0] % (2 * heads):
            raise UserError(
                f"{self.path}: tensor {name} has {array.shape[0]} neurons, expected {heads} heads of an even width"
            )
        return _unpermute(array, heads)

    def _info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise UserError(f"{self.path}: no tensor {name}, expected one of {len(self._tensors)} Hugging Face names")
        return self._tensors[name]


def _decode(path: str | Path, name: str, raw: memoryview, info: TensorInfo) -> np.ndarray:
    """Return stored bytes as an array of the tensor's shape: plain types as they are, blocks as f32."""
    stored = np.frombuffer(raw, np.uint8)
    if info.qtype.name in _PLAIN:
        return stored.view(_PLAIN[info.qtype.name]).reshape(info.shape)
    try:
        return dequantize(stored.reshape(*info.shape[:-1], -1), info.qtype)
    except NotImplementedError:
        raise UserError(f"{path}: tensor {name} is stored as {info.qtype.name}, which has no decoder") from None


def _unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the neurons (O, ...) of q or k as Hugging Face has them.

    llama.cpp rotates neurons (2i, 2i+1) of an attention head together, Hugging Face neurons (i, i+N/2): the converter to
    GGUF therefore interleaves the two halves of each head, for the architecture "llama" only.
    """
    half = array.shape[0] // heads // 2
    return array.reshape(heads, half, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the Hugging Face config of the model in a GGUF file (llama including Mistral, qwen2, qwen3).

    GGUF stores Mistral as "llama"; the model_type is "mistral" only where the file declares a sliding window, the only
    difference between the two computations.

    Raises:
      UserError: a metadata key is missing or has a value that is not supported.
    """
    header, arch = _open_model(path)
    meta, tensors = header.metadata, header.tensors
    model_type, class_name = _ARCHITECTURES[arch]
    window = _number(meta, path, f"{arch}.attention.sliding_window", 0)
    if arch == "llama" and window:
        model_type, class_name = "mistral", "MistralForCausalLM"
        if biases := [name for name in tensors if name.endswith(".bias")]:
            raise UserError(f"{path}: tensor {biases[0]} and a sliding window in one model, which no Mistral has")
    for name in ("token_embd.weight", "blk.0.attn_q.weight"):
        if name not in tensors:
            raise UserError(f"{path}: tensor {name} is missing, expected a complete {arch} model")
    hidden, heads = (
        _required(meta, path, f"{arch}.embedding_length"),
        _required(meta, path, f"{arch}.attention.head_count"),
    )
    rotary = _number(meta, path, f"{arch}.rope.dimension_count", None)
    head_dim = _number(meta, path, f"{arch}.attention.key_length", 0) or rotary or hidden // max(heads, 1)
    neurons = tensors["blk.0.attn_q.weight"].shape[0]
    if neurons != heads * head_dim or rotary not in (None, head_dim):
        raise UserError(
            f"{path}: attn_q has {neurons} neurons and {rotary} rotary dimensions, expected {heads} heads of {head_dim}"
        )
    theta = _short(_number(meta, path, f"{arch}.rope.freq_base", 10000.0, float))
    if not 0 < theta < float("inf"):
        raise UserError(f"{path}: metadata {arch}.rope.freq_base is {theta}, expected a positive number")
    config = {
        "model_type": model_type,
        "architectures": [class_name],
        "hidden_size": hidden,
        "num_hidden_layers": _required(meta, path, f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _number(meta, path, f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": _required(meta, path, f"{arch}.feed_forward_length"),
        "vocab_size": tensors["token_embd.weight"].shape[0],  # the padded size, of which the token list may fall short
        "rms_norm_eps": _short(_required(meta, path, f"{arch}.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": theta,
        "max_position_embeddings": _required(meta, path, f"{arch}.context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "hidden_act": "silu",
    }
    optional = {
        "rope_scaling": _rope_scaling(path, header, arch, theta, head_dim),
        "sliding_window": window or None,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }
    return config | {key: value for key, value in optional.items() if value is not None}


def _required(meta: dict, path: str | Path, key: str, kind: type = int) -> Any:
    if type(meta.get(key)) is not kind:
        raise UserError(f"{path}: metadata {key} is {shown(meta.get(key))}, expected one {kind.__name__}")
    return meta[key]


def _number(meta: dict, path: str | Path, key: str, default: Any, kind: type = int) -> Any:
    """Return a value of metadata of this type, or the default where the key is missing."""
    return _required(meta, path, key, kind) if key in meta else default


def _short(value: float) -> float:
    """Return the shortest decimal of a float32, the value as its author wrote it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(path: str | Path, header: Header, arch: str, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Return Hugging Face's `rope_scaling`: linear or yarn from the metadata, llama3 from the table of divisors."""
    prefix = f"{arch}.rope.scaling."
    keys = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    for key, value in keys.items():
        if not isinstance(value, int | float | str):
            raise UserError(f"{path}: metadata {prefix}{key} is {shown(value)}, expected a number or text")
    kind = keys.pop("type", "none")
    linear = _number(header.metadata, path, f"{arch}.rope.scale_linear", 1.0, float)
    factor = _short(_number(header.metadata, path, f"{prefix}factor", linear, float))
    keys.pop("factor", None)
    original = _number(header.metadata, path, f"{prefix}original_context_length", None)
    keys.pop("original_context_length", None)
    keys.pop("finetuned", None)
    if "rope_freqs.weight" in header.tensors:
        info = header.tensors["rope_freqs.weight"]
        table = _decode(path, "rope_freqs.weight", header.raw(info), info)
        return _llama3_scaling(path, table, theta, head_dim, original or 8192)
    if kind in ("none", "linear"):  # a bare factor means linear, as in files older than the type key
        return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    betas = {
        name: _short(_required(keys, path, f"yarn_{name}", float))
        for name in ("beta_fast", "beta_slow")
        if f"yarn_{name}" in keys
    }
    keys = {key: value for key, value in keys.items() if key.removeprefix("yarn_") not in betas}
    # llama.cpp multiplies YaRN's attention factor by these, Hugging Face replaces it: only neutral values are equivalent.
    odd = {key: value for key, value in keys.items() if value not in (1.0, -1.0)}
    if kind != "yarn" or odd or original is None:
        raise UserError(
            f"{path}: rope scaling {kind!r} of {original} with {odd}, expected none, linear, yarn or rope_freqs"
        )
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **betas}


def _llama3_scaling(
    path: str | Path, table: np.ndarray, theta: float, head_dim: int, original: int
) -> dict[str, Any] | None:
    """Infer `rope_scaling` from Llama 3's table (N/2,) of divisors; only factor varies, low is 1 and high is 4."""
    if table.shape != (head_dim // 2,) or not np.isfinite(table).all():
        raise UserError(f"{path}: rope_freqs.weight is {list(table.shape)}, expected {head_dim // 2} finite divisors")
    factor, low, high = float(table.max()), 1.0, 4.0
    if factor == 1.0:
        return None
    turns = original * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)  # in the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if not np.allclose(table, expected, rtol=1e-4):
        raise UserError(f"{path}: rope_freqs.weight is not Llama 3's rule for factor {factor} and context {original}")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
