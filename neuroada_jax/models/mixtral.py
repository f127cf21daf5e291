"""Configs of mixtures of experts: Mixtral and Qwen3-MoE."""

from typing import Any

from neuroada_jax.errors import UserError, shown
from neuroada_jax.models.config_fields import Fields
from neuroada_jax.models.decoder_config import DecoderConfig, Defaults, LayerKind, QkNorm, depth, sizes, sliding_window
from neuroada_jax.models.experts import Experts
from neuroada_jax.models.rope import Rope, RopeRules

MIXTRAL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3")

_COUNT = ("num_experts", "num_local_experts")  # two names of the number of experts
_MIXTRAL = Defaults(131072, kv_heads=8, epsilon=1e-5, nullable=("head_dim",), rules=RopeRules(theta=1000000.0))
_QWEN3_MOE = Defaults(32768, kv_heads=4, nullable=())


def mixtral(fields: Fields, dtype: Any) -> DecoderConfig:
    """Read the config of a model_type mixtral.

    Raises:
      UserError: a field is missing or has a value that is not supported.
    """
    count = fields.integer_of(_COUNT, 8)
    experts = Experts(
        count,
        _chosen(fields, 2, count),
        fields.integer("intermediate_size"),
        normalised=True,
        block="block_sparse_moe",
        maps=("w1", "w3", "w2"),
    )
    return _decoder(fields, _MIXTRAL, sliding_window(fields, None), experts=experts, dtype=dtype)


def qwen3_moe(fields: Fields, dtype: Any) -> DecoderConfig:
    """Read the config of a model_type qwen3_moe.

    Raises:
      UserError: a field is missing or has a value that is not supported; layers without experts.
    """
    count, step = fields.integer_of(_COUNT, 128), fields.integer("decoder_sparse_step", 1)
    if step != 1 or fields.get("mlp_only_layers") not in (None, []):
        name = "decoder_sparse_step" if step != 1 else "mlp_only_layers"
        value = shown(fields.get(name))
        raise UserError(f"config.json: {name} {value} is not supported (layers without experts); supported: 1 and null")
    window = sliding_window(fields, 4096)
    window = window if fields.flag("use_sliding_window", False) else None
    normalised = fields.flag("norm_topk_prob", False)
    experts = Experts(count, _chosen(fields, 8, count), fields.integer("moe_intermediate_size", 768), normalised)
    biased = fields.flag("attention_bias", False)
    parts = {"qkv_bias": biased, "output_bias": biased, "qk_norm": QkNorm.HEAD, "experts": experts, "dtype": dtype}
    return _decoder(fields, _QWEN3_MOE, window, **parts)


def _chosen(fields: Fields, default: int, count: int) -> int:
    chosen = fields.integer("num_experts_per_tok", default)
    if chosen > count:
        raise fields.wrong("num_experts_per_tok", f"at most the number of experts, {count}")
    return chosen


def _decoder(fields: Fields, defaults: Defaults, window: int | None, **parts: Any) -> DecoderConfig:
    own = sizes(fields, defaults)
    rope = Rope.from_hf(fields, own["head_dim"], own["max_positions"], defaults.rules)
    return DecoderConfig(**own, ropes=(rope,), kinds=(LayerKind(window),) * depth(fields), **parts)
