"""Configs of LLaMA and its variants: LLaMA 1 to 3.x, SmolLM2 and 3, Mistral, Ministral, Qwen2, Qwen3, Granite, OLMo 2.

Each function reads the config.json of one model_type into a `DecoderConfig`, and raises `UserError` for a field that is
missing or has a value that is not supported.
"""

from typing import Any

from neuroada_jax.errors import UserError, shown
from neuroada_jax.models.config_fields import Fields
from neuroada_jax.models.decoder_config import (
    DecoderConfig,
    Defaults,
    LayerKind,
    Norms,
    QkNorm,
    depth,
    sizes,
    sliding_window,
    windows_of,
)
from neuroada_jax.models.rope import Rope, RopeRules

# Every linear map of a layer, as in the published scripts.
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_LLAMA = Defaults(2048, nullable=("num_key_value_heads", "head_dim"), divided=True)
_MISTRAL = Defaults(131072, kv_heads=8, nullable=("head_dim",))  # null is no number of heads of Mistral's
_MINISTRAL = Defaults(131072, kv_heads=8, head_dim=0, nullable=())
_QWEN2 = Defaults(32768, kv_heads=32)
_QWEN3 = Defaults(32768, kv_heads=32, head_dim=128)
_SMOLLM3 = Defaults(32768, kv_heads=4, tied=True, rules=RopeRules(theta=2000000.0))
_GRANITE = Defaults(2048)
_OLMO2 = Defaults(2048, epsilon=1e-5)


def _decoder(fields: Fields, defaults: Defaults, kinds: list[LayerKind], **parts: Any) -> DecoderConfig:
    own = sizes(fields, defaults)
    rope = Rope.from_hf(fields, own["head_dim"], own["max_positions"], defaults.rules)
    return DecoderConfig(**own, ropes=(rope,), kinds=tuple(kinds), **parts)


def _biases(fields: Fields) -> dict[str, Any]:
    """Return which maps of the attention have a bias, in a family whose `attention_bias` decides for all four."""
    biased = fields.flag("attention_bias", False)
    return {"qkv_bias": biased, "output_bias": biased}


def llama(fields: Fields, dtype: Any) -> DecoderConfig:
    """Read the config of a model_type llama."""
    if (window := sliding_window(fields, None)) is not None:
        raise UserError(f"config.json: sliding_window {window} is not supported for model_type 'llama'; supported: null")
    windowed = fields.windowed_layers(depth(fields)) or []
    kinds = [LayerKind(window) for window in windows_of(None, windowed or [False] * depth(fields))]
    mlp_bias = fields.flag("mlp_bias", False)
    return _decoder(fields, _LLAMA, kinds, **_biases(fields), mlp_bias=mlp_bias, dtype=dtype)


def mistral(fields: Fields, dtype: Any) -> DecoderConfig:
    """Read the config of a model_type mistral or ministral; with `layer_types`, Mistral's is transformers' Ministral."""
    layers = depth(fields)
    windowed, window = fields.windowed_layers(layers), sliding_window(fields, 4096)
    if window is None and fields.kind == "ministral":
        raise fields.wrong("sliding_window", "a positive integer")
    windows = windows_of(window, [window is not None] * layers if windowed is None else windowed)
    defaults = _MINISTRAL if fields.kind == "ministral" else _MISTRAL
    return _decoder(fields, defaults, [LayerKind(each) for each in windows], dtype=dtype)


def qwen(fields: Fields, dtype: Any) -> DecoderConfig:
    """Read the config of a model_type qwen2 or qwen3."""
    layers, windowed = depth(fields), fields.windowed_layers(depth(fields))
    window = sliding_window(fields, 4096)
    first = fields.integer("max_window_layers", 28, least=0)
    window = window if fields.flag("use_sliding_window", False) else None
    if windowed is None:  # as configs had it before `layer_types`: the first layer with a window
        windowed = [window is not None and layer >= first for layer in range(layers)]
    kinds = [LayerKind(each) for each in windows_of(window, windowed)]
    if fields.kind == "qwen2":  # whose transformers class ignores `attention_bias`
        return _decoder(fields, _QWEN2, kinds, qkv_bias=True, dtype=dtype)
    return _decoder(fields, _QWEN3, kinds, **_biases(fields), qk_norm=QkNorm.HEAD, dtype=dtype)


def smollm3(fields: Fields, dtype: Any) -> DecoderConfig:
    """Read the config of a model_type smollm3: some layers have no positions."""
    layers, window = depth(fields), sliding_window(fields, None)
    interval = fields.integer("no_rope_layer_interval", 4)
    rotated = fields.get("no_rope_layers")
    if rotated is None:
        rotated = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if not isinstance(rotated, list) or len(rotated) < layers or any(type(each) is not int for each in rotated):
        raise UserError(f"config.json: no_rope_layers must be null or {layers} integers, found {shown(rotated)}")
    windowed, in_use = fields.windowed_layers(layers), fields.flag("use_sliding_window", False)
    if windowed is None:
        windowed = [in_use and window is not None and not each for each in rotated[:layers]]
    kinds = [
        LayerKind(each, 0 if turned else None)
        for each, turned in zip(windows_of(window, windowed), rotated[:layers], strict=True)
    ]
    mlp_bias = fields.flag("mlp_bias", False)
    return _decoder(fields, _SMOLLM3, kinds, **_biases(fields), mlp_bias=mlp_bias, dtype=dtype)


def granite(fields: Fields, dtype: Any) -> DecoderConfig:
    """Read the config of a model_type granite: multipliers of embedding, attention, residuals and logits."""
    return _decoder(
        fields,
        _GRANITE,
        [LayerKind()] * depth(fields),
        **_biases(fields),
        mlp_bias=fields.flag("mlp_bias", False),
        attention_scale=fields.number("attention_multiplier", 1.0, positive=True),
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logit_divisor=fields.number("logits_scaling", 1.0, positive=True),
        dtype=dtype,
    )


def olmo2(fields: Fields, dtype: Any) -> DecoderConfig:
    """Read the config of a model_type olmo2: norms behind the blocks, and over complete queries and keys."""
    return _decoder(
        fields,
        _OLMO2,
        [LayerKind()] * depth(fields),
        **_biases(fields),
        norms=Norms.AFTER,
        wide_norm=True,
        qk_norm=QkNorm.WIDTH,
        dtype=dtype,
    )
