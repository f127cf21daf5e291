"""Checkpoints of fp8, GPTQ and AWQ from the hub: weights by the published formulas, and errors in one line."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from data_helpers import CHAT, message_of
from helpers import random_tensors, run_config, write_rows
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
    kernels = {name: published.formula(name, tensors) for name in random_tensors(WIDE) if is_kernel(name)}
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


@pytest.mark.parametrize("form", ["fp8 blocks", "gptq with desc_act", "awq"])
def test_experts_and_what_inspect_says_of_them(tmp_path, form):
    path, tensors = str(write_published(tmp_path / "stored", form, sizes=EXPERTS)), published_tensors(form, EXPERTS)
    loaded = load_model(path)
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    expected = FORMS[form].formula(name, tensors).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(by_name(loaded)[name], expected.astype(np.float32))
    gate = loaded.params["model"]["layers"]["block_sparse_moe"]["gate"]["kernel"]
    assert not quantised.is_quantised(gate)
    about = inspect_model(path, 1)
    assert about["quantization"] == f"{FORMS[form].section['quant_method']} {FORMS[form].format}"
    assert 0 < about["bits_per_weight"] - bits(FORMS[form].format, 128) < 0.1  # the routers have 16


def trained(folder, model, **sections):
    """The directory of a run on a checkpoint, and its losses."""
    sections = {"model": {"dtype": "float32"}, "bypass": {"k": 2}, "training": {"log_every": 1}, **sections}
    config = config_file.from_dict(run_config(folder, model, write_rows(folder / "rows.jsonl"), **sections), "test")
    run.train(config)
    lines = (config.directory / "metrics.jsonl").read_text().splitlines()
    return config.directory, [json.loads(line)["loss"] for line in lines]


RUNS = ["gptq with desc_act", *(pytest.param(form, marks=pytest.mark.slow) for form in ("fp8 blocks", "awq"))]


@pytest.mark.parametrize("form", RUNS)
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
@pytest.mark.parametrize("form", ["fp8 blocks", "gptq with desc_act"])
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
    "two scales": (
        {f"{UP}.weight_scale": np.ones((2, 1), np.float32)}, f"'{UP}.weight_scale' is stored beside '{SCALE}'; expected one"
    ),
    "large scales": ({SCALE: np.full((2, 1), 1e38, np.float32)}, "holds scales above 7.57e+35"),
    "codes that are NaN": ({f"{UP}.weight": NAN}, "holds 32768 NaN in 32768, expected finite numbers"),
    "an embedding": (
        {"model.embed_tokens.weight": np.zeros((320, 128), ml_dtypes.float8_e4m3fn),
         "model.embed_tokens.weight_scale_inv": np.ones((3, 1), np.float32)},
        "is quantised (fp8_blocks), and is not the weight of a linear map"),
}  # fmt: skip


QWEIGHT, QZEROS, SCALES, G_IDX = (f"{UP}.{end}" for end in ("qweight", "qzeros", "scales", "g_idx"))
INTEGERS = {
    "codes missing": ("awq", {QWEIGHT: None}, f"'{QWEIGHT}' is missing, though '{QZEROS}' says that there are codes"),
    "scales missing": ("awq", {SCALES: None}, f"'{SCALES}' is missing; expected F16 or BF16 or F32 [1, 256]"),
    "zero points missing": ("gptq", {QZEROS: None}, f"'{QZEROS}' is missing; expected I32 [1, 32]"),
    "groups missing": ("gptq with desc_act", {G_IDX: None}, f"'{G_IDX}' is missing; expected I32 [128]"),
    "codes and the weight": (
        "gptq", {f"{UP}.weight": np.zeros((256, 128), np.float32)}, "is stored beside its codes in qweight"
    ),
    "codes of bytes": ("gptq", {QWEIGHT: np.zeros((64, 256), np.uint8)}, "is U8 [64, 256], expected I32 codes of a matrix"),
    "codes of one axis": ("awq", {QWEIGHT: np.zeros(4096, np.int32)}, "is I32 [4096], expected I32 codes of a matrix"),
    "codes of other inputs": ("awq", {QWEIGHT: np.zeros((96, 32), np.int32)}, "which do not divide its 96 inputs"),
    "codes of other outputs": ("gptq", {QWEIGHT: np.zeros((16, 250), np.int32)}, "has 250 outputs, expected a multiple"),
    "codes of more inputs": ("gptq", {QWEIGHT: np.zeros((32, 256), np.int32)}, "is F16 [1, 256], expected F16 or"),
    "no codes": ("gptq by row", {QWEIGHT: np.zeros((0, 256), np.int32)}, "is I32 [128], expected I32 [0]"),
    "zero points of AWQ's shape": ("gptq", {QZEROS: np.zeros((32, 1), np.int32)}, "is I32 [32, 1], expected I32 [1, 32]"),
    "other zero points": ("gptq", {QZEROS: np.full((1, 32), 0x12345678, np.int32)}, "has the zero point 9, and sym"),
    "scales of integers": ("gptq", {SCALES: np.ones((1, 256), np.int32)}, "is I32 [1, 256], expected F16 or BF16 or F32"),
    "scales that are NaN": ("awq", {SCALES: np.full((1, 256), np.nan, np.float16)}, "holds NaN or infinities"),
    "large scales": ("awq", {SCALES: np.full((1, 256), 1e5, np.float32)}, "holds numbers that float16 does not have"),
    "groups in another order": ("gptq of 32", {G_IDX: np.arange(128, dtype=np.int32)[::-1] // 32}, "and desc_act"),
    "groups beyond": ("gptq with desc_act", {G_IDX: np.full(128, 4, np.int32)}, "has groups 4 to 4, expected 0 to 3"),
    "uneven groups": ("gptq with desc_act", {G_IDX: np.zeros(128, np.int32)}, "has 128 inputs in group 0, expected 32 in"),
    "groups in AWQ": ("awq", {G_IDX: np.zeros(128, np.int32)}, f"'{G_IDX}' is of GPTQ, and quantization_config is of awq"),
    "negative groups": ("gptq with desc_act", {G_IDX: np.full(128, -1, np.int32)}, "has groups -1 to -1, expected 0 to 3"),
    "an embedding": (
        "gptq of 32",
        {f"model.embed_tokens.{end}": array for end, array in {
            "qweight": np.zeros((16, 320), np.int32), "qzeros": np.zeros((4, 40), np.int32),
            "scales": np.ones((4, 320), np.float16)}.items()} | {"model.embed_tokens.weight": None},
        "'model.embed_tokens.weight' is quantised (int4_32), and is not the weight of a linear map"),
}  # fmt: skip


@pytest.mark.parametrize("case", INTEGERS)
def test_damaged_integers_are_refused_in_one_line(tmp_path, case):
    form, changes, expected = INTEGERS[case]
    directory = str(write_published(tmp_path / "stored", form, **changes))
    for held in (None, "none"):
        if (case, held) != ("an embedding", "none"):
            found = message_of(load_model, directory, quantization_of=held)
            assert expected in found and directory in found


def test_scales_of_another_dtype_that_float16_has_are_read(tmp_path):
    scales = published_tensors("awq")[SCALES]
    half = load_model(str(write_published(tmp_path / "half", "awq")))
    wide = load_model(str(write_published(tmp_path / "wide", "awq", **{SCALES: scales.astype(np.float32)})))
    jax.tree.map(np.testing.assert_array_equal, half.params, wide.params)


@pytest.mark.parametrize("case", CASES)
def test_damaged_tensors_are_refused_in_one_line(tmp_path, case):
    changes, expected = CASES[case]
    directory = str(write_published(tmp_path / "stored", "fp8 blocks", **changes))
    for form in (None, "none"):
        if (case, form) != ("an embedding", "none"):
            found = message_of(load_model, directory, quantization_of=form)
            assert expected in found and "\n" not in found and directory in found


BLOCKS, GPTQ, AWQ = (FORMS[form].section for form in ("fp8 blocks", "gptq", "awq"))
SECTIONS = [
    ({**GPTQ, "bits": 3}, "of gptq: bits 3 is not read, only 4 or 8"),
    ({**GPTQ, "bits": True}, "of gptq: bits True is not read"),
    ({"quant_method": "gptq"}, "of gptq: bits None is not read"),
    ({**GPTQ, "group_size": 96}, "of gptq: group_size 96 is not read, only 32 or 64 or 128 or -1"),
    ({**GPTQ, "group_size": None}, "of gptq: group_size None is not read"),
    ({**GPTQ, "checkpoint_format": "marlin"}, "of gptq: checkpoint_format 'marlin' is not read, only gptq or gptq_v2"),
    ({**GPTQ, "checkpoint_format": None, "format": "bitblas"}, "of gptq: format 'bitblas' is not read"),
    ({**GPTQ, "is_marlin_format": True}, "of gptq: is_marlin_format True is not read"),
    ({**GPTQ, "pack_dtype": "int8"}, "of gptq: pack_dtype 'int8' is not read"),
    ({**GPTQ, "desc_act": 1}, "of gptq: desc_act 1 is not read, only False or True"),
    ({**GPTQ, "sym": "yes"}, "of gptq: sym 'yes' is not read"),
    ({**GPTQ, "dynamic": {"+:.*down.*": {"bits": 8}}}, "of gptq: dynamic {'+:.*down.*': {'bits': 8}} is not read"),
    ({**AWQ, "bits": 8}, "of awq: bits 8 is not read, only 4"),
    ({**AWQ, "version": "gemv"}, "of awq: version 'gemv' is not read, only gemm"),
    ({**AWQ, "version": ["gemm"]}, "of awq: version ['gemm'] is not read"),
    ({**AWQ, "zero_point": False}, "of awq: zero_point False is not read, only True"),
    ({**AWQ, "group_size": 64.0}, "of awq: group_size 64.0 is not read"),
    ({**BLOCKS, "weight_block_size": [64, 64]}, "weight_block_size: blocks of [64, 64] are not read, only [rows, 128]"),
    ({**BLOCKS, "weight_block_size": 128}, "blocks of 128 are not read"),
    ({**BLOCKS, "weight_block_size": [True, 128]}, "blocks of [True, 128] are not read"),
    ({**BLOCKS, "fmt": "e5m2"}, "of fp8: fmt 'e5m2' is not read, only 'e4m3'"),
    ({**BLOCKS, "expert_dtype": "fp4"}, "of fp8: expert_dtype 'fp4' is not read, only 'fp8'"),
    ({**groups("channel"), "format": "pack-quantized"}, "format 'pack-quantized' is not read, only 'float-quantized'"),
    ({**groups("channel"), "config_groups": {}}, "config_groups is {}, expected groups with weights"),
    ({**groups("channel"), "config_groups": {"group_0": {"weights": None}}}, "weights is None in a group"),
    ({**groups("channel"), "sparsity_config": {"format": "sparse-24"}}, "sparsity_config {'format': 'sparse-24'}"),
    ({**groups("channel"), "transform_config": {"config_groups": {"R1": {}}}}, "transform_config {'config_groups'"),
    ({**BLOCKS, "activation_scheme": "other"}, "activation_scheme 'other' is not read, only 'dynamic' and 'static'"),
    ({**AWQ, "w_bit": 3}, "of awq: w_bit is 3, and bits is 4"),
    ({**AWQ, "q_group_size": 64}, "of awq: q_group_size is 64, and group_size is 128"),
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
