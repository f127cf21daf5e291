"""Hugging Face config of the model in a GGUF file, from its metadata, tables of its rope, and constants of llama.cpp.

A key of the architecture that is not read is refused by name: llama.cpp would compute something else.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from neuroada_jax.errors import UserError, shown
from neuroada_jax.pretrained.gguf_architectures import LONGROPE_TABLES, GGUFModel
from neuroada_jax.pretrained.gguf_file import decode

Config = dict[str, Any]


def read_config(path: str | Path) -> Config:
    """Return the Hugging Face config of the model in a GGUF file.

    GGUF stores Mistral as "llama"; the model_type is "mistral" only where the file declares a sliding window, the only
    difference between the two computations.

    Raises:
      UserError: a metadata key is missing, is not read, or has a value that is not supported.
    """
    model = GGUFModel(path)
    arch, tensors = model.arch, model.header.tensors
    queries = "attn_qkv" if model.architecture.model_type == "phi3" else "attn_q"
    for name in ("token_embd.weight", f"blk.0.{queries}.weight"):
        if name not in tensors:
            raise UserError(f"{path}: tensor {name} is missing, expected a complete {arch} model")
    config = _sizes(model, queries) | {
        "model_type": model.architecture.model_type,
        "architectures": [model.architecture.class_name],
        "vocab_size": tensors["token_embd.weight"].shape[0],  # the padded size, of which the token list may fall short
        "rms_norm_eps": model.decimal("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": f"blk.0.{queries}.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "hidden_act": "silu",
    }
    config |= _FAMILIES.get(config["model_type"], _nothing)(model, config)
    meta = model.header.metadata
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = meta.get(f"tokenizer.ggml.{key}_token_id")
    if unread := model.unread():
        key, value = next(iter(unread.items()))
        raise UserError(f"{path}: metadata {key} {shown(value)} is not supported for the architecture {arch!r}")
    return {key: value for key, value in config.items() if value is not None}


def _sizes(model: GGUFModel, queries: str) -> Config:
    """Return widths, depth, positions and the rope."""
    path = model.path
    hidden, heads = model.required("embedding_length"), model.required("attention.head_count")
    kv_heads = model.number("attention.head_count_kv", heads)
    rotary, fused = model.number("rope.dimension_count", None), queries == "attn_qkv"
    whole = hidden // max(heads, 1)
    head_dim = model.number("attention.key_length", 0) or (whole if fused else rotary or whole)
    neurons = model.header.tensors[f"blk.0.{queries}.weight"].shape[0]
    expected = (heads + 2 * kv_heads if fused else heads) * head_dim
    partial = fused and rotary is not None and 0 < rotary <= head_dim
    if neurons != expected or not (partial or rotary in (None, head_dim)):
        raise UserError(
            f"{path}: {queries} has {neurons} neurons and {rotary} rotary dimensions, expected {heads} heads of {head_dim}"
        )
    if (values := model.number("attention.value_length", head_dim)) != head_dim:
        raise UserError(f"{path}: metadata {model.arch}.attention.value_length is {values}, expected {head_dim}")
    theta = model.decimal("rope.freq_base", 10000.0)
    if not 0 < theta < float("inf"):
        raise UserError(f"{path}: metadata {model.arch}.rope.freq_base is {theta}, expected a positive number")
    return {
        "hidden_size": hidden,
        "num_hidden_layers": model.required("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": model.required("feed_forward_length"),
        "max_position_embeddings": model.required("context_length"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(model, theta, head_dim),
    }


def _nothing(model: GGUFModel, config: Config) -> Config:
    return {}


def _llama(model: GGUFModel, config: Config) -> Config:
    window = model.number("attention.sliding_window", 0)
    if not window:
        return {}
    if biases := [name for name in model.header.tensors if name.endswith(".bias")]:
        raise UserError(f"{model.path}: tensor {biases[0]} and a sliding window in one model, which no Mistral has")
    return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}


def _qwen(model: GGUFModel, config: Config) -> Config:
    # llama.cpp has no windows in these, like the models with `use_sliding_window` false.
    return {"sliding_window": model.number("attention.sliding_window", 0) or None}


def _qwen_moe(model: GGUFModel, config: Config) -> Config:
    return _qwen(model, config) | {
        "num_experts": model.required("expert_count"),
        "num_experts_per_tok": model.required("expert_used_count"),
        "moe_intermediate_size": model.required("expert_feed_forward_length"),
        "norm_topk_prob": model.number("expert_weights_norm", True, bool),  # llama.cpp normalises them always
        "mlp_bias": None,
    }


def _mixtral(model: GGUFModel, config: Config) -> Config:
    # A width of the experts of its own would be another model's.
    return {
        "num_local_experts": model.required("expert_count"),
        "num_experts_per_tok": model.required("expert_used_count"),
        "sliding_window": model.number("attention.sliding_window", 0) or None,
        "attention_bias": None,
        "mlp_bias": None,
    }


def _smollm3(model: GGUFModel, config: Config) -> Config:
    return {"no_rope_layer_interval": 4}  # a constant of llama.cpp


def _granite(model: GGUFModel, config: Config) -> Config:
    if not model.number("rope.scaling.finetuned", True, bool):  # only for Granite, llama.cpp then has no rope
        raise UserError(f"{model.path}: metadata granite.rope.scaling.finetuned False is not supported (no positions)")
    scale = model.decimal("attention.scale", 0.0)
    return {
        "attention_multiplier": scale or config["head_dim"] ** -0.5,
        "embedding_multiplier": model.decimal("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": model.decimal("residual_scale", 0.0) or 1.0,
        "logits_scaling": model.decimal("logit_scale", 0.0) or 1.0,
    }


def _phi3(model: GGUFModel, config: Config) -> Config:
    # Files from before August 2024, Microsoft's own among them, leave out the window of the models for 4,096 tokens.
    is_old = config["num_hidden_layers"] in (32, 40) and config["max_position_embeddings"] == 4096
    window = model.number("attention.sliding_window", 2047 if is_old else 0)
    rotary = model.number("rope.dimension_count", None)
    head_dim, original = config["head_dim"], model.number("rope.scaling.original_context_length", None)
    fraction = (rotary or head_dim) / head_dim
    if int(head_dim * fraction) < (rotary or head_dim):  # as the product is rounded down
        fraction = math.nextafter(fraction, 2.0)
    return {
        "sliding_window": window or None,
        "partial_rotary_factor": fraction,
        "original_max_position_embeddings": original,
        "mlp_bias": None,
    }


def _gemma(model: GGUFModel, config: Config, largest: int) -> Config:
    """Return the fields of both Gemmas; the model with the `largest` depth has another scale of the attention."""
    whole = config["hidden_size"] // config["num_attention_heads"]
    return {
        "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": whole if config["num_hidden_layers"] == largest else config["head_dim"],
        "mlp_bias": None,
    }


def _gemma2(model: GGUFModel, config: Config) -> Config:
    return _gemma(model, config, 46) | {
        "sliding_window": model.number("attention.sliding_window", 4096),
        "attn_logit_softcapping": model.decimal("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": model.decimal("final_logit_softcapping", 30.0),
    }


def _gemma3(model: GGUFModel, config: Config) -> Config:
    window = model.number("attention.sliding_window", 0)
    pattern = model.number("attention.sliding_window_pattern", 6) if window else 1
    return _gemma(model, config, 62) | {
        "sliding_window": window or None,
        "sliding_window_pattern": pattern,
        "rope_local_base_freq": model.decimal("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": model.decimal("final_logit_softcapping", 0.0) or None,
    }


_FAMILIES: dict[str, Callable[[GGUFModel, Config], Config]] = {
    "llama": _llama,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "qwen3_moe": _qwen_moe,
    "mixtral": _mixtral,
    "smollm3": _smollm3,
    "granite": _granite,
    "phi3": _phi3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
}


def _rope_scaling(model: GGUFModel, theta: float, head_dim: int) -> Config | None:
    """Return `rope_scaling`: linear or yarn from the metadata, llama3 and longrope from their tables of divisors."""
    keys = model.keys_below("rope.scaling.")
    for key, value in keys.items():
        if not isinstance(value, int | float | str):
            raise UserError(
                f"{model.path}: metadata {model.arch}.rope.scaling.{key} is {shown(value)}, expected a number or text"
            )
    kind = keys.pop("type", "none")
    factor = model.decimal("rope.scaling.factor", model.number("rope.scale_linear", 1.0, float))
    original = model.number("rope.scaling.original_context_length", None)
    for key in ("factor", "original_context_length", "finetuned"):
        keys.pop(key, None)
    if model.architecture.longrope and any(name in model.header.tensors for name in LONGROPE_TABLES):
        return _longrope(model, keys)
    if "rope_freqs.weight" in model.header.tensors:
        return _llama3_scaling(model, _table(model, "rope_freqs.weight"), theta, head_dim, original or 8192)
    # llama.cpp multiplies YaRN's attention factor by these, Hugging Face replaces it: only neutral values are equivalent.
    odd = {
        key: value
        for key, value in keys.items()
        if value not in (1.0, -1.0) and not (kind == "yarn" and key in ("yarn_beta_fast", "yarn_beta_slow"))
    }
    if kind in ("none", "linear") and not odd:  # a bare factor means linear, as in files older than the type key
        return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or odd or original is None:
        raise UserError(
            f"{model.path}: rope scaling {kind!r} of {original} with {odd}, expected none, linear, yarn or rope_freqs"
        )
    betas = {
        name: model.decimal(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow") if f"yarn_{name}" in keys
    }
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **betas}


def _table(model: GGUFModel, name: str) -> np.ndarray:
    if name not in model.header.tensors:
        raise UserError(f"{model.path}: tensor {name} is missing, expected the divisors of short and of long texts")
    info = model.header.tensors[name]
    return decode(model.path, name, model.header.raw(info), info)


def _longrope(model: GGUFModel, keys: Config) -> Config:
    """Return longrope's two tables, and the attention factor, which the file has as the only other key."""
    if other := keys.keys() - {"attn_factor"}:
        raise UserError(f"{model.path}: metadata {model.arch}.rope.scaling.{min(other)} is not supported with longrope")
    short, long = (
        [float(str(each)) for each in _table(model, name).astype(np.float32).ravel()] for name in LONGROPE_TABLES
    )
    attention = model.decimal("rope.scaling.attn_factor")
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long, "attention_factor": attention}


def _llama3_scaling(model: GGUFModel, table: np.ndarray, theta: float, head_dim: int, original: int) -> Config | None:
    """Infer `rope_scaling` from Llama 3's table (N/2,) of divisors; only factor varies, low is 1 and high is 4."""
    if table.shape != (head_dim // 2,) or not np.isfinite(table).all():
        raise UserError(f"{model.path}: rope_freqs.weight is {list(table.shape)}, expected {head_dim // 2} finite divisors")
    factor, low, high = float(table.max()), 1.0, 4.0
    if factor == 1.0:
        return None
    turns = original * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)  # in the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if not np.allclose(table, expected, rtol=1e-4):
        raise UserError(f"{model.path}: rope_freqs.weight is not Llama 3's rule for factor {factor} and context {original}")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
