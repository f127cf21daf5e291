"""Configs of Gemma 2 and Gemma 3 (text): norms around the blocks, scaled embeddings, capped logits, windows by layer."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from neuroada_jax.errors import UserError
from neuroada_jax.models.config_fields import Fields, shown
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
from neuroada_jax.models.rope import PLAIN_RULES, Rope

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
    ropes = _ropes(fields, own["head_dim"], own["max_positions"])
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


def _ropes(fields: Fields, head_dim: int, max_positions: int) -> tuple[Rope, Rope]:
    """Return the ropes of layers without and with a window, from the config's new fields or its older ones."""
    nested = fields.get("rope_parameters")
    scaling = fields.get("rope_scaling")
    for name, found in (("rope_parameters", nested), ("rope_scaling", scaling)):
        if found is not None and not isinstance(found, Mapping):
            raise fields.wrong(name, "an object")
    found = {} if nested is None else dict(nested)
    for name in (_FULL, _SLIDING):
        if not isinstance(found.get(name, {}), Mapping | None):
            raise UserError(f"config.json: rope_parameters.{name} must be an object, found {shown(found[name])}")
    if scaling is not None:
        if nested is not None and not found.get(_FULL):
            raise UserError("config.json: rope_scaling beside rope_parameters without full_attention is not supported")
        found[_FULL] = {**(found.get(_FULL) or {}), **scaling}
    bases = {_FULL: ("rope_theta", 1000000.0), _SLIDING: ("rope_local_base_freq", 10000.0)}
    ropes = []
    for name, (base, theta) in bases.items():
        own = Fields(found.get(name) or {}, f"config.json: rope_parameters.{name}.")
        default = fields.number(base, theta, positive=True)
        # No field of the config itself counts for one of two ropes.
        ropes.append(Rope.read(own, Fields({}), head_dim, max_positions, PLAIN_RULES._replace(theta=default)))
    return ropes[0], ropes[1]
