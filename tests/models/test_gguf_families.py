"""Every family that llama.cpp has a name for, from a GGUF file as its converter writes it: logits equal transformers'."""

import math

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import quantize
from gguf.tensor_mapping import get_tensor_name_map
from quick import jit
from test_decoders import GEMMA, HALF, MANY, MOE, SMALL, torch_model
from test_llama import jax_logits, random_ids, rope, torch_logits
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from neuroada_jax.core.quantised import is_quantised
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained.gguf_config import read_config
from neuroada_jax.pretrained.load import load_model

GEMMA_LAYERS = {**GEMMA, "num_hidden_layers": 6, "query_pre_attn_scalar": 8}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 77.0}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
SCALES = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.5, "attention_multiplier": 0.6}

# name -> (architecture in the file, model_type, fields of the config)
CASES = {
    "gemma2": (
        "gemma2",
        "gemma2",
        {**GEMMA_LAYERS, "num_hidden_layers": 3, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 7.0},
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {**GEMMA_LAYERS, "rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL}},
    ),
    "gemma3_untied": ("gemma3", "gemma3_text", {**GEMMA_LAYERS, "tie_word_embeddings": False}),
    "phi3": ("phi3", "phi3", {**SMALL, "sliding_window": 5}),
    "phi3_longrope": (
        "phi3",
        "phi3",
        {**SMALL, "original_max_position_embeddings": 10, **rope("longrope", **HALF), "tie_word_embeddings": True},
    ),
    "phi3_short": ("phi3", "phi3", {**SMALL, "original_max_position_embeddings": 40, **rope("longrope", **MANY)}),
    "olmo2": ("olmo2", "olmo2", {**SMALL, "tie_word_embeddings": True}),
    "granite": ("granite", "granite", {**SMALL, **SCALES}),
    "granite_biases": (
        "granite",
        "granite",
        {**SMALL, "attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.3},
    ),
    "smollm3": ("smollm3", "smollm3", SMALL),
    "qwen3moe": ("qwen3moe", "qwen3_moe", {**MOE, "num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "mixtral": ("llama", "mixtral", {**SMALL, "num_local_experts": 5}),
}


def permuted(tensor, heads):
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def stored(reference, arch):
    """The tensors as llama.cpp's converter writes them, under the names that its own table has for ours."""
    config = reference.config
    table = get_tensor_name_map(
        next(key for key, name in MODEL_ARCH_NAMES.items() if name == arch), config.num_hidden_layers
    )
    for name, tensor in reference.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, suffix = name.rsplit(".", 1) if name.endswith((".weight", ".bias")) else (name, "weight")
        array = tensor.numpy()
        if arch in ("llama", "granite", "smollm3") and ("q_proj" in name or "k_proj" in name):
            array = permuted(array, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1.0
        parts = {stem: array}
        if "gate_up_proj" in stem and "experts" in stem:
            gate, up = np.split(array, 2, axis=1)
            parts = {stem.replace("gate_up_proj", "gate_proj"): gate, stem.replace("gate_up_proj", "up_proj"): up}
        for own, part in parts.items():
            yield f"{table.get_name(own)}.{suffix}", np.ascontiguousarray(part)


def add_metadata(writer, arch, config):
    """The keys that the converter of the architecture writes."""
    c = config
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    theta = c.rope_parameters.get("full_attention", c.rope_parameters)["rope_theta"]
    writer.add_rope_freq_base(theta)
    if getattr(c, "head_dim", None):
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    if arch == "granite":
        writer.add_attention_scale(c.attention_multiplier)
        writer.add_embedding_scale(c.embedding_multiplier)
        writer.add_residual_scale(c.residual_multiplier)
        writer.add_logit_scale(c.logits_scaling)
    if arch in ("llama", "granite", "smollm3"):
        writer.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    if arch == "phi3":
        add_phi(writer, c)
    if arch.startswith("gemma"):
        writer.add_sliding_window(c.sliding_window)
        if arch == "gemma2":
            writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
            writer.add_final_logit_softcapping(c.final_logit_softcapping)
        elif c.rope_parameters["full_attention"]["rope_type"] == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(c.rope_parameters["full_attention"]["factor"])
    if arch in ("qwen3moe", "llama"):
        writer.add_expert_count(getattr(c, "num_experts", None) or c.num_local_experts)
        writer.add_expert_used_count(c.num_experts_per_tok)
    if arch == "qwen3moe":
        writer.add_expert_feed_forward_length(c.moe_intermediate_size)


def add_phi(writer, c):
    rope, original = c.rope_parameters, c.original_max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * c.hidden_size) // c.num_attention_heads)
    writer.add_sliding_window(c.sliding_window or 0)
    if rope["rope_type"] == "longrope":
        scale = c.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        for name in ("short", "long"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.asarray(rope[f"{name}_factor"], np.float32))


def write(path, name, block=lambda tensor: None, **extra):
    """Write a case as a GGUF file, kernels in the blocks that `block` names; `extra` are further methods of the writer."""
    arch, kind, fields = CASES[name]
    reference = torch_model(kind, fields)
    writer = GGUFWriter(path, arch)
    add_metadata(writer, arch, reference.config)
    for method, value in extra.items():
        getattr(writer, f"add_{method}")(value)
    for tensor, array in stored(reference, arch):
        packed = block(tensor) if tensor.startswith("blk.") and array.ndim > 1 and array.shape[-1] % 32 == 0 else None
        writer.add_tensor(tensor, array if packed is None else quantize(array, packed), raw_dtype=packed)
    for method in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, method)()
    return reference


QUICK = {"gemma3", "phi3_longrope", "granite", "qwen3moe"}
READ_BY_TRANSFORMERS = {"gemma2", "gemma3", "phi3_longrope", "qwen3moe"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES])
def test_logits_equal_those_of_the_hugging_face_model(name, tmp_path):
    path = tmp_path / "model.gguf"
    reference = write(path, name)
    if name in READ_BY_TRANSFORMERS:  # it reads the file that is written here as the weights that it was written from
        theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=reference)["tensors"]
        own = {key: tensor for key, tensor in reference.state_dict().items() if key in theirs or key != "lm_head.weight"}
        assert theirs.keys() == own.keys()
        assert all(torch.allclose(theirs[key], own[key], rtol=0, atol=1e-6) for key in own)
    loaded = load_model(str(path))
    assert loaded.model.hf_config["model_type"] == CASES[name][1]
    ids = random_ids((2, 24))
    want = torch_logits(reference, ids)
    assert np.std(want) > 0.3
    got = jax_logits(loaded.model, loaded.params, ids, jit)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["phi3", "mixtral"])
