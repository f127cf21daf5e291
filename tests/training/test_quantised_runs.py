"""Runs on a quantised base model: trained, resumed, merged and opened again as they were trained."""

import json

import jax
import numpy as np
import pytest
from data_helpers import CHAT
from helpers import run_config, write_model, write_rows
from quantised_files import SIZES

from neuroada_jax.adapters import exchange, native, on_base
from neuroada_jax.core import quantise, quantised, selection, trees
from neuroada_jax.core.bypass import merge
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained import quantization
from neuroada_jax.pretrained.load import load_model
from neuroada_jax.training import config_file, run

FIELDS = {**SIZES, "dtype": "float32"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model", CHAT, **FIELDS), write_rows(folder / "rows.jsonl")


def settings(folder, inputs, held="nf4", **sections):
    sections = {"bypass": {"targets": ["q_proj", "down_proj"], "k": 2}, **sections}
    content = run_config(folder, *inputs, **sections)
    content["model"]["quantization"] = held
    return config_file.from_dict(content, "test")


def losses(config):
    return [json.loads(line)["loss"] for line in (config.directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_trains_resumes_and_merges(tmp_path, inputs):
    config = settings(tmp_path, inputs, training={"save_every": 2, "log_every": 1})
    run.train(config)
    first, adapter = losses(config), native.read(str(config.directory / "adapter"))
    run.train(config, resume=True)
    assert losses(config) == first and len(first) == 3
    assert adapter.metadata["base"]["quantization"] == "nf4"

    base = load_model(str(inputs[0]), quantization_of=quantization.of_adapter(adapter.metadata["base"]))
    merged = on_base.merge(adapter, base)
    weights = load_model(str(inputs[0]), "float32")
    for path, columns in trees.leaves(on_base.stack_layers(adapter, base).columns, "columns"):
        np.testing.assert_array_equal(columns, selection.select(trees.get(weights.params, path)["kernel"], 2))
    exchange.export_adapter(str(config.directory / "adapter"), "huggingface", str(tmp_path / "merged"))
    written = load_model(str(tmp_path / "merged"))
    assert not quantised.holds(written.params)
    dense = quantised.map_quantised(quantised.dequantise, merged)
    jax.tree.map(np.testing.assert_array_equal, written.params, dense)

    for form, least in (("nf4", 0.5), ("int8", 0.9)):
        out = str(tmp_path / form)
        made = exchange.export_adapter(str(config.directory / "adapter"), "huggingface", out, requantise=form)
        stored = load_model(out)
        assert stored.model.quantization == f"stored:{form}" and made["requantised"]["format"] == form
        for path, kernel in trees.kernels(stored.params):
            if quantised.is_quantised(kernel):
                wanted = [quantise.quantise(layer, form) for layer in trees.get(written.params, path)["kernel"]]
                jax.tree.map(np.testing.assert_array_equal, kernel.parts, jax.tree.map(lambda *own: np.stack(own), *wanted))
        found, error = made["requantised"], made["requantised"]["relative_error"]
        assert found["change_kept"] > least and found["unchanged"] < 1 and 0 < error < {"nf4": 0.1, "int8": 0.02}[form]

    with pytest.raises(UserError, match="trained on nf4 weights, and these are int8: --quantization"):
        on_base.stack_layers(adapter, load_model(str(inputs[0]), quantization_of="int8"))
    on_base.stack_layers(native.without_digests(adapter), load_model(str(inputs[0]), quantization_of="int8"))


def test_devices_that_split_codes_by_neuron_train_the_same(tmp_path, inputs):
    found = []
    for name, parallel in (("one", {"mode": "single"}), ("two", {"mode": "jit", "devices": 2, "fsdp": 2})):
        (tmp_path / name).mkdir()
        model = {"path": str(inputs[0]), "quantize_embeddings": True}
        config = settings(tmp_path / name, inputs, model=model, parallel=parallel, training={"log_every": 1})
        run.train(config)
        found.append(losses(config))
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_experts_are_trained_and_merged(tmp_path, inputs):
    sizes = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    model = str(write_model(tmp_path / "experts", CHAT, **{**FIELDS, **sizes, "num_hidden_layers": 1}))
    config = settings(tmp_path, inputs, model={"path": model}, bypass={"targets": ["up_proj", "down_proj"], "k": 2})
    assert run.train(config)["trainable"] == 2 * 4 * (64 + 64)
    adapter = native.read(str(config.directory / "adapter"))
    base = load_model(model, quantization_of=quantization.of_adapter(adapter.metadata["base"]))
    trained, weights = on_base.stack_layers(adapter, base), load_model(model, "float32")
    for path, columns in trees.leaves(trained.columns, "columns"):
        np.testing.assert_array_equal(columns, selection.select(trees.get(weights.params, path)["kernel"], 2))
    exchange.export_adapter(str(config.directory / "adapter"), "huggingface", str(tmp_path / "merged"))
    dense = quantised.map_quantised(quantised.dequantise, base.params)
    jax.tree.map(np.testing.assert_array_equal, load_model(str(tmp_path / "merged")).params, merge(dense, trained))
    with pytest.raises(UserError, match="--requantise: transformers stacks the kernels of experts"):
        exchange.export_adapter(str(config.directory / "adapter"), "huggingface", str(tmp_path / "again"), requantise="nf4")


@pytest.mark.parametrize(
    ("held", "section", "message"),
    [
        ("none", {"select_from": "original"}, "needs weights that are quantised on load"),
        ("int8", {"select_from": "original", "score": "random"}, "needs a score of the weights alone"),
    ],
)
def test_original_weights_that_there_are_not_are_refused(tmp_path, inputs, held, section, message):
    with pytest.raises(UserError, match=message):
        run.prepare(settings(tmp_path, inputs, held, bypass={"k": 1, **section}))
