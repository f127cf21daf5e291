"""Every field of a config.json, for every model_type: transformers' logits, one line that names the field, or no effect.

The cases are generated (config_cases.py), so that a field that a later transformers adds fails here until it has its place.
"""

import functools
import typing

import numpy as np
import pytest
import transformers
from config_cases import (
    BASES,
    MISSING,
    SHAPES,
    annotations,
    content_of,
    fields_read,
    is_decoder,
    names_of,
    our_logits,
    outcome,
    values,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.utils import logging

from neuroada_jax import models
from neuroada_jax.errors import NeuroadaWarning, UserError
from neuroada_jax.models.config_fields import FOREIGN, HARMLESS, ONLY
from neuroada_jax.models.rope import RopeType
from neuroada_jax.pretrained.load import open_model
from neuroada_jax.training import modules

logging.disable_progress_bar()
logging.set_verbosity(logging.CRITICAL)
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and PyTorch have their say about strange values

KINDS = list(BASES)
DECODERS = [kind for kind in KINDS if is_decoder(kind)]
REFUSED = {name for name, _ in ONLY}
# Read to refuse every value but those without effect; rope parameters have tests of their own below.
CHECKED = {
    "initializer_range",
    "problem_type",
    "rope_parameters",
    "use_bidirectional_attention",
    "relative_attention",
    *("decoder_sparse_step", "mlp_only_layers"),
}
# Rope type -> a scaling of this type, for a model with fewer positions than the inputs have tokens.
ROPES = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 2.5},
    "llama3": {"factor": 4.5, "low_freq_factor": 1.5, "high_freq_factor": 4.5, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.5, "original_max_position_embeddings": 16},
    "longrope": {
        "factor": 4.5,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
    },
}
TWO_LABELS, THREE_LABELS = {"0": "a", "1": "b"}, {"0": "a", "1": "b", "2": "c"}
# What only several fields together show: (model_type, fields, what comes of it).
TOGETHER = [
    ("llama", {"dtype": None, "torch_dtype": "bfloat16"}, "same"),
    ("llama", {"hidden_size": 36, "head_dim": 8}, "used"),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, "used"),
    ("mistral", {"sliding_window": None, "layer_types": ["full_attention", "sliding_attention"]}, "refused"),
    ("mistral", {"sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"]}, "used"),
    ("mistral", {"sliding_window": 7, "layer_types": None}, "used"),
    ("qwen2", {"use_sliding_window": False, "layer_types": ["full_attention", "sliding_attention"]}, "refused"),
    ("qwen2", {"use_sliding_window": False, "layer_types": ["full_attention", "full_attention"]}, "used"),
    ("qwen3", {"sliding_window": None, "layer_types": ["full_attention", "full_attention"]}, "used"),
    ("qwen3", {"max_window_layers": 0, "layer_types": ["sliding_attention", "full_attention"]}, "used"),
    ("phi3", {"rope_parameters": {"rope_theta": 77.0}, "partial_rotary_factor": 0.5}, "used"),
    ("phi3", {"rope_parameters": None, "rope_scaling": {"type": "su", **ROPES["longrope"]}}, "used"),
    ("phi3", {"head_dim": 6, "rope_parameters": {"rope_theta": 77.0}}, "used"),
    ("gemma3_text", {"rope_scaling": ROPES["linear"], "rope_theta": 77.0, "rope_local_base_freq": 99.0}, "used"),
    ("gemma3_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}, "same"),
    ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "yarn", **ROPES["yarn"]}}}, "used"),
    ("gemma3_text", {"layer_types": ["full_attention"] * 2, "rope_parameters": {"full_attention": 3}}, "refused"),
    ("modernbert", {"rope_scaling": ROPES["linear"], "global_rope_theta": 77.0, "local_rope_theta": 99.0}, "used"),
    ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "yarn", **ROPES["yarn"]}}}, "used"),
    ("modernbert", {"rope_parameters": {"sliding_attention": {"rope_type": "dynamic", "factor": 2.5}}}, "used"),
    ("modernbert", {"rope_parameters": {"full_attention": {}}, "rope_scaling": ROPES["linear"]}, "refused"),
    ("modernbert", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 3, "local_attention": 20}, "used"),
    ("modernbert", {"classifier_pooling": "mean", "layer_types": ["full_attention"] * 2}, "used"),
    ("bert", {"num_labels": 3, "id2label": TWO_LABELS}, "used"),  # transformers then forgets the names
    ("bert", {"num_labels": 3, "id2label": THREE_LABELS}, "used"),
    ("bert", {"num_labels": None, "id2label": THREE_LABELS}, "refused"),
    ("bert", {"num_labels": 1, "problem_type": "regression"}, "used"),
    ("bert", {"num_labels": 1, "problem_type": "single_label_classification"}, "refused"),
    ("roberta", {"pad_token_id": 5, "max_position_embeddings": 46}, "used"),
    ("roberta", {"pad_token_id": 5, "max_position_embeddings": 6}, "refused"),
]


