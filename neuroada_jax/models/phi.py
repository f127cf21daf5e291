"""Configs of Phi-3, Phi-3.5 and Phi-4-mini: q, k and v stored as one map, gate and up as another; longrope."""

from typing import Any

from neuroada_jax.models.config_fields import Fields
from neuroada_jax.models.decoder_config import DecoderConfig, Defaults, LayerKind, depth, sizes, sliding_window
from neuroada_jax.models.rope import Rope, RopeRules, RopeType

PHI_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")

_DEFAULTS = Defaults(4096, epsilon=1e-5)
# The first configs called longrope "su" or "yarn".
_NAMES = {
    "default": RopeType.DEFAULT,
    "longrope": RopeType.LONGROPE,
    "su": RopeType.LONGROPE,
    "yarn": RopeType.LONGROPE,
}


def phi3(fields: Fields, dtype: Any) -> DecoderConfig:
    """Read the config of a model_type phi3.

    Raises:
      UserError: a field is missing or has a value that is not supported.
    """
    own = sizes(fields, _DEFAULTS)
    original = fields.integer("original_max_position_embeddings", 4096)
    rules = RopeRules(partial=True, names=_NAMES, original=original)
    rope = Rope.from_hf(fields, own["head_dim"], own["max_positions"], rules)
    kinds = (LayerKind(sliding_window(fields, None)),) * depth(fields)
    return DecoderConfig(**own, ropes=(rope,), kinds=kinds, fused=True, dtype=dtype)
