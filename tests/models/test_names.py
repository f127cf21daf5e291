"""Hugging Face names <-> the stacked tree, targets by name, and what the registry refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neuroada_jax import models
from neuroada_jax.core import bypass, trees
from neuroada_jax.errors import UserError
from neuroada_jax.models import names

STACK = ("model", "layers")
SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def abstract(kind="llama", **fields):
    model = models.from_hf_config({"model_type": kind, **SIZES, **fields})
    return model.abstract_params()


def test_checkpoint_names_of_a_llama():
    slots = names.checkpoint_names(abstract(), STACK)
    linear = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    linear += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    modules = [*linear, "input_layernorm", "post_attention_layernorm"]
    expected = {f"model.layers.{layer}.{module}.weight" for layer in range(3) for module in modules}
    expected |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert set(slots) == expected
    assert slots["model.layers.2.mlp.up_proj.weight"] == names.Slot(("model", "layers", "mlp", "up_proj", "kernel"), 2)
    assert slots["model.layers.0.input_layernorm.weight"] == names.Slot(("model", "layers", "input_layernorm", "scale"), 0)
    assert slots["model.embed_tokens.weight"] == names.Slot(("model", "embed_tokens", "embedding"), None)
    assert slots["lm_head.weight"] == names.Slot(("lm_head", "kernel"), None)


def test_each_expert_has_its_name():
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2}
    slots = names.checkpoint_names(abstract("mixtral", **sizes), STACK)
    path = ("model", "layers", "block_sparse_moe", "experts", "w2", "kernel")
    slot = slots["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    assert slot == names.Slot(path, 1, 2) and slot.of(np.arange(9).reshape(3, 3)) == 5
    assert slots["model.layers.1.block_sparse_moe.gate.weight"].expert is None


def test_checkpoint_names_follow_the_config():
    assert "lm_head.weight" not in names.checkpoint_names(abstract(tie_word_embeddings=True), STACK)
    qwen2 = names.checkpoint_names(abstract("qwen2"), STACK)
    assert {f"model.layers.1.self_attn.{m}_proj.bias" in qwen2 for m in "qkv"} == {True}
    assert "model.layers.1.self_attn.o_proj.bias" not in qwen2
    qwen3 = names.checkpoint_names(abstract("qwen3"), STACK)
    assert {"model.layers.1.self_attn.q_norm.weight", "model.layers.1.self_attn.k_norm.weight"} <= set(qwen3)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_names_and_slots_are_one_to_one_and_cover_the_tree(kind):
    params = abstract(kind)
    slots = names.checkpoint_names(params, STACK)
    assert len(set(slots.values())) == len(slots)
    for path, leaf in trees.flatten(params):
        layers = [slot.layer for slot in slots.values() if slot.path == path]
        assert layers == (list(range(leaf.shape[0])) if names.is_stacked(path, STACK) else [None])


def test_module_names_round_trip():
    path = ("model", "layers", "self_attn", "q_proj")
    assert names.module_name(path, 7, STACK) == "model.layers.7.self_attn.q_proj"
    assert names.module_name(("lm_head",), None, STACK) == "lm_head"
    assert names.within_layer(path, STACK) == "self_attn.q_proj"
    assert names.within_layer(("model", "norm"), STACK) == "model.norm"
    assert names.is_stacked(path, STACK)
    assert not names.is_stacked(("model", "norm"), STACK)


def test_unstacked_gives_every_layer_under_its_name():
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), abstract())
    paths = models.match_targets(params, ["q_proj", "lm_head"], STACK)
    values = bypass.build(params, paths, 2).values
    q_proj = jnp.arange(3 * 8 * 2, dtype=jnp.float32).reshape(3, 8, 2)
    values["model"]["layers"]["self_attn"]["q_proj"]["values"] = q_proj
    unstacked = dict(names.unstacked(values, STACK))
    assert set(unstacked) == {"lm_head", *(f"model.layers.{layer}.self_attn.q_proj" for layer in range(3))}
    for layer in range(3):
        np.testing.assert_array_equal(unstacked[f"model.layers.{layer}.self_attn.q_proj"], q_proj[layer])
    assert unstacked["lm_head"].shape == (11, 2)


def nested(*modules):
    """A tree of (1, 2, 2) kernels at dotted paths below model.layers; a leading / is the root."""
    tree = {}
    for module in modules:
        path = module[1:].split(".") if module.startswith("/") else [*STACK, *module.split(".")]
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node["kernel"] = jax.ShapeDtypeStruct((1, 2, 2), jnp.float32)
    return tree


def matched(params, *targets):
    return [names.within_layer(path, STACK) for path in models.match_targets(params, list(targets), STACK)]


def test_targets_by_exact_path_and_by_last_component():
    params = nested("self_attn.q_proj", "cross_attn.q_proj", "mlp.up_proj", "/lm_head")
    assert matched(params, "self_attn.q_proj") == ["self_attn.q_proj"]
    assert matched(params, "q_proj") == ["self_attn.q_proj", "cross_attn.q_proj"]
    assert matched(params, "lm_head", "up_proj") == ["mlp.up_proj", "lm_head"]  # the tree's order
    assert matched(params, "q_proj", "self_attn.q_proj", "q_proj").count("self_attn.q_proj") == 1


def test_an_exact_path_comes_before_the_last_component():
    params = nested("dense", "output.dense")
    assert matched(params, "dense") == ["dense"]
    assert matched(params, "output.dense") == ["output.dense"]


@pytest.mark.parametrize(
    "target", ["proj", "q", "attn.q_proj", "q_pro", "model.layers.self_attn.q_proj", "self_attn", "Q_PROJ", "", "norm"]
)
def test_never_a_substring_and_the_error_lists_what_exists(target):
    with pytest.raises(UserError) as error:
        models.match_targets(abstract(), ["v_proj", target], STACK)
    message = str(error.value)
    assert f"bypass.targets: {target!r} matches no linear map" in message
    for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "lm_head"):
        assert module in message
    assert "norm" not in message.replace(repr(target), "")
    assert "embed" not in message


def test_the_output_layer_of_a_tied_model_is_no_target():
    with pytest.raises(UserError, match="'lm_head' matches no linear map"):
        models.match_targets(abstract(tie_word_embeddings=True), ["lm_head"], STACK)


@pytest.mark.parametrize("kind", ["gpt2", None, "LLAMA", "llama4"])
def test_an_unknown_architecture_lists_the_known_ones(kind):
    with pytest.raises(UserError, match=f"model_type {kind!r} is not supported; supported: bert, .*llama, .*qwen3"):
        models.from_hf_config({**SIZES, "model_type": kind})


def test_a_quantised_checkpoint_is_refused():
    config = {**SIZES, "model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(UserError, match="quantization_config is set; only unquantised"):
        models.from_hf_config(config)


def test_the_registry_keeps_the_config_and_the_dtype():
    config = {**SIZES, "model_type": "llama", "extra": 1}
    model = models.from_hf_config(config, jnp.bfloat16)
    assert model.hf_config == config
    assert model.layers_path == STACK
    assert {leaf.dtype for leaf in jax.tree.leaves(model.abstract_params())} == {jnp.dtype(jnp.bfloat16)}
    assert model.abstract_params()["model"]["layers"]["mlp"]["up_proj"]["kernel"].shape == (3, 12, 8)
