"""Quantised checkpoints and checkpoints that are quantised on load: equal weights, digests, and errors in one line."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from helpers import random_tensors, write_model
from quantised_files import SECTIONS, SIZES, stored, write_bitsandbytes

from neuroada_jax.adapters.inspection import inspect_model
from neuroada_jax.core import bypass, quantised, trees
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained.gguf_header import read_header
from neuroada_jax.pretrained.load import load_model, open_model

DENSE = jax.jit(quantised.dense)
UP = "model.layers.0.mlp.up_proj.weight"


def dense(params):
    """The parameters with every kernel dequantised and stacked."""
    flat = {}
    for path, leaf in trees.flatten(params):
        layers = [np.asarray(DENSE(layer)) for layer in leaf] if path[-1] == "kernel" and leaf is not None else leaf
        flat[path] = np.stack(layers) if isinstance(layers, list) else np.asarray(leaf)
    return flat


# nf4 is that of experts, too.
@pytest.mark.parametrize("form", [pytest.param(form, marks=pytest.mark.slow if form == "nf4" else ()) for form in SECTIONS])
def test_bitsandbytes_checkpoints_are_what_is_quantised_on_load(tmp_path, form):
    read = load_model(str(write_bitsandbytes(tmp_path / "stored", form)))
    assert read.model.quantization == f"stored:{form}"
    weights = random_tensors(SIZES)
    plain = write_model(tmp_path / "plain", None, weights=weights, **{**SIZES, "dtype": "float32"})
    made = load_model(str(plain), "bfloat16", quantization_of=form)
    assert made.model.quantization == form
    of_kernels = {name for name in weights if name.endswith("_proj.weight")}
    assert {name: read.digests[name] for name in of_kernels} == {name: made.digests[name] for name in of_kernels}
    unpacked = load_model(str(tmp_path / "stored"), quantization_of="none")
    assert not quantised.holds(unpacked.params) and unpacked.digests == read.digests
    for path, leaf in dense(read.params).items():
        np.testing.assert_array_equal(leaf, dense(made.params)[path])
        np.testing.assert_array_equal(leaf, dense(unpacked.params)[path])
    shapes = open_model(str(tmp_path / "stored")).abstract_params()
    assert jax.tree.structure(shapes) == jax.tree.structure(read.params)
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(read.params), strict=True)
    assert all((one.shape, one.dtype) == (other.shape, other.dtype) for one, other in pairs)
    assert bypass.count(read.params) == bypass.count(unpacked.params)


EXPERTS = {**SIZES, "model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}


def test_experts_of_bitsandbytes_checkpoints_are_single_maps(tmp_path):
    read = load_model(str(write_bitsandbytes(tmp_path / "stored", "nf4", sizes=EXPERTS)))
    weights = random_tensors(EXPERTS)
    made = load_model(
        str(write_model(tmp_path / "plain", None, weights=weights, **{**EXPERTS, "dtype": "float32"})),
        "bfloat16",
        quantization_of="nf4",
    )
    jax.tree.map(np.testing.assert_array_equal, read.params, made.params)
    moe = made.params["model"]["layers"]["block_sparse_moe"]
    assert moe["experts"]["w2"]["kernel"].shape == (2, 3, 64, 128) and not quantised.is_quantised(moe["gate"]["kernel"])
    own = np.asarray(moe["experts"]["w2"]["kernel"].parts["codes"][1, 2])
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    np.testing.assert_array_equal(own.reshape(-1, 1), stored(name, weights[name], "nf4")[name])
    other = stored(name, weights[name], "int8")
    changes = dict.fromkeys(stored(name, weights[name], "nf4")) | other
    mixed = write_bitsandbytes(tmp_path / "mixed", "nf4", sizes=EXPERTS, **changes)
    assert f"tensor {name!r} is int8, and other experts of its layer are nf4" in message(load_model, str(mixed))


@pytest.mark.parametrize("expert", [0, 2])
def test_a_bitsandbytes_checkpoint_that_lacks_an_expert_is_refused_by_name(tmp_path, expert):
    name = f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"
    without = dict.fromkeys(stored(name, random_tensors(EXPERTS)[name], "nf4"))
    path = str(write_bitsandbytes(tmp_path / "lacking", "nf4", sizes=EXPERTS, **without))
    lacking = f"{path}: tensor {name!r} is missing from the checkpoint; expected shape [64, 128]"
    assert message(load_model, path) == message(open_model(path).abstract_params) == lacking


def test_inspection_counts_the_bits_of_what_a_checkpoint_quantises(tmp_path):
    everything = inspect_model(str(write_bitsandbytes(tmp_path / "all", "nf4", sizes=EXPERTS)), 1)
    assert everything["quantization"] == "bitsandbytes nf4" and 4.5 < everything["bits_per_weight"] < 4.6  # the routers'
    dense_experts: dict[str, Any] = {}
    for name, weight in random_tensors(EXPERTS).items():
        if ".experts." in name:
            dense_experts |= dict.fromkeys(stored(name, weight, "nf4")) | {name: weight}
    part = inspect_model(str(write_bitsandbytes(tmp_path / "part", "nf4", sizes=EXPERTS, **dense_experts)), 1)
    entries = {"attention": 2 * (2 * 64 + 2 * 32) * 64, "others": 2 * 3 * (64 * (3 * 128 + 1))}
    expected = (4.5 * entries["attention"] + 16 * entries["others"]) / sum(entries.values())
    np.testing.assert_allclose(part["bits_per_weight"], expected)
    nothing = write_model(tmp_path / "none", None, **EXPERTS)
    (nothing / "config.json").write_text(json.dumps({**EXPERTS, "quantization_config": SECTIONS["nf4"]}))
    for read in (load_model, lambda path: inspect_model(path, 1)):
        assert "quantization_config: bitsandbytes, but no tensor is quantised" in message(read, str(nothing))


GGUF_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
              "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
              "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
              }  # fmt: skip


def write_gguf(path, type_of, vocabulary="Q8_0"):
    """A GGUF file of SIZES whose kernels have the types that type_of(layer, name) gives."""
    writer = GGUFWriter(str(path), "llama")
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_feed_forward_length(128)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, weight in random_tensors(SIZES).items():
        _, _, *rest = name.split(".")
        if not name.startswith("model.layers."):
            top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
            own, kind = top.get(name, "output.weight"), vocabulary if weight.ndim == 2 else "F32"
        else:
            own = f"blk.{rest[0]}.{GGUF_NAMES['.'.join(rest[1:-1])]}.weight"
            kind = type_of(int(rest[0]), rest[-2]) if weight.ndim == 2 else "F32"
        data = quantize(weight, GGMLQuantizationType[kind])
        writer.add_tensor(own, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.mark.parametrize("mixed", [False, True])
def test_packed_blocks_are_the_weights_of_the_dequantised_file(tmp_path, mixed):
    kinds = {("down_proj", 1): "Q8_0", ("v_proj", 0): "F16"} if mixed else {}
    path = write_gguf(tmp_path / "model.gguf", lambda layer, name: kinds.get((name, layer), "Q4_1"))
    plain, packed = load_model(path), load_model(path, quantization_of="auto")
    assert (plain.model.quantization, packed.model.quantization) == ("none", "stored")
    assert plain.digests == packed.digests
    assert isinstance(packed.params["model"]["layers"]["mlp"]["down_proj"]["kernel"], tuple) == mixed
    expected, found = dense(plain.params), dense(packed.params)
    assert expected.keys() == found.keys()
    for path_of in expected:
        np.testing.assert_array_equal(expected[path_of], found[path_of])
    ids = jnp.arange(6, dtype=jnp.int32)[None]
    logits = []
    for loaded in (plain, packed):
        module = loaded.model.module()
        hidden, _ = module.apply({"params": loaded.params}, ids)
        logits.append(module.apply({"params": loaded.params}, hidden, method="unembed"))
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-4)


def test_embeddings_that_a_file_does_not_quantise_are_not_held_quantised(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", lambda layer, name: "Q4_1")
    assert quantised.is_quantised(
        load_model(path, quantization_of="auto+embeddings").params["model"]["embed_tokens"]["embedding"]
    )
    path = write_gguf(tmp_path / "plain.gguf", lambda layer, name: "Q4_1", vocabulary="F16")
    found = message(load_model, path, quantization_of="auto+embeddings")
    assert found == f"{path}: model.quantize_embeddings: the checkpoint has no quantised embedding; expected false"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_blocks_with_a_scale_that_is_nan_are_refused_packed_or_not(tmp_path, kind):
    path = write_gguf(tmp_path / "model.gguf", lambda layer, name: kind)
    first = read_header(path).tensors["blk.1.ffn_up.weight"].start
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    content[first : first + 2] = np.float16(np.nan).tobytes()  # the scale
    (tmp_path / "model.gguf").write_bytes(content)
    for held in ("none", "auto"):
        found = message(load_model, path, quantization_of=held)
        assert found.startswith(f"{path}: tensor 'model.layers.1.mlp.up_proj.weight' holds ") and " NaN in " in found


def message(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def state(**fields):
    content = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 64], **fields}
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


CASES = {
    "another type": ({f"{UP}.quant_state.bitsandbytes__nf4": state(quant_type="fp4")}, "has quant_type 'fp4'"),
    "quant_state that is no JSON": ({f"{UP}.quant_state.bitsandbytes__nf4": np.zeros(4, np.uint8)}, "is not the JSON"),
    "block size": ({f"{UP}.quant_state.bitsandbytes__nf4": state(blocksize=128)}, "has blocks of 128, expected 64"),
    "shape": ({f"{UP}.quant_state.bitsandbytes__nf4": state(shape=[8192])}, "has shape [8192]"),
    "inputs": ({f"{UP}.quant_state.bitsandbytes__nf4": state(shape=[256, 32])}, "do not divide its 32 inputs"),
    "scales that are NaN": ({f"{UP}.absmax": np.full(128, np.nan, np.float32)}, "NaN, infinities or negative scales"),
    "negative scales": ({f"{UP}.absmax": np.full(128, -1, np.float32)}, "NaN, infinities or negative scales"),
    "too few scales": ({f"{UP}.absmax": np.ones(127, np.float32)}, "is F32 [127], expected 128 F32"),
    "scales missing": ({f"{UP}.absmax": None}, "is missing"),
    "codes of a wrong length": ({UP: np.zeros((100, 1), np.uint8)}, "expected 4096 bytes"),
    "codes missing": ({UP: None}, "is missing"),
    "codes without scales": ({"model.norm.weight": np.zeros(64, np.uint8)}, "no scales are stored beside it"),
    "another table": ({f"{UP}.quant_map": np.zeros(16, np.float32)}, "holds other numbers than nf4's"),
    "an embedding": (
        stored("model.embed_tokens.weight", np.ones((320, 64), np.float32), "nf4"), "is not the weight of a linear map"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_damaged_bitsandbytes_checkpoints_are_refused_in_one_line(tmp_path, case):
    changes, expected = CASES[case]
    directory = str(write_bitsandbytes(tmp_path / "stored", "nf4", **changes))
    for form in (None, "none"):
        if (case, form) != ("an embedding", "none"):
            assert expected in message(load_model, directory, quantization_of=form)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"quant_method": "hqq", "bits": 4}, "checkpoints of 'hqq' are not read"),
        ({"quant_method": ["fp8"]}, "checkpoints of ['fp8'] are not read"),
        (["nf4"], "quantization_config is ['nf4'], expected an object"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb_4bit_quant_type 'fp4' is not read"),
        ({"quant_method": "bitsandbytes"}, "has neither load_in_4bit nor load_in_8bit"),
        ({"load_in_4bit": True, "_load_in_8bit": True, "bnb_4bit_quant_type": "nf4"}, "both load_in_4bit and load_in_8bit"),
    ],
)
def test_other_methods_are_refused_by_name(tmp_path, section, expected):
    directory = write_model(tmp_path / "model", None)
    (directory / "config.json").write_text(json.dumps({**SIZES, "quantization_config": section}))
    assert expected in message(open_model, str(directory))


def test_what_is_quantised_already_is_not_quantised_again(tmp_path):
    directory = str(write_bitsandbytes(tmp_path / "stored", "int8"))
    assert "nf4 asked for, but the checkpoint is quantised already (bitsandbytes int8)" in message(
        open_model, directory, quantization_of="nf4"
    )
    narrow = str(write_model(tmp_path / "narrow", None))
    assert "which do not divide its 24 inputs" in message(load_model, narrow, quantization_of="nf4")
    file = write_gguf(tmp_path / "model.gguf", lambda *_: "Q4_0")
    assert "quantised already (GGUF Q4_0)" in message(open_model, file, quantization_of="int8")
