"""Edited config.json files, generated from transformers' config classes and from what its modelling code reads."""

import ast
import dataclasses
import functools
import json
import math
import types
import typing
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import safetensors.numpy
import torch
import transformers

from neuroada_jax import models
from neuroada_jax.errors import UserError
from neuroada_jax.models import config_fields
from neuroada_jax.pretrained.load import open_model

TOKENS, VOCABULARY = 40, 61
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.01,
}
_DECODER = {**_SIZES, "num_key_value_heads": 2, "max_position_embeddings": 24}  # fewer positions than tokens
_QWEN = {**_DECODER, "head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
_WINDOW = {**_DECODER, "sliding_window": 5}
_GEMMA = {**_WINDOW, "head_dim": 8, "query_pre_attn_scalar": 64}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "attention_factor": 1.1,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
_ENCODER = {**_SIZES, "max_position_embeddings": 48}
_DEBERTA = {
    **_ENCODER,
    "relative_attention": True,
    "pos_att_type": ["p2c"],
    "position_buckets": 8,
    "max_relative_positions": 30,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 2,
    "conv_kernel_size": 3,
    "conv_groups": 2,
}
BASES = {
    "llama": _DECODER,
    "mistral": {**_DECODER, "head_dim": 8, "sliding_window": 5},
    "qwen2": _QWEN,
    "qwen3": _QWEN,
    "ministral": {**_WINDOW, "head_dim": 8},
    "smollm3": {
        **_DECODER,
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "pad_token_id": 0,
    },
    "granite": {**_DECODER, "embedding_multiplier": 2.0, "attention_multiplier": 0.3, "logits_scaling": 1.5},
    "olmo2": _DECODER,
    "phi3": {**_DECODER, "pad_token_id": 0, "original_max_position_embeddings": 16, "rope_parameters": _LONGROPE},
    "mixtral": {**_WINDOW, "head_dim": 8, "num_local_experts": 3},
    "qwen3_moe": {
        **_WINDOW,
        "use_sliding_window": True,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
    },
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "sliding_window_pattern": 2},
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "electra": {**_ENCODER, "embedding_size": 16},
    "deberta-v2": _DEBERTA,
    "distilbert": {
        "vocab_size": VOCABULARY,
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "initializer_range": 0.01,
        "max_position_embeddings": 48,
    },
    "modernbert": {
        **_ENCODER,
        "global_attn_every_n_layers": 2,
        "local_attention": 8,
        "pad_token_id": 0,
    },
    "mpnet": _ENCODER,
    "xlm-roberta": _ENCODER,
}
MISSING = object()

_DTYPES = ["bfloat16", "float16", "float64", "float8_e4m3fn", "int8"]
# Values that only mean something to one field.
_VALUES = {
    "hidden_act": ["relu", "gelu", "gelu_pytorch_tanh", "tanh", "quick_gelu"],
    "activation": ["relu", "tanh"],
    "classifier_activation": ["relu", "tanh"],
    "classifier_pooling": ["mean"],
    "hidden_activation": ["relu", "gelu", "tanh"],
    "no_rope_layers": [[1, 1], [0, 1, 1]],
    "pos_att_type": [["c2p"], ["p2c", "c2p"], "p2c|c2p", "c2p", ["p2p"]],
    "pooler_hidden_act": ["relu", "tanh"],
    "conv_act": ["relu", "gelu"],
    "conv_groups": [1, 4, 3],
    "conv_kernel_size": [1, 5, 0, 2, 10**9],
    "norm_rel_ebd": ["none"],
    "dtype": _DTYPES,
    "torch_dtype": _DTYPES,
    "id2label": [{"0": "a"}, {"0": "a", "1": "b", "2": "c"}, {"1": "a", "2": "b"}, {"a": "a", "b": "b"}],
    "layer_types": [
        ["full_attention", "sliding_attention"],
        ["attention", "sliding_attention"],
        ["full_attention", "full_attention"],
        ["full_attention"],
        ["chunked_attention", "chunked_attention"],
    ],
    "per_layer_config": [{"0": {"intermediate_size": 16}}, {"1": {"sliding_window": 2}}],
    "attn_implementation": ["eager", "sdpa"],
    "position_embedding_type": ["absolute", "relative_key"],
    "num_labels": [1],
}
SHAPES = {
    "dim",
    "hidden_dim",
    "n_layers",
    "n_heads",
    "embedding_size",
    "moe_intermediate_size",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "type_vocab_size",
}


