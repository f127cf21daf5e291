"""The text part of a checkpoint that reads images too: a decoder by itself, under its own names."""

import re
from collections.abc import Mapping
from typing import Any

from neuroada_jax.errors import UserError, shown

# model_type of the checkpoint -> that of its text part
TEXT_PARTS = {"gemma3": "gemma3_text"}
# What transformers takes from its class where the text part's config leaves it out, and other configs always have.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SHARED = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "tie_word_embeddings",
    "transformers_weights",
    "quantization_config",
)
# As saved before transformers 4.52, and since.
_PREFIX = re.compile(r"language_model\.(?=model\.|lm_head\.)|model\.language_model\.")
_TOWER = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


def has_other_parts(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is of a checkpoint of which the text part alone is used."""
    kind = config.get("model_type")
    return isinstance(kind, str) and kind in TEXT_PARTS


def config_of(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the config of the text part of a checkpoint, as if it had been saved by itself.

    Args:
      config: that of the checkpoint, with `has_other_parts`.
      path: its directory, for messages.

    Raises:
      UserError: it has no `text_config` of the text part.
    """
    own, kind = config.get("text_config"), TEXT_PARTS[config["model_type"]]
    if not isinstance(own, Mapping) or own.get("model_type", kind) != kind:
        raise UserError(f"{path}/config.json: text_config must be an object of model_type {kind!r}, found {shown(own)}")
    import transformers  # for few checkpoints alone: it takes seconds

    defaults = transformers.CONFIG_MAPPING[kind]()
    return {
        **{name: getattr(defaults, name) for name in _SIZES},
        **{name: config[name] for name in _SHARED if name in config},
        **own,
        "model_type": kind,
    }


def name_of(stored: str) -> str | None:
    """Return the name of a stored tensor in the text part, None for one of another part."""
    if _TOWER.match(stored):
        return None
    found = _PREFIX.match(stored)
    if not found:
        return stored
    rest = stored[found.end() :]
    return rest if found[0].startswith("language_model") else f"model.{rest}"