@functools.cache
def _read_by_all(decoders):
    """The fields that every decoder, or every encoder, asks for: one function reads them."""
    return frozenset.intersection(*(frozenset(fields_read(kind)) for kind in KINDS if is_decoder(kind) == decoders))


def _is_rerun(kind, name):
    """Whether another model_type, whose cases always run, is read by the same code."""
    if kind in ("llama", "bert"):
        return False
    same_reader = kind == "xlm-roberta" or (kind == "electra" and name != "embedding_size")
    return same_reader or name not in fields_read(kind) or name in _read_by_all(is_decoder(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_the_base_config(kind, tmp_path):
    assert outcome(kind, tmp_path, {}, []) == "same"
    assert np.std(our_logits(kind, tmp_path)) > 0.3  # else 1e-4 would say little


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_that_transformers_reads_has_its_place(kind):
    assert names_of(kind) - {"model_type"} - fields_read(kind) - HARMLESS.keys() - REFUSED - FOREIGN == set()
    assert all(HARMLESS.values())  # with a reason


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=pytest.mark.slow if _is_rerun(kind, name) else ())
        for kind in KINDS
        for name in sorted(names_of(kind) | fields_read(kind) | HARMLESS.keys() | REFUSED | FOREIGN)
        if name != "model_type"
    ],
)
def test_each_value_gives_transformers_logits_or_is_refused_or_changes_nothing(kind, name, tmp_path):
    declared = annotations(kind)
    default = getattr(transformers.CONFIG_MAPPING[kind](), name) if name in declared else None
    edits = values(name, declared.get(name), BASES[kind].get(name, default))
    found = [outcome(kind, tmp_path, {name: value}, [name]) for value in edits]
    if name in fields_read(kind):  # no value that transformers refuses passes here
        assert "alone" not in found, dict(zip(map(repr, edits), found, strict=True))
        assert "used" in found or name not in declared or name in SHAPES | CHECKED


@pytest.mark.parametrize(("kind", "edit", "expected"), TOGETHER)
def test_fields_that_depend_on_one_another(kind, edit, expected, tmp_path):
    assert outcome(kind, tmp_path, edit, list(edit)) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [10**12, 10**9, 10**30])
def test_sizes_that_no_model_has_are_refused_before_anything_is_built(kind, value):
    for name in fields_read(kind):
        if isinstance(BASES[kind].get(name), int) and not isinstance(BASES[kind][name], bool):
            if value == 10**9 and name in ("max_position_embeddings", "sliding_window", "max_window_layers"):
                continue
            with pytest.raises(UserError, match=f"config.json: {name} must be at most"):
                models.from_hf_config(content_of(kind, **{name: value}))


@pytest.mark.parametrize("value", [None, 3, ["llama"], {"a": 1}, "other", MISSING])
def test_a_model_type_that_is_none(value):
    with pytest.raises(UserError, match=r"config.json: model_type .* is not supported; supported: bert, .*llama"):
        models.from_hf_config(content_of("llama", model_type=value))


def test_every_rope_type_has_its_place(tmp_path):
    assert ROPES.keys() == {kind.value for kind in RopeType}
    for name in [*ROPE_INIT_FUNCTIONS.keys() - ROPES.keys(), "mrope", "other", None, 3, ["yarn"]]:
        edit = {"rope_parameters": {"rope_type": name, "rope_theta": 100.0, "factor": 2.0}}
        assert outcome("llama", tmp_path, edit, ["rope type"]) == "refused"


@pytest.mark.parametrize(
    ("rope_type", "name"),
    [
        # Linear and dynamic differ from yarn and llama3 in no field that they do not have.
        pytest.param(
            kind, name, marks=pytest.mark.slow if kind in ("linear", "dynamic") and name not in ROPES[kind] else ()
        )
        for kind in ROPES
        for name in sorted({*RopeParameters.__annotations__, "type"} - {"rope_type"})
    ],
)
def test_each_field_of_rope_parameters(rope_type, name, tmp_path):
    hint = typing.get_type_hints(RopeParameters).get(name, str)
    near = {"rope_theta": 100.0, **ROPES[rope_type]}.get(name)
    for value in values(name, hint, near):
        rope = {"rope_type": rope_type, "rope_theta": 100.0, **ROPES[rope_type], name: value}
        edit = {"rope_parameters": {key: each for key, each in rope.items() if each is not MISSING}}
        assert outcome("llama", tmp_path, edit, [name, "rope_theta"]) != "alone", value


