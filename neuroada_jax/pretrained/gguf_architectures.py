"""Architectures of GGUF files: the model_type that each is, how llama.cpp names its tensors, and its metadata."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from neuroada_jax.errors import UserError, shown
from neuroada_jax.pretrained.gguf_header import read_header

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
_DENSE = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_LAYER = _ATTENTION | _DENSE
_BEHIND = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_GEMMA = _LAYER | _BEHIND | {"ffn_norm": "pre_feedforward_layernorm"}
_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_MIXTRAL = _ATTENTION | {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_QWEN_MOE = _ATTENTION | {
    "ffn_gate_inp": "mlp.gate",
    **{f"ffn_{name}_exps": f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")},
}


class GGUFArchitecture(NamedTuple):
    """One architecture.

    Attributes:
      model_type: of Hugging Face's config.
      class_name: of transformers.
      layer: the module of a layer by its tensor's name; "{}" stands for an expert of those that are stacked.
      permuted: whether the converter has interleaved the halves of the heads of q and k.
      norm_offset: what the converter has added to the weights of norms.
      longrope: whether the file has the divisors of longrope.
    """

    model_type: str
    class_name: str
    layer: Mapping[str, str] = _LAYER
    permuted: bool = False
    norm_offset: float = 0.0
    longrope: bool = False

    def name_of(self, tensor: str) -> str | None:
        """Return the Hugging Face name of a tensor, with "{}" for the expert; None where no tensor is called so."""
        if tensor in _TOP:
            return _TOP[tensor]
        found = _LAYER_NAME.fullmatch(tensor)
        if not found or found[2] not in self.layer:
            return None
        return f"model.layers.{found[1]}.{self.layer[found[2]]}.{found[3]}"

    def is_table(self, tensor: str) -> bool:
        """Return whether a tensor is a table of the rope, which belongs to the config, rather than a parameter."""
        return _TABLE.fullmatch(tensor) is not None or (self.longrope and tensor in LONGROPE_TABLES)


# By `general.architecture`. llama.cpp writes Mistral and Mixtral as "llama": see `GGUFModel` and gguf_config.py.
ARCHITECTURES = {
    "llama": GGUFArchitecture("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": GGUFArchitecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": GGUFArchitecture("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": GGUFArchitecture("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN_MOE),
    "smollm3": GGUFArchitecture("smollm3", "SmolLM3ForCausalLM", permuted=True),
    "granite": GGUFArchitecture("granite", "GraniteForCausalLM", permuted=True),
    "olmo2": GGUFArchitecture("olmo2", "Olmo2ForCausalLM", _LAYER | _BEHIND),
    "phi3": GGUFArchitecture("phi3", "Phi3ForCausalLM", _ATTENTION | _DENSE | _FUSED, longrope=True),
    "gemma2": GGUFArchitecture("gemma2", "Gemma2ForCausalLM", _GEMMA, norm_offset=1.0),
    "gemma3": GGUFArchitecture("gemma3_text", "Gemma3ForCausalLM", _GEMMA, norm_offset=1.0),
}
_WITH_EXPERTS = {
    "llama": GGUFArchitecture("mixtral", "MixtralForCausalLM", _MIXTRAL, permuted=True),
    "qwen3moe": ARCHITECTURES["qwen3moe"],
}
# Keys that change no result: sizes that the tensors have, and what llama.cpp does not read.
_WITHOUT_EFFECT = {"vocab_size", "tensor_data_layout", "attention.layer_norm_epsilon", "rope.scaling.finetuned"}
_NEUTRAL = {"attention.causal": (True,)}  # what says nothing, where that is not zero, no or none

_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_TABLE = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")
LONGROPE_TABLES = ("rope_factors_short.weight", "rope_factors_long.weight")


class GGUFModel:
    """The header of a complete model, and its metadata with their types.

    Attributes:
      path: of the file.
      header: of the file.
      arch: `general.architecture`.
      architecture: what that means.

    Raises:
      UserError: the file is damaged or one of several parts, or its architecture is not supported.
    """

    def __init__(self, path: str | Path):
        self.path, self.header = path, read_header(path)
        arch = self.header.metadata.get("general.architecture")
        self.arch = arch if isinstance(arch, str) else ""
        self._read: set[str] = set()
        found = ARCHITECTURES.get(self.arch)
        if found is not None and self.number("expert_count", 0):
            found = _WITH_EXPERTS.get(self.arch)
        if found is None:
            kind = f"{arch!r} with experts" if self.arch in ARCHITECTURES else shown(arch)
            expected = ", ".join(ARCHITECTURES)
            raise UserError(f"{path}: GGUF architecture {kind} is not supported, expected one of {expected}")
        self.architecture = found
        parts = self._value("split.count", 1, int)
        if parts > 1:
            raise UserError(f"{path}: one of {parts} GGUF parts, expected one file (join them: llama-gguf-split --merge)")

    def number(self, key: str, default: Any, kind: type = int) -> Any:
        """Return the value of a key of the architecture, or the default where it is missing.

        Raises:
          UserError: it has another type.
        """
        self._read.add(key)
        return self._value(f"{self.arch}.{key}", default, kind)

    def required(self, key: str, kind: type = int) -> Any:
        """Return the value of a key of the architecture; arguments and errors as in `number`."""
        return self.number(key, None, kind) if f"{self.arch}.{key}" in self.header.metadata else self._fail(key, kind)

    def decimal(self, key: str, default: float | None = None) -> float:
        """Return the shortest decimal of a float32, as its author wrote it: 1e-05, not 9.999999747378752e-06."""
        value = self.required(key, float) if default is None else self.number(key, default, float)
        return float(str(np.float32(value)))

    def keys_below(self, prefix: str) -> dict[str, Any]:
        """Return the keys of the architecture with a prefix, which is taken off; they count as read."""
        start = f"{self.arch}.{prefix}"
        found = {key.removeprefix(start): value for key, value in self.header.metadata.items() if key.startswith(start)}
        self._read |= {f"{prefix}{key}" for key in found}
        return found

    def unread(self) -> dict[str, Any]:
        """Return the keys of the architecture that nobody has asked for, without those that say nothing."""
        start = f"{self.arch}."

        def says_nothing(key: str, value: Any) -> bool:
            return isinstance(value, int | float | str) and value in _NEUTRAL.get(key, (0, False, "", "none"))

        return {
            key: value
            for key, value in self.header.metadata.items()
            if key.startswith(start)
            and key.removeprefix(start) not in self._read | _WITHOUT_EFFECT
            and not says_nothing(key.removeprefix(start), value)
        }

    def _value(self, key: str, default: Any, kind: type) -> Any:
        meta = self.header.metadata
        if key not in meta:
            return default
        return meta[key] if type(meta[key]) is kind else self._fail(key, kind)

    def _fail(self, key: str, kind: type) -> Any:
        key = key if key in self.header.metadata else f"{self.arch}.{key}"
        found = shown(self.header.metadata.get(key))
        raise UserError(f"{self.path}: metadata {key} is {found}, expected one {kind.__name__}")