def test_packed_blocks_of_fused_maps_and_experts_equal_dequantised_ones(name, tmp_path, monkeypatch):
    path = str(tmp_path / "model.gguf")
    arch, kind, fields = CASES[name]
    monkeypatch.setitem(CASES, name, (arch, kind, {**fields, "intermediate_size": 64, "num_hidden_layers": 2}))
    other = {"blk.1.ffn_gate_exps.weight": GGMLQuantizationType.Q4_0, "blk.0.ffn_up_exps.weight": None}
    write(path, name, block=lambda tensor: other.get(tensor, GGMLQuantizationType.Q8_0))
    loaded = [load_model(path, quantization_of=held) for held in ("auto", "none")]
    assert [each.model.quantization for each in loaded] == ["stored", "none"]
    assert loaded[0].digests == loaded[1].digests
    if name == "mixtral":
        maps = loaded[0].params["model"]["layers"]["block_sparse_moe"]["experts"]
        each = {own: [is_quantised(layer) and layer.format for layer in maps[own]["kernel"]] for own in maps}
        assert each == {"w1": ["Q8_0", "Q4_0"], "w2": ["Q8_0", "Q8_0"], "w3": [False, "Q8_0"]}
    ids = random_ids((1, 12))
    packed, plain = (jax_logits(each.model, each.params, ids, jit) for each in loaded)
    np.testing.assert_allclose(packed, plain, rtol=0, atol=1e-4)


def test_what_a_file_says_and_is_not_read_is_refused_by_name(tmp_path):
    path = tmp_path / "model.gguf"
    for name, extra, message in (
        ("olmo2", {"sliding_window": 5}, r"olmo2\.attention\.sliding_window 5 is not supported"),  # OLMo 3
        ("smollm3", {"sliding_window": 5}, r"smollm3\.attention\.sliding_window 5"),
        ("granite", {"expert_shared_count": 2}, r"granite\.expert_shared_count 2"),
        ("granite", {"rope_scaling_finetuned": False}, r"granite\.rope\.scaling\.finetuned False"),  # no rope
        ("olmo2", {"causal_attention": False}, r"olmo2\.attention\.causal False is not supported"),
        ("mixtral", {"expert_feed_forward_length": 3}, r"llama\.expert_feed_forward_length 3"),
        ("phi3", {"value_length": 12}, r"phi3\.attention\.value_length is 12, expected 8"),
        ("phi3_short", {"rope_scaling_yarn_ext_factor": 0.5}, r"phi3\.rope\.scaling\.yarn_ext_factor is not supported"),
        ("gemma2", {"expert_count": 2}, "'gemma2' with experts is not supported"),
    ):
        write(path, name, **extra)
        with pytest.raises(UserError, match=message):
            read_config(path)


def test_a_file_of_phi3_without_its_window_has_that_of_the_published_models(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    arch, kind, fields = CASES["phi3"]
    monkeypatch.setattr(GGUFWriter, "add_sliding_window", lambda *_: None)
    for layers, context, want in ((32, 4096, 2047), (32, 64, None), (2, 4096, None)):
        own = {**fields, "num_hidden_layers": layers, "max_position_embeddings": context, "sliding_window": None}
        monkeypatch.setitem(CASES, "phi3", (arch, kind, own))
        write(path, "phi3", causal_attention=True)  # which says nothing
        assert read_config(path).get("sliding_window") == want


@pytest.mark.parametrize(("name", "largest"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_have_another_scale_of_attention(name, largest, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    arch, kind, fields = CASES[name]
    for layers, want in ((2, 12), (largest, 8)):
        own = {**fields, "num_hidden_layers": layers, "hidden_size": 32, "head_dim": 12, "intermediate_size": 4}
        monkeypatch.setitem(CASES, name, (arch, kind, own))
        write(path, name)
        assert read_config(path)["query_pre_attn_scalar"] == want
