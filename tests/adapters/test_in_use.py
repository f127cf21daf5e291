"""An adapter that is used, not exported: the weights are in memory once, whatever it is made of and wherever it is used."""

import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import run_config, write_bert, write_model, write_rows

from neuroada_jax import cli
from neuroada_jax.adapters import native, on_base
from neuroada_jax.adapters.factors import LoraOptions
from neuroada_jax.commands import shared
from neuroada_jax.core import bypass, low_rank, trees
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.generation.generate import Ending, generate
from neuroada_jax.models import dense_modules, match_targets, unrolled
from neuroada_jax.pretrained import save as checkpoint
from neuroada_jax.pretrained.load import load_model, open_model
from neuroada_jax.sweeping.sweep import sweep
from neuroada_jax.training import config_file, run

KINDS = ("connections", "shared columns", "factors")
BASES = {"float32": {}, "bfloat16": {"dtype": "bfloat16"}, "int8": {"quantization_of": "int8"}}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Directories of a decoder and of a BERT."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "decoder": write_model(folder / "decoder", hidden_size=64, intermediate_size=64),
        "encoder": write_bert(folder / "encoder"),
    }


def save(folder, base, kind):
    """Write an adapter of random numbers, with a classifier if there is one."""
    params, paths = base.params, match_targets(base.params, list(base.model.architecture.targets), base.model.layers_path)
    if kind == "factors":
        built = low_rank.build(params, paths, 2, 0.5, jax.random.key(0))
        selection = native.Selection(None, [], rule=None, lora=LoraOptions(2, 1.0))
    else:
        options = native.SelectionOptions(shared_columns=kind == "shared columns")
        built = bypass.build(params, paths, 3, shared=options.shared_columns)
        selection = native.Selection(3, [], options=options)
    rng = np.random.default_rng(0)
    noise = lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32))  # noqa: E731
    own = Bypass(jax.tree.map(noise, built.values), built.columns)
    dense = base.model.architecture.classifier or []
    _, classifier = dense_modules.split(params, dense) if dense else ({}, {})
    on_base.save(folder, own, base, selection, classifier=jax.tree.map(noise, classifier))
    return native.read(str(folder))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name, base, apart",
    [
        ("decoder", "float32", False),
        ("decoder", "int8", True),
        ("encoder", "bfloat16", True),
    ],
)
def test_a_command_holds_the_weights_once(name, kind, base, apart, directories, tmp_path, monkeypatch):
    labels = ["no", "yes"] if name == "encoder" else None
    model = load_model(str(directories[name]), labels=labels, **BASES[base])
    adapter = save(tmp_path / "adapter", model, kind)
    expected = on_base.merge(adapter, model)
    expected = jax.tree.map(np.asarray, expected) if kind != "factors" else None
    del model
    gc.collect()
    before = sum(leaf.nbytes for leaf in jax.live_arrays())
    monkeypatch.setattr(unrolled, "preferred", lambda depth: apart)
    opened = open_model(str(directories[name]), labels=labels, **BASES[base])
    loaded, params = shared.load_params(opened, adapter)
    gc.collect()
    held = sum(leaf.nbytes for leaf in jax.live_arrays()) - before
    kernels = sum(leaf.nbytes for _, kernel in trees.kernels(params) for leaf in jax.tree.leaves(kernel))
    assert held <= sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + kernels / 20  # the classifier of the base
    if expected is None:
        own = on_base.stack_layers(adapter, loaded)
        for path, a in trees.leaves(own.values, "lora_a"):
            np.testing.assert_array_equal(unrolled.stacked(trees.get(params, path))["lora_a"], a)
    else:
        jax.tree.map(np.testing.assert_array_equal, unrolled.stacked(params), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_connections_are_put_in_place(dtype):
    params = {"map": {"kernel": jnp.ones((4, 128, 128), dtype)}}
    compiled = on_base._merge_one.lower(params, bypass.build(params, [("map",)], 1)).compile().memory_analysis()
    assert compiled.alias_size_in_bytes == params["map"]["kernel"].nbytes
    if dtype == jnp.float32:  # XLA's CPU backend widens bfloat16
        assert compiled.temp_size_in_bytes < 0.2 * params["map"]["kernel"].nbytes


@pytest.mark.parametrize("base", ["float32", "int8"])
def test_a_decoder_continues_as_merged_where_its_layers_lie_apart(base, directories, tmp_path, monkeypatch):
    adapter = save(tmp_path / "adapter", load_model(str(directories["decoder"]), **BASES[base]), "factors")
    made = []
    for put_in, apart in ((on_base.merge, False), (on_base.tuned, False), (on_base.tuned, True)):
        monkeypatch.setattr(unrolled, "preferred", lambda _, apart=apart: apart)
        model = load_model(str(directories["decoder"]), **BASES[base])
        params = unrolled.apart(put_in(adapter, model), model.model.layers_path)
        assert unrolled.is_apart(params) is apart
        made.append([each.ids for each in generate(model.model, params, [[1, 5, 9], [7, 8]], Ending(), max_new_tokens=8)])
    assert made[0] == made[1] == made[2] and len(made[0][0]) == 8


@pytest.fixture
def formed(monkeypatch):
    """The shapes of the kernels to which B A has been added."""
    shapes, add = [], low_rank.merge_kernel

    def watched(kernel, *factors):
        shapes.append(kernel.shape)
        return add(kernel, *factors)

    monkeypatch.setattr(low_rank, "merge_kernel", watched)
    return shapes


@pytest.fixture
def settings(tmp_path, directories):
    """(held, sections) -> a config that trains factors and scores three rows."""
    rows = write_rows(tmp_path / "rows.jsonl")

    def made(held, **sections):
        sections["evaluation"] = {"sets": [{"name": "own", "data": str(rows), "limit": 3}], **sections["evaluation"]}
        common = {"method": "lora", "lora": {"r": 2}, "model": {"quantization": held}}
        return run_config(tmp_path, directories["decoder"], rows, **common, **sections)

    return made


def test_factors_on_codes_are_scored_as_they_are_trained(settings, tmp_path, formed, capfd):
    training = {"steps": None, "epochs": 1, "batch_size": 8}
    content = settings("nf4", training=training, evaluation={"best_epoch": "own", "before": False})
    results = run.train(config_file.from_dict(content, "test"))
    assert results["after"]["own"]["n"] == 1  # two of the three rows choose the epoch
    adapter, rows = str(tmp_path / "out" / "adapter"), content["data"]["train"]
    for command in (["evaluate", "--data", rows, "--limit", "3"], ["generate", "--prompt", "after a,"]):
        capfd.readouterr()
        assert cli.main([*command, "--adapter", adapter, "--max-new-tokens", "2", "--json"]) == 0
        assert json.loads(capfd.readouterr().out)
    assert not formed


@pytest.mark.filterwarnings("ignore:data.validation")  # few rows choose
def test_factors_are_merged_where_the_model_is_written_alone(settings, tmp_path, formed):
    training = {"steps": 2, "validate_every": 2}
    content = settings("none", training=training, data={"validation": 0.25}, evaluation={"before": False})
    found = sweep({**content, "output": str(tmp_path / "sweep")}, {"optimizer.learning_rate": [0.02]})
    assert found["best"]["scores"]["own"]["n"] == 3
    content["training"]["validation_samples"] = 1
    run.train(config_file.from_dict(content, "test"))
    assert not formed
    run.train(config_file.from_dict({**content, "merge": True, "output": str(tmp_path / "merging")}, "test"))
    assert len(formed) == 2 * 7 and {len(shape) for shape in formed} == {2}  # a map of a layer at a time
    base = load_model(content["model"]["path"])
    expected = on_base.merge(native.read(str(tmp_path / "merging" / "adapter")), base)
    jax.tree.map(np.testing.assert_array_equal, load_model(str(tmp_path / "merging" / "merged")).params, expected)


@pytest.mark.parametrize("base", BASES)
def test_a_saved_model_has_the_factors_of_experts_merged_in(base, tmp_path):
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "architectures": ["MixtralForCausalLM"]}
    directory = str(write_model(tmp_path / "model", model_type="mixtral", **experts))
    model = load_model(directory, **BASES[base])
    adapter = save(tmp_path / "adapter", model, "factors")
    checkpoint.save(tmp_path / "at-once", model, on_base.merge(adapter, model), None)
    checkpoint.save(tmp_path / "in-turn", model, on_base.tuned(adapter, model), None)
    files = [tmp_path / name / "model.safetensors" for name in ("at-once", "in-turn")]
    found, expected = (safetensors.numpy.load_file(file) for file in files)
    assert len(found) == len(expected) > 20
    jax.tree.map(np.testing.assert_array_equal, found, expected)
