"""Checkpoints of fp8 from the hub: weights by the published formulas, to the last bit, and errors in one line."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from data_helpers import CHAT, message_of
from helpers import run_config, write_rows
from published_files import EXPERTS, FORMS, WIDE, groups, is_kernel, published_tensors, write_published

from neuroada_jax.adapters import exchange, native
from neuroada_jax.adapters.inspection import inspect_model
from neuroada_jax.core import quantised, trees
from neuroada_jax.core.quantised_formats import bits
from neuroada_jax.models import names
from neuroada_jax.pretrained import source
from neuroada_jax.pretrained.load import load_model, open_model
from neuroada_jax.training import config_file, run

DENSE = jax.jit(quantised.dequantise)
UP = "model.layers.0.mlp.up_proj"


def by_name(loaded):
    """Every tensor of a loaded model in float32, by its Hugging Face name."""
    slots = names.checkpoint_names(loaded.model.abstract_params(), loaded.model.layers_path)
    leaves = dict(trees.flatten(quantised.map_quantised(DENSE, loaded.params)))
    return {name: np.asarray(slot.of(leaves[slot.path]), np.float32) for name, slot in slots.items()}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_of_the_published_formula(tmp_path, form):
    tensors, published = published_tensors(form), FORMS[form]
    kernels = {name: published.formula(name, tensors) for name in by_name_of(WIDE) if is_kernel(name)}
    path = str(write_published(tmp_path / "stored", form))
    kept, plain = load_model(path), load_model(path, quantization_of="none")
    assert kept.model.quantization == f"stored:{published.format}" and plain.model.quantization == "none"
    assert not quantised.holds(plain.params) and kept.digests == plain.digests
    assert quantised.is_quantised(kept.params["model"]["layers"]["mlp"]["up_proj"]["kernel"])
    for loaded in (kept, plain):
        for name, found in by_name(loaded).items():
            stored = kernels[name] if name in kernels else tensors[name]
            np.testing.assert_array_equal(found, stored.astype(ml_dtypes.bfloat16).astype(np.float32), err_msg=name)
    wide = load_model(path, "float32")
    np.testing.assert_array_equal(by_name(wide)[f"{UP}.weight"], kernels[f"{UP}.weight"])
    expected = [open_model(path).abstract_params(), open_model(path, config_only=True).abstract_params()]
    (tmp_path / "stored" / "model.safetensors").unlink()
    expected.append(open_model(path, config_only=True).abstract_params())
    for shapes in expected:
        jax.tree.map(lambda one, other: np.testing.assert_equal((one.shape, one.dtype), (other.shape, other.dtype)),
                     shapes, kept.params)  # fmt: skip


def by_name_of(sizes):
    """The names of the tensors of a model."""
    return published_tensors("fp8 tensors", sizes)


@pytest.mark.parametrize("form", ["fp8 blocks"])
def test_experts_and_what_inspect_says_of_them(tmp_path, form):
    path, tensors = str(write_published(tmp_path / "stored", form, sizes=EXPERTS)), published_tensors(form, EXPERTS)
    loaded = load_model(path)
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    expected = FORMS[form].formula(name, tensors).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(by_name(loaded)[name], expected.astype(np.float32))
    gate = loaded.params["model"]["layers"]["block_sparse_moe"]["gate"]["kernel"]
    assert not quantised.is_quantised(gate)
    about = inspect_model(path, 1)
    assert about["quantization"] == f"fp8 {FORMS[form].format}"
    assert bits(FORMS[form].format, 128) < about["bits_per_weight"] < 8.3  # the routers have 16


def trained(folder, model, **sections):
    """The directory of a run on a checkpoint, and its losses."""
    sections = {"model": {"dtype": "float32"}, "bypass": {"k": 2}, "training": {"log_every": 1}, **sections}
    config = config_file.from_dict(run_config(folder, model, write_rows(folder / "rows.jsonl"), **sections), "test")
    run.train(config)
    lines = (config.directory / "metrics.jsonl").read_text().splitlines()
    return config.directory, [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("form", ["fp8 blocks"])
def test_a_run_trains_on_it_and_merges(tmp_path, form):
    model = write_published(tmp_path / "model", form, CHAT)
    directory, losses = trained(tmp_path, model)
    adapter = str(directory / "adapter")
    assert len(losses) == 3 and native.read(adapter).metadata["base"]["quantization"] == f"stored:{FORMS[form].format}"
    exchange.export_adapter(adapter, "huggingface", str(tmp_path / "merged"))
    merged, base = by_name(load_model(str(tmp_path / "merged"))), by_name(load_model(str(model), "float32"))
    for name, found in merged.items():
        assert is_kernel(name) == bool((found != base[name]).any())
        assert (found != base[name]).sum() <= 2 * len(found)
    again = exchange.export_adapter(adapter, "huggingface", str(tmp_path / "again"), requantise="int8")
    assert again["requantised"]["change_kept"] > 0.9
    refused = message_of(exchange.export_adapter, adapter, "peft-shira", str(tmp_path / "shira"))
    assert f"not verified on the weights of a {FORMS[form].section['quant_method']} checkpoint" in refused


@pytest.mark.slow  # as that of nf4 in test_quantised_runs.py
@pytest.mark.parametrize("form", ["fp8 blocks"])
def test_devices_that_split_its_codes_by_neuron_train_the_same(tmp_path, form):
    model = write_published(tmp_path / "model", form, CHAT)
    found = []
    for name, parallel in (("one", {"mode": "single"}), ("two", {"mode": "jit", "devices": 2, "fsdp": 2})):
        (tmp_path / name).mkdir()
        found.append(trained(tmp_path / name, model, parallel=parallel)[1])
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_scales_of_activations_are_named_and_not_used(tmp_path):
    scales = {f"{UP}.input_scale": np.ones((), np.float32), f"{UP}.k_scale": np.ones((1,), np.float32)}
    path = str(write_published(tmp_path / "stored", "compressed-tensors tensors", **scales))
    tensors = source.open_tensors(path)
    assert f"{path}: '{UP}.input_scale' and 1 more are not used: activations stay in the model's dtype" in tensors.notes
    assert not set(scales) & set(tensors.names())


CODES = np.zeros((256, 128), ml_dtypes.float8_e4m3fn)
NAN = np.full((256, 128), np.nan, ml_dtypes.float8_e4m3fn)
SCALE = f"{UP}.weight_scale_inv"
CASES = {
    "scales missing": ({SCALE: None}, "'model.layers.0.mlp.up_proj.weight' holds F8_E4M3 codes, and no scales"),
    "codes missing": ({f"{UP}.weight": None}, "is missing, though"),
    "codes that are bfloat16": (
        {f"{UP}.weight": np.zeros((256, 128), ml_dtypes.bfloat16)}, "is BF16 [256, 128], expected F8_E4M3"
    ),
    "codes of three axes": ({f"{UP}.weight": CODES[None]}, "is F8_E4M3 [1, 256, 128], expected F8_E4M3 codes of a matrix"),
    "codes of another map": (
        {f"{UP}.weight": CODES[:128], SCALE: np.ones((1, 1), np.float32)}, "has shape [128, 128], expected [256, 128]"
    ),
    "inputs": ({f"{UP}.weight": CODES[:, :96]}, "fp8_blocks has blocks of 128 inputs, which do not divide its 96 inputs"),
    "a scale a row": ({SCALE: np.ones((256, 1), np.float32)}, "is F32 [256, 1], expected F32 or BF16 or F16 [2, 1]"),
    "scales of integers": ({SCALE: np.ones((2, 1), np.int32)}, "is I32 [2, 1], expected F32 or BF16 or F16 [2, 1]"),
    "scales that are NaN": ({SCALE: np.full((2, 1), np.nan, np.float32)}, "NaN, infinities or negative scales"),
    "negative scales": ({SCALE: np.full((2, 1), -1, np.float32)}, "NaN, infinities or negative scales"),
    "large scales": ({SCALE: np.full((2, 1), 1e38, np.float32)}, "holds scales above 7.57e+35"),
    "codes that are NaN": ({f"{UP}.weight": NAN}, "holds 32768 NaN in 32768, expected finite numbers"),
    "an embedding": (
        {"model.embed_tokens.weight": np.zeros((320, 128), ml_dtypes.float8_e4m3fn),
         "model.embed_tokens.weight_scale_inv": np.ones((3, 1), np.float32)},
        "is quantised (fp8_blocks), and is not the weight of a linear map"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_damaged_tensors_are_refused_in_one_line(tmp_path, case):
    changes, expected = CASES[case]
    directory = str(write_published(tmp_path / "stored", "fp8 blocks", **changes))
    for form in (None, "none"):
        if (case, form) != ("an embedding", "none"):
            found = message_of(load_model, directory, quantization_of=form)
            assert expected in found and "\n" not in found and directory in found


BLOCKS = FORMS["fp8 blocks"].section
SECTIONS = [
    ({**BLOCKS, "weight_block_size": [64, 64]}, "weight_block_size: blocks of [64, 64] are not read, only [rows, 128]"),
    ({**BLOCKS, "weight_block_size": 128}, "blocks of 128 are not read"),
    ({**BLOCKS, "weight_block_size": [True, 128]}, "blocks of [True, 128] are not read"),
    ({**BLOCKS, "fmt": "e5m2"}, "of fp8: fmt 'e5m2' is not read, only 'e4m3'"),
    ({**BLOCKS, "expert_dtype": "fp4"}, "of fp8: expert_dtype 'fp4' is not read, only 'fp8'"),
    ({**groups("channel"), "format": "pack-quantized"}, "format 'pack-quantized' is not read, only 'float-quantized'"),
    ({**groups("channel"), "config_groups": {}}, "config_groups is {}, expected groups with weights"),
    ({**groups("channel"), "config_groups": {"group_0": {"weights": None}}}, "weights is None in a group"),
    ({**groups("channel"), "sparsity_config": {"format": "sparse-24"}}, "sparsity_config {'format': 'sparse-24'}"),
    (groups("channel", num_bits=4), "(4, 'float', 'channel') are not read, only symmetric ones of 8"),
    (groups("group"), "(8, 'float', 'group') are not read"),
    (groups("block"), "block_structure: blocks of None are not read"),
    ({**groups("channel"), "config_groups": {**groups("block", block_structure=[128, 128])["config_groups"],
                                             "group_1": groups("channel")["config_groups"]["group_0"]}},
     "groups with and without blocks, or with different ones, are not read"),
]  # fmt: skip


@pytest.mark.parametrize(("section", "expected"), SECTIONS)
def test_other_fields_are_refused_by_name(tmp_path, section, expected):
    (tmp_path / "config.json").write_text(json.dumps({**WIDE, "quantization_config": section}))
    found = message_of(open_model, str(tmp_path), config_only=True)
    assert expected in found and "config.json: quantization_config of " in found and "\n" not in found


def test_what_is_quantised_already_and_what_is_not_quantised(tmp_path):
    path = str(write_published(tmp_path / "stored", "fp8 tensors"))
    assert "nf4 asked for, but the checkpoint is quantised already (fp8 fp8)" in message_of(
        open_model, path, quantization_of="nf4"
    )
    plain = {name: np.zeros(tensor.shape, jnp.bfloat16) for name, tensor in published_tensors("fp8 tensors").items()}
    scales = {name: None for name in plain if name.endswith("_scale_inv")}
    path = str(write_published(tmp_path / "plain", "fp8 tensors", **(plain | scales)))
    assert "quantization_config: fp8, but no tensor is quantised" in message_of(load_model, path)
