"""Fields of a Hugging Face config.json: read with their types, known to leave logits alone, or refused.

The reader of a family (`from_hf`) takes what it needs from `Fields`; `check` then refuses every other field that
transformers would read. tests/models/test_config_fields.py holds the tables below against transformers.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from neuroada_jax.errors import UserError, shown

LARGEST = 2**24  # of a size; far above any model, and small enough that nothing overflows
LARGEST_DEPTH = 10_000  # of a number of layers: some descriptions have an entry for each
LARGEST_POSITION = 2**31 - 1
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id")

DECODERS = (
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "granite", "olmo2"),
    *("phi3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe"),
)
ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "deberta-v2", "modernbert", "mpnet")

# Fields that no reader takes because they cannot change logits, each with the reason. A reader may take one all the same:
# `pad_token_id` counts positions in RoBERTa, the labels are an encoder's, and so on.
HARMLESS = {
    "architectures": "the model_type decides, as with transformers' auto classes",
    "_name_or_path": "where the config came from",
    "name_or_path": "where the config came from",
    "_commit_hash": "where the config came from",
    "transformers_version": "who wrote the config",
    "dtype": "checked; the dtype of the weights, of which --dtype has the last word",
    "torch_dtype": "as dtype, which comes first",
    "use_cache": "speed of generation",
    "attn_implementation": "which kernel computes the attention",
    "_attn_implementation": "which kernel computes the attention",
    "deterministic_flash_attn": "which kernel computes the attention",
    "_experts_implementation": "which kernel computes experts, of which there are none",
    "output_attentions": "what a call returns beside the logits",
    "output_hidden_states": "what a call returns beside the logits",
    "tie_last_hidden_states": "what a call returns beside the logits",
    "return_dict": "how a call returns the logits",
    "chunk_size_feed_forward": "memory: the feed-forward block in pieces",
    "gradient_checkpointing": "memory in training",
    "attention_dropout": "training; for a decoder, training says that it is not applied",
    "resid_pdrop": "training; as attention_dropout",
    "embd_pdrop": "training; as attention_dropout",
    "router_jitter_noise": "training; as attention_dropout",
    "router_aux_loss_coef": "training; the loss is that of the labels alone",
    "output_router_logits": "training; the loss is that of the labels alone",
    "initializer_range": "new weights",
    "initializer_factor": "new weights",
    "init_std": "new weights",
    "initializer_cutoff_factor": "new weights",
    "pretraining_tp": "how the model was trained; transformers no longer reads it",
    "base_model_tp_plan": "where weights lie on several devices",
    "base_model_pp_plan": "where weights lie on several devices",
    "base_model_ep_plan": "where weights lie on several devices",
    "base_model_fsdp_plan": "where weights lie on several devices",
    "distributed_config": "how a model is saved from several devices",
    "keys_to_ignore_at_inference": "what transformers' Trainer collects",
    "bos_token_id": "tokens: of texts and generation",
    "eos_token_id": "tokens: of texts and generation",
    "pad_token_id": "tokens: padding is masked",
    "sep_token_id": "tokens: of texts and generation",
    "cls_token_id": "tokens: of texts",
    "id2label": "a decoder has no classifier",
    "label2id": "names of an encoder's labels; id2label counts them",
    "num_labels": "a decoder has no classifier",
    "problem_type": "a decoder has no classifier",
    "tie_word_embeddings": "an encoder's classifier has no output embedding",
    "layer_types": "an encoder that does not read it attends everywhere",
    "sliding_window": "as layer_types; ModernBERT has local_attention",
    "rope_parameters": "an encoder that does not read it has no rotary embedding",
    "head_dim": "an encoder's heads divide its width",
    "_sliding_window_pattern": "transformers writes it beside layer_types, and reads sliding_window_pattern",
    "mm_tokens_per_image": "images, of which a decoder reads none",
    "image_token_id": "images, of which a decoder reads none",
    "qa_dropout": "another task",
    "decoder_bias": "another task",
    "sparse_prediction": "another task",
    "sparse_pred_ignore_index": "another task",
    "legacy": "another task",
    "z_steps": "another task",
    "summary_type": "another task",
    "summary_use_proj": "another task",
    "summary_activation": "another task",
    "summary_first_dropout": "another task",
    "summary_last_dropout": "another task",
    "summary_proj_to_labels": "another task",
    "sinusoidal_pos_embds": "new weights: a checkpoint has the positions",
    "number_of_conv_states": "there are no convolutions",
    "embedding_size": "lets transformers skip a check that is made here",
}


class Only(NamedTuple):
    """The values of a field that is refused otherwise, none if it has to be missing, and what another value would mean."""

    values: tuple[Any, ...]
    meaning: str
    kinds: tuple[str, ...] = DECODERS + ENCODERS


ONLY = (
    ("is_encoder_decoder", Only((False,), "an encoder-decoder model")),
    ("per_layer_config", Only((None, {}), "layers that differ from one another")),
    ("fusion_config", Only((None, {}), "replaced modules")),
    ("transformers_weights", Only((None,), "weights in another file")),
    ("configuration_files", Only((None, []), "a config in another file")),
    ("text_config", Only((None,), "a model of several parts")),
    ("is_causal", Only((), "attention without a window, or in both directions", DECODERS)),
    ("attention_chunk_size", Only((None,), "attention in chunks", DECODERS)),
    ("kv_sharing_modes", Only((None, []), "layers that share keys and values", DECODERS)),
    ("is_causal", Only((False, None), "causal attention", ENCODERS)),
    ("is_decoder", Only((False,), "causal attention", ENCODERS)),
    ("add_cross_attention", Only((False,), "attention to another model", ENCODERS)),
    ("position_embedding_type", Only(("absolute", None), "relative positions", ENCODERS)),
)

# Fields that change the result in other families, or did in older releases: transformers ignores them for the model types
# here that do not read them, and so does this package, but it says so.
FOREIGN = frozenset(
    (
        *("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "bias", "use_qk_norm", "qk_layernorm", "clip_qkv"),
        *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "logit_scale", "logits_scaling"),
        *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "lm_head_multiplier"),
        *("scale_emb", "scale_depth", "dim_model_base", "alibi", "parallel_attn", "pruned_heads", "vision_config"),
        *("num_experts", "num_local_experts", "n_routed_experts", "no_rope_layers", "no_rope_layer_interval"),
        *("rope_interleaved", "partial_rotary_factor", "mrope_section", "auto_map"),
    )
)

_DTYPES = ("float32", "bfloat16", "float16", "float64", None)
_LEGACY_LAYER_TYPES = {"attention": "full_attention"}  # transformers' name of old -> its name
_REQUIRED: Any = object()


class Fields:
    """Values of a config.json by their types.

    Attributes:
      content: the fields.
      place: what messages put before a field's name.
      read: the names that were asked for.
    """

    def __init__(self, content: Mapping[str, Any], place: str = "config.json: ") -> None:
        self.content, self.place = content, place
        self.read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value as it is, or the default where the field is missing."""
        self.read.add(name)
        return self.content.get(name, default)

    @property
    def kind(self) -> str:
        """The model_type."""
        return self.get("model_type")

    def wrong(self, name: str, expected: str) -> UserError:
        """Return the error for a field whose value is not what is expected."""
        return UserError(f"{self.place}{name} must be {expected}, found {shown(self.content.get(name))}")

    def integer(self, name: str, default: Any = _REQUIRED, least: int = 1, most: int = LARGEST) -> int:
        """Return an integer from `least` to `most`; a field without a default must be there."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(name, "a positive integer" if least == 1 else f"an integer from {least}")
        if value > most:
            raise self.wrong(name, f"at most {most}")
        return value

    def integer_or_none(self, name: str, default: int | None = None, least: int = 1, most: int = LARGEST) -> int | None:
        """Return an integer as `integer` does, or None where the field is null or missing without a default."""
        return None if self.get(name, default) is None else self.integer(name, default, least, most)

    def integer_of(self, names: Sequence[str], default: int | None = None, most: int = LARGEST) -> int:
        """Return the positive integer of a field that has several names; those that are there must be equal."""
        self.read.update(names)
        given = {name: self.integer(name, most=most) for name in names if name in self.content}
        if len(set(given.values())) > 1:
            raise UserError(f"{self.place}{' and '.join(given)} must be equal, found {shown(list(given.values()))}")
        return next(iter(given.values())) if given else self.integer(names[0], _REQUIRED if default is None else default)

    def number(
        self, name: str, default: Any = _REQUIRED, *, least: float = 0.0, below: float = math.inf, positive: bool = False
    ) -> float:
        """Return a finite number of at least `least`, below `below`, and not 0 where it must be positive."""
        value = self.get(name, default)
        a_number = isinstance(value, int | float) and not isinstance(value, bool) and least <= value < below
        if not a_number or (positive and not value):
            expected = "a positive number" if positive else f"a number from {least:g}"
            raise self.wrong(name, expected + (f" to below {below:g}" if below < math.inf else ""))
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def choice(self, name: str, default: str, known: Sequence[str]) -> str:
        """Return one of the known words."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in known:
            raise UserError(f"{self.place}{name} {shown(value)} is not supported; supported: {', '.join(known)}")
        return value

    def windowed_layers(self, layers: int) -> list[bool] | None:
        """Return for each layer whether `layer_types` gives it a sliding window; None where it is null or missing."""
        types = self.get("layer_types")
        if types is None:
            return None
        names = [_LEGACY_LAYER_TYPES.get(str(kind), kind) for kind in types] if isinstance(types, list) else []
        if len(names) != layers or any(name not in ("full_attention", "sliding_attention") for name in names):
            raise self.wrong("layer_types", f"null or {layers} times 'full_attention' or 'sliding_attention'")
        return [name == "sliding_attention" for name in names]