def is_decoder(kind):
    return models.ARCHITECTURES[kind].is_decoder


@functools.cache
def annotations(kind):
    """Field -> the type of its values, as transformers' config class of this model_type declares it."""
    config_class = transformers.CONFIG_MAPPING[kind]
    hints = typing.get_type_hints(config_class, localns={"torch": torch, **vars(typing)})
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def _names_in_code(path):
    """Names that a file of transformers takes from a config: `config.X`, `getattr(config, "X", ...)`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        owner, name = None, None
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr") and len(node.args) > 1:
            owner, name = node.args[0], getattr(node.args[1], "value", None)
        owner = owner.func if isinstance(owner, ast.Call) else owner  # config.get_text_config().X
        if getattr(owner, "id", getattr(owner, "attr", "")) in ("config", "layer_config", "get_text_config"):
            names.add(name)
    return {name for name in names if isinstance(name, str) and not name.startswith("_")}


@functools.cache
def _names_in_shared_code():
    package = Path(transformers.__file__).parent
    files = [
        "masking_utils",
        "modeling_rope_utils",
        "cache_utils",
        "modeling_utils",
        "utils/generic",
        "utils/output_capturing",
    ]
    return set().union(*(_names_in_code(package / f"{file}.py") for file in files))


@functools.cache
def names_of(kind):
    """Every field that transformers could read for this model_type."""
    config_class = transformers.CONFIG_MAPPING[kind]
    part = kind.replace("-", "_").removesuffix("_text")
    path = Path(transformers.__file__).parent / f"models/{part}/modeling_{part}.py"
    read = _names_in_shared_code() | _names_in_code(path)
    machinery = {name for name in read if callable(getattr(config_class, name, None))} | {"sub_configs", "model_type"}
    return annotations(kind).keys() | config_class().to_dict().keys() | config_class.attribute_map.keys() | read - machinery


def content_of(kind, **edit):
    fields = {"model_type": kind, **BASES[kind], **edit}
    return {name: value for name, value in fields.items() if value is not MISSING}


@functools.cache
def fields_read(kind):
    """The fields that our reader of this model_type asks for."""
    fields = config_fields.Fields(content_of(kind))
    models.ARCHITECTURES[kind].read_config(fields, jnp.float32)
    return fields.read - {"model_type"}


def _of_type(hint, near):
    """Values of a declared type, the first not `near`."""
    origin = typing.get_origin(hint) or hint
    if origin is bool:
        return [True, False]
    if origin is int:
        near = near if isinstance(near, int) else max(int(near), 1) if isinstance(near, float) else 3
        return [near + 1, 2 * near, 0, -1]
    if origin is float:
        near = near if isinstance(near, float) else 0.3
        return [near + 0.1, 0.0, -1.0, math.nan]
    if origin is typing.Literal:
        return list(typing.get_args(hint))
    if typing.is_typeddict(origin):
        origin = dict
    known = {str: ["other"], list: [[], [3]], dict: [{}, {"other": 3}], type(None): [None], torch.dtype: []}
    return known[origin]  # a KeyError: a field of a type that has no values here yet


def values(name, hint, near):
    """Values of a field: some of each of its declared types, of wrong types, and none at all.

    Args:
      name: the field.
      hint: its type; None for a field that transformers' class does not declare, which gets few values.
      near: its value in the config to edit.
    """
    found = [*_VALUES.get(name, []), True, "other"]
    if hint is not None:
        union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        for part in typing.get_args(hint) if union else (hint,):
            found += _of_type(part, near)
        found += [MISSING, None, False, [3], {"other": 3}, 2.5 if isinstance(near, int) else "3"]
    if (
        name in SHAPES and near is not None
    ):  # the base's own value is not the default, and each one more is another program to compile
        found = [value for value in found if isinstance(value, bool) or value not in (3, near + 1, 2 * near)]
    return list({repr(value): value for value in found}.values())


@functools.cache
def _weight(name, shape):
    """A tensor that follows from its name, so that configs with the same shapes have the same weights."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    return (0.3 * random.standard_normal(shape) + ("norm" in name.lower() and name.endswith("weight"))).astype(np.float32)


