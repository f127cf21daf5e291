"""Configs of Gemma 2 and Gemma 3 (text): norms around the blocks, scaled embeddings, capped logits, windows by layer."""

from typing import Any

import jax.numpy as jnp

from neuroada_jax.errors import UserError
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
from neuroada_jax.models.rope import Rope, by_attention

_ACTIVATION = ("hidden_activation", "gelu_pytorch_tanh")
_GEMMA2 = Defaults(8192, kv_heads=4, head_dim=256, tied=True, activation=_ACTIVATION, nullable=(), divided=True)
_GEMMA3 = _GEMMA2._replace(max_positions=131072)
_FULL, _SLIDING = "full_attention", "sliding_attention"


def gemma2(fields: Fields, dtype: Any) -> DecoderConfig:
    """Read the config of a model_type gemma2: capped logits, a window in every second layer.

    Raises:
      UserError: a field is missing or has a value that is not supported.
    """
    layers = depth(fields)
    windowed = fields.windowed_layers(layers)
    if windowed is None:
        windowed = [layer % 2 == 0 for layer in range(layers)]
    own = _parts(fields, _GEMMA2, dtype)
    rope = Rope.from_hf(fields, own["head_dim"], own["max_positions"])
    kinds = tuple(LayerKind(window) for window in windows_of(sliding_window(fields, 4096), windowed))
    own["attention_cap"] = _cap(fields, "attn_logit_softcapping", 50.0)
    own["logit_cap"] = _cap(fields, "final_logit_softcapping", 30.0)
    return DecoderConfig(**own, ropes=(rope,), kinds=kinds)


def gemma3(fields: Fields, dtype: Any) -> DecoderConfig:
    """Read the config of a model_type gemma3_text: five layers with a window, and a rope of their own, to each full one.

    transformers' Gemma 3 ignores `attn_logit_softcapping`.

    Raises:
      UserError: a field is missing or has a value that is not supported.
    """
    layers, windowed = depth(fields), fields.windowed_layers(depth(fields))
    pattern = fields.integer("sliding_window_pattern", 6)
    if windowed is None:
        windowed = [(layer + 1) % pattern != 0 for layer in range(layers)]
    own = _parts(fields, _GEMMA3, dtype)
    windows = windows_of(sliding_window(fields, 4096), windowed)
    kinds = tuple(LayerKind(window, int(each)) for window, each in zip(windows, windowed, strict=True))
    bases = {_FULL: ("rope_theta", 1000000.0), _SLIDING: ("rope_local_base_freq", 10000.0)}
    ropes = tuple(by_attention(fields, own["head_dim"], own["max_positions"], bases, {_FULL}))
    return DecoderConfig(
        **own, logit_cap=_cap(fields, "final_logit_softcapping", None), qk_norm=QkNorm.HEAD, ropes=ropes, kinds=kinds
    )


def _parts(fields: Fields, defaults: Defaults, dtype: Any) -> dict[str, Any]:
    """Return the fields of `DecoderConfig` in which the two agree."""
    if fields.get("use_bidirectional_attention"):
        raise UserError("config.json: use_bidirectional_attention true is not supported; supported: false")
    own, biased = sizes(fields, defaults), fields.flag("attention_bias", False)
    return own | {
        "qkv_bias": biased,
        "output_bias": biased,
        "norms": Norms.AROUND,
        "norm_offset": 1.0,
        "wide_norm": True,
        "attention_scale": fields.integer("query_pre_attn_scalar", 256) ** -0.5,
        # transformers rounds the scale to the dtype of the weights before it multiplies by it.
        "embedding_scale": float(jnp.asarray(own["hidden_size"] ** 0.5, dtype)),
        "dtype": dtype,
    }


def _cap(fields: Fields, name: str, default: float | None) -> float | None:
    return None if fields.get(name, default) is None else fields.number(name, default, positive=True)
