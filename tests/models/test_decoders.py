"""Every family of decoders beside LLaMA's own against transformers: logits, packed and cached, and each kind of layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from quick import jit
from test_llama import SIZES, decode, jax_logits, random_ids, rope, torch_logits

from neuroada_jax.models import attention
from neuroada_jax.pretrained.load import load_model

TOKENS = 24
SMALL = {**SIZES, "num_hidden_layers": 4, "pad_token_id": 0}
MANY = {"short_factor": [1.0, 1.3, 1.7, 2.0], "long_factor": [1.0, 3.0, 7.0, 9.0]}
HALF = {"partial_rotary_factor": 0.5, "short_factor": [1.0, 1.5], "long_factor": [1.0, 6.0]}
MOE = {**SMALL, "moe_intermediate_size": 20, "head_dim": 12}
GEMMA = {**SMALL, "head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 5}
GEMMA3_ROPES = {"full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 77.0}, "sliding_attention": {}}

# name -> (model_type, fields)
CASES = {
    "granite": ("granite", SMALL),
    "granite_multipliers": (
        "granite",
        {
            **SMALL,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.6,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.5,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("smollm3", {**SMALL, "no_rope_layer_interval": 2}),
    "smollm3_windows": (
        "smollm3",
        {**SMALL, "no_rope_layers": [1, 0, 0, 1], "use_sliding_window": True, "sliding_window": 5},
    ),
    "smollm3_no_rope": ("smollm3", {**SMALL, "no_rope_layers": [0] * 4, "tie_word_embeddings": False}),
    "olmo2": ("olmo2", SMALL),
    "olmo2_tied_bias": ("olmo2", {**SMALL, "attention_bias": True, "tie_word_embeddings": True}),
    "ministral": ("ministral", {**SMALL, "head_dim": 12, "sliding_window": 5}),
    "ministral_by_layer": (
        "ministral",
        {**SMALL, "head_dim": 8, "sliding_window": 5, "layer_types": ["full_attention", *["sliding_attention"] * 3]},
    ),
    "phi3": ("phi3", {**SMALL, "sliding_window": 5}),
    "phi3_multi_head_tied": ("phi3", {**SMALL, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "phi3_partial": ("phi3", {**SMALL, **rope("default", partial_rotary_factor=0.5)}),
    "phi3_longrope_long": (
        "phi3",
        {**SMALL, "original_max_position_embeddings": 10, **rope("longrope", attention_factor=1.2, **MANY)},
    ),
    "phi3_longrope_short": (
        "phi3",
        {**SMALL, "original_max_position_embeddings": 40, **rope("longrope", **HALF)},
    ),
    "mixtral": ("mixtral", {**SMALL, "num_local_experts": 5}),
    "mixtral_window_tied": (
        "mixtral",
        {**SMALL, "sliding_window": 5, "num_experts_per_tok": 3, "tie_word_embeddings": True},
    ),
    "qwen3_moe": ("qwen3_moe", {**MOE, "num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "qwen3_moe_many": ("qwen3_moe", {**MOE, "num_experts": 12, "num_hidden_layers": 2, "attention_bias": True}),
    "gemma2": ("gemma2", GEMMA),
    "gemma2_untied_no_caps": (
        "gemma2",
        {**GEMMA, "tie_word_embeddings": False, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": ("gemma3_text", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "gemma3_ropes": (
        "gemma3_text",
        {**GEMMA, "sliding_window_pattern": 3, "rope_parameters": GEMMA3_ROPES, "final_logit_softcapping": 3.0},
    ),
}


def torch_model(kind, fields, seed=0):
    """A random model whose logits are of order 1 and whose attention is peaked."""
    config = transformers.CONFIG_MAPPING[kind](**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
            if "norm" in name and "gemma" not in kind:
                parameter.add_(1.0)
    return model


def both(name, directory):
    """A random model of transformers, and what we load from the directory that it saves."""
    kind, fields = CASES[name]
    reference = torch_model(kind, fields)
    reference.save_pretrained(directory)
    loaded = load_model(str(directory))
    return reference, loaded.model, loaded.params


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, tmp_path):
    reference, model, params = both(name, tmp_path)
    ids = random_ids((2, TOKENS))
    want = torch_logits(reference, ids)
    assert np.std(want) > 0.3  # else 1e-4 would say little
    with jax.disable_jit(model.config.experts is None):  # a loop over blocks of rows takes long without
        got = jax_logits(model, params, ids, jax.jit)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


# No positions in some layers, norms behind, fused maps, capped logits with windows, ropes by layer, experts.
KINDS = ["smollm3_windows", "olmo2", "phi3", "gemma2", "gemma3_ropes", "mixtral"]


@pytest.mark.parametrize("name", KINDS)
def test_scanned_cached_and_packed_rows_equal_transformers(name, tmp_path):
    reference, model, params = both(name, tmp_path)
    ids, split = random_ids((1, 20)), 12
    parts = [ids[:, :split], ids[:, split:]]
    want = [torch_logits(reference, part) for part in parts]
    positions = np.concatenate([np.arange(split), np.arange(20 - split)])[None].astype(np.int32)
    mask = attention.packed_mask(jnp.asarray(positions))
    apply = jit(lambda params, *given: model.module().apply({"params": params}, *given)[0])
    unembed = lambda hidden: model.module().apply({"params": params}, hidden, method="unembed")  # noqa: E731
    packed = unembed(apply(params, jnp.asarray(ids), jnp.asarray(positions), mask))
    np.testing.assert_allclose(packed, np.concatenate(want, axis=1), rtol=0, atol=1e-4)
    cached = unembed(decode(model, params, jnp.asarray(parts[0]), [7, 1, 1, 1, 1, 1], slots=14))
    np.testing.assert_allclose(cached, want[0], rtol=0, atol=1e-4)