@pytest.mark.parametrize("rope_type", ROPES)
def test_older_spellings_of_rope_parameters_and_their_order(rope_type, tmp_path):
    own, legacy = {"rope_type": rope_type, **ROPES[rope_type]}, {"type": rope_type, **ROPES[rope_type]}
    other = {"rope_type": "linear", "factor": 3.0, "rope_theta": 77.0}
    without = {key: value for key, value in own.items() if key != "original_max_position_embeddings"}
    scaled = rope_type != "default"
    for edit, refused in [
        ({"rope_scaling": legacy, "rope_theta": 50.0}, False),
        ({"rope_scaling": legacy, "rope_parameters": other}, False),
        ({"rope_scaling": {**own, "rope_theta": 60.0}, "rope_parameters": other, "rope_theta": 50.0}, False),
        ({"rope_scaling": {}, "rope_parameters": own, "rope_theta": 50.0}, False),
        ({"rope_scaling": {**other, **own, "type": "linear"}}, False),
        ({"rope_parameters": without, "original_max_position_embeddings": 10}, False),
        ({"rope_parameters": own, "original_max_position_embeddings": 10}, False),
        ({"rope_parameters": without}, False),
        ({"rope_parameters": own, "rope_theta": None}, True),
        ({"rope_parameters": {**own, "rope_theta": None}}, True),
        ({"rope_parameters": own, "partial_rotary_factor": 0.5}, scaled),
        ({"rope_parameters": own, "partial_rotary_factor": None}, False),
        ({"rope_parameters": {"full_attention": own}}, True),
    ]:
        found = outcome("llama", tmp_path, edit, [*edit, "rope type"])
        assert (found == "refused") == refused and found != "alone", edit


@pytest.mark.parametrize("kind", [kind for kind in DECODERS if kind not in ("llama", "phi3", "gemma3_text")])
def test_rope_parameters_of_the_other_decoders(kind, tmp_path):
    yarn = {"rope_type": "yarn", **ROPES["yarn"]}
    for edit in [
        {"rope_scaling": yarn, "rope_parameters": {"rope_theta": 77.0}},
        {"rope_parameters": {"rope_theta": 77.0}},
    ]:
        assert outcome(kind, tmp_path, edit, []) == "used"


def test_what_transformers_ignores_is_ignored_and_named():
    content = content_of("mistral", attention_bias=True, mlp_bias=False, num_experts=8, other=3)
    assert models.from_hf_config(content).ignored == ("attention_bias", "num_experts")
    content = content_of("llama", attention_bias=True, rope_parameters={"partial_rotary_factor": 0.5, "rope_theta": 9.0})
    assert models.from_hf_config(content).ignored == ("partial_rotary_factor",)


def test_ignored_fields_are_said_when_a_model_is_opened(tmp_path):
    assert outcome("mistral", tmp_path, {"attention_bias": True}, []) == "same"
    with pytest.warns(NeuroadaWarning, match="config.json: ignored, as transformers does for mistral: attention_bias"):
        open_model(str(tmp_path))


def test_training_says_which_dropout_it_leaves_out(capfd):
    for kind in ("llama", "bert"):
        modules.say_dropout(models.from_hf_config(content_of(kind, attention_dropout=0.1)))
    modules.say_dropout(models.from_hf_config(content_of("llama", attention_dropout=0.0)))
    said = "config.json: attention_dropout 0.1 is not applied: a decoder is trained without dropout"
    assert capfd.readouterr().err.split("\n") == [said, ""]


def test_a_field_of_a_later_transformers_is_refused_unless_it_has_its_default(monkeypatch):
    monkeypatch.delitem(HARMLESS, "pretraining_tp")
    assert models.from_hf_config(content_of("llama", pretraining_tp=1))
    with pytest.raises(
        UserError, match=r"config.json: pretraining_tp 2 is not supported: transformers' LlamaConfig has this"
    ):
        models.from_hf_config(content_of("llama", pretraining_tp=2))
    with pytest.raises(UserError, match=r"config.json: attribute_map {'a': 'b'} is not supported"):
        models.from_hf_config(content_of("llama", attribute_map={"a": "b"}))