def _inputs(kind, vocabulary):
    """ids and mask; only an encoder's rows have padding."""
    random = np.random.default_rng(0)
    ids = random.integers(6, VOCABULARY // 2, (2, TOKENS)) % vocabulary
    mask = np.arange(TOKENS)[None] < np.array([[TOKENS], [TOKENS if is_decoder(kind) else 23]])
    return np.where(mask, ids, 1), mask


def _as_stored(kind, tensors):
    """Tensors under the names of checkpoints, where each expert has its own; transformers stacks them."""
    gate, up, down = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for name, tensor in tensors.items():
        name = name.replace(".mlp.", ".block_sparse_moe.") if kind == "mixtral" else name
        prefix, experts, own = name.partition("experts.")
        for expert, each in enumerate(tensor if experts else []):
            parts = np.split(each, 2) if own == "gate_up_proj" else [each]
            for part, of in zip(parts, [gate, up] if own == "gate_up_proj" else [down], strict=True):
                yield f"{prefix}experts.{expert}.{of}.weight", np.ascontiguousarray(part)
        if not experts:
            yield name, tensor


def _torch_logits(kind, folder):
    """transformers' logits for the folder's config; the weights are saved in the folder."""
    config = transformers.AutoConfig.from_pretrained(folder)
    auto = transformers.AutoModelForCausalLM if is_decoder(kind) else transformers.AutoModelForSequenceClassification
    model = auto.from_config(config).float().eval()
    tied = is_decoder(kind) and config.tie_word_embeddings
    ids, mask = (torch.from_numpy(array) for array in _inputs(kind, config.vocab_size))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(_weight(name, tuple(parameter.shape))))
        output = model(ids) if is_decoder(kind) else model(ids, attention_mask=mask.long())
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items() if not (tied and "lm_head" in name)}
    safetensors.numpy.save_file(dict(_as_stored(kind, tensors)), folder / "model.safetensors")
    logits = (output[0] if isinstance(output, tuple) else output.logits).numpy()
    return logits if np.isfinite(logits).all() else None


_OURS: dict[object, np.ndarray] = {}


def our_logits(kind, folder):
    """Our logits for the folder's model; what has the same description has the same weights and is computed once."""
    opened = open_model(str(folder), "float32")
    key = opened.model.config
    if key not in _OURS:
        _OURS[key] = forward(kind, opened.model, opened.load().params)
    return _OURS[key]


def forward(kind, model, params, adapter=None):
    """The logits of a model's parameters, and of an adapter that is not merged."""
    module = model.module()
    ids, mask = (jnp.asarray(array) for array in _inputs(kind, model.config.vocab_size))
    ids = ids.astype(jnp.int32)

    def run(params, adapter):
        variables = {"params": params}
        if adapter is not None:
            variables |= {"bypass": adapter.values, "columns": adapter.columns}
        if not is_decoder(kind):
            return module.apply(variables, ids, mask)
        hidden = module.apply(variables, ids)[0]
        return module.apply({"params": params}, hidden, method="unembed")

    # Types are checked elsewhere; most operations are compiled already, for another config.
    jaxtyping.config.update("jaxtyping_disable", True)
    with jax.disable_jit(getattr(model.config, "experts", None) is None):  # a loop over blocks of rows takes long without
        logits = np.asarray(jax.jit(run)(params, adapter))
    jaxtyping.config.update("jaxtyping_disable", False)
    return logits


def outcome(kind, folder, edit, names):
    """Compare our model of an edited config with transformers': "used" or "same", which is to say as without the edit.

    "refused" is one line with one of the names. "alone" is a config that transformers itself does not run.
    """
    content = content_of(kind, **edit)
    (folder / "config.json").write_text(json.dumps(content))
    try:
        model = models.from_hf_config(json.loads((folder / "config.json").read_text()))
    except UserError as refusal:
        message = str(refusal)
    else:
        message = None
    if message is not None:
        assert "\n" not in message and len(message) < 300 and any(name in message for name in names), message
        return "refused"
    try:
        want = _torch_logits(kind, folder)
    except Exception:  # whatever a strange value does to transformers
        want = None
    if want is None:
        return "alone"
    np.testing.assert_allclose(our_logits(kind, folder), want, rtol=0, atol=1e-4)
    return "same" if model.config == models.from_hf_config(content_of(kind)).config else "used"