def token_ids(content: Mapping[str, Any], place: str) -> dict[str, list[int]]:
    """Return the ids of each of `TOKEN_IDS` that a config.json or generation_config.json has; -1 stands for none there.

    Raises:
      UserError: a value other than null, an id, or a list of ids; names the field.
    """
    found = {}
    for name in TOKEN_IDS:
        value = content.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(each) is int and -1 <= each <= LARGEST_POSITION for each in ids):
            raise UserError(f"{place}{name} must be null, the id of a token, or a list of ids, found {shown(value)}")
        found[name] = [each for each in ids if each >= 0]
    return found


def check(fields: Fields) -> None:
    """Refuse the fields that would change the result and that no reader has taken.

    Raises:
      UserError: names the field.
    """
    kind, content = fields.kind, fields.content
    for name, only in ONLY:
        if kind in only.kinds and name in content and not _is_one_of(content[name], only.values):
            supported = shown(only.values[0]) if only.values else "a config without this field"
            raise UserError(
                f"{fields.place}{name} {shown(content[name])} is not supported ({only.meaning}); supported: {supported}"
            )
    for name in ("dtype", "torch_dtype"):
        if content.get(name) not in _DTYPES:
            raise fields.wrong(name, f"null or one of {', '.join(each for each in _DTYPES if each)}")
    token_ids(content, fields.place)
    known = {name for name, _ in ONLY} | fields.read | HARMLESS.keys() | FOREIGN
    unknown = content.keys() - known
    if unknown:
        _check_unknown(fields, unknown)


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    return any(type(value) is type(each) and value == each for each in values)  # 0 is not False


def _check_unknown(fields: Fields, names: set[str]) -> None:
    """Refuse what the installed transformers knows and this package does not, unless it is the default.

    Such a field comes with a later transformers. Any other name is one that transformers ignores as well.
    """
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[fields.kind]
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    for name in sorted(names):
        if hasattr(config_class, name) and fields.content[name] != defaults.get(name, _REQUIRED):
            raise UserError(
                f"{fields.place}{name} {shown(fields.content[name])} is not supported: transformers' "
                f"{config_class.__name__} has this field, and it is not known here"
            )


def ignored(fields: Fields) -> list[str]:
    """Return the fields that look as if they changed the result, though transformers ignores them for this model_type."""
    neutral: tuple[Any, ...] = (None, False, 0, 0.0, 1, 1.0, "", [], {})
    expected = {"attention_bias"} if fields.kind == "qwen2" else set()  # which has biases always, and GGUF files say so
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    content = {**rope, **fields.content} if isinstance(rope, Mapping) else fields.content
    return sorted(
        name for name in FOREIGN - fields.read - expected if name in content and not _is_one_of(content[name], neutral)
    )
