"""A sweep: members equal runs of their own, the choice by validation, going on after an end, and bad input."""

import json

import numpy as np
import pytest
from data_helpers import write_lines
from helpers import equations, run_config, write_bert, write_model
from quantised_files import SIZES

from neuroada_jax.adapters import native
from neuroada_jax.pretrained.load import open_with_tokenizer
from neuroada_jax.sweeping import grid, group, stack, starts, sweep
from neuroada_jax.training import config_file, run

RATE = "optimizer.learning_rate"
pytestmark = pytest.mark.filterwarnings("ignore::neuroada_jax.errors.NeuroadaWarning")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"prompt": "after a " * (4 if i % 6 == 0 else 1), "completion": "abcdef"[i % 6]} for i in range(24)]
    return write_model(folder / "model"), write_lines(folder / "rows.jsonl", rows)


def settings(folder, inputs, **sections):
    training = {"steps": 6, "validate_every": 2, **sections.pop("training", {})}
    made = {
        "bypass": {"targets": ["q_proj", "down_proj"], "k": 2},
        "data": {"validation": 0.25, "buckets": [16, 40]},
        **sections,
    }
    return run_config(folder, *inputs, **made, training=training)


def same_as_a_run_of_its_own(folder, content, record):
    """The adapter and the validations of a member are those of `neuroada train` with its values."""
    flat = {"output": str(folder / "own"), **record["fields"]}
    for field, value in flat.items():
        config_file.apply_override(content, f"{field}={json.dumps(value)}")
    config = config_file.from_dict(content, "own")
    results = run.train(config, overwrite=True)
    own = native.read(str(config.directory / "adapter"))
    member = grid.Member(record["fields"], config)
    swept = native.read(str(folder / "out" / "members" / member.name / "adapter"))
    assert own.values.keys() == swept.values.keys() and own.dense_parameters.keys() == swept.dense_parameters.keys()
    for name, values in own.values.items():
        np.testing.assert_array_equal(own.columns[name], swept.columns[name])
        assert np.abs(values).max() > 1e-3
        np.testing.assert_allclose(swept.values[name], values, atol=1e-5, rtol=0)
    assert own.factors.keys() == swept.factors.keys()
    for name, pair in own.factors.items():
        assert np.abs(pair.b).max() > 1e-3
        for leaf, other in zip(swept.factors[name], pair, strict=True):
            np.testing.assert_allclose(leaf, other, atol=1e-5, rtol=0)
    for name, values in own.dense_parameters.items():
        np.testing.assert_allclose(swept.dense_parameters[name], values, atol=1e-5, rtol=0)
    lines = [line for line in results["validation"]["steps"] if line["step"]]
    assert [line["step"] for line in lines] == [line["step"] for line in record["steps"]]
    np.testing.assert_allclose([line["value"] for line in record["steps"]], [line["value"] for line in lines], atol=1e-5)
    assert record["best_step"] == results["validation"]["best_step"]
    assert record["trained"] == results["trainable"]
    assert record["scores"].keys() == results["after"].keys()
    for name, score in record["scores"].items():
        assert score["value"] == pytest.approx(results["after"][name]["value"], abs=1e-5)


@pytest.mark.parametrize("turns", [pytest.param(True, marks=pytest.mark.slow), False], ids=["in turns", "vmapped"])
def test_members_of_a_decoder_equal_runs_of_their_own(tmp_path, inputs, turns, monkeypatch):
    monkeypatch.setattr(stack, "in_turns", lambda: turns)
    connections = {"targets": ["q_proj", "down_proj"], "score": "random"}  # which depend on the seed
    content = settings(
        tmp_path, inputs, bypass=connections
    )  # batches of two lengths, which the seeds meet at different steps
    axes = {
        RATE: [0.02, 0.3],
        "optimizer.schedule": ["linear", "cosine"],
        "seed": [42, 4_000_000_000],
        "bypass.k": [1, 3] if turns else [2],  # two programs, or one in the faster case
    }
    found = sweep.sweep(content, axes)
    kinds = len(axes["bypass.k"])
    assert len(found["members"]) == 8 * kinds and len(found["plan"]) == kinds and found["plan"][0]["members"] == 8
    ends = [found["members"][0], found["members"][-1]]
    for record in ends:
        same_as_a_run_of_its_own(tmp_path, json.loads(json.dumps(content)), record)


@pytest.mark.parametrize("turns", [True, False], ids=["in turns", "vmapped"])
def test_members_of_lora_equal_runs_of_their_own(tmp_path, inputs, turns, monkeypatch):
    monkeypatch.setattr(stack, "in_turns", lambda: turns)
    lora = {"r": 3, "targets": ["q_proj"]}
    content = settings(tmp_path, inputs, method="lora", lora=lora, training={"steps": 4})
    content["data"]["buckets"] = [40]
    found = sweep.sweep(content, {"lora.alpha": [2.0, 8.0], "seed": [1, 2]})
    assert [need["members"] for need in found["plan"]] == [4]
    same_as_a_run_of_its_own(tmp_path, json.loads(json.dumps(content)), found["members"][-1])


@pytest.mark.slow
@pytest.mark.parametrize("turns", [True, False], ids=["in turns", "vmapped"])
def test_members_on_a_quantised_base_equal_runs_of_their_own(tmp_path, inputs, turns, monkeypatch):
    monkeypatch.setattr(stack, "in_turns", lambda: turns)
    model = write_model(tmp_path / "model", **{**SIZES, "dtype": "float32"})
    sets = {"before": False, "sets": [{"name": "same", "data": str(inputs[1]), "max_new_tokens": 2}]}
    content = settings(tmp_path, (model, inputs[1]), training={"steps": 4}, evaluation=sets)
    content["model"]["quantization"] = "nf4"
    content["data"]["buckets"] = [40]
    found = sweep.sweep(content, {"bypass.score": ["magnitude", "random"], RATE: [0.02, 0.05]})
    assert [need["members"] for need in found["plan"]] == [4]
    for record in (found["members"][1], found["members"][2]):
        same_as_a_run_of_its_own(tmp_path, json.loads(json.dumps(content)), record)


def test_both_methods_are_one_field(tmp_path, inputs):
    content = settings(tmp_path, inputs, bypass={"targets": ["q_proj"], "k": 3}, training={"steps": 2})
    content |= {"lora": {"targets": ["q_proj"]}, "data": {**content["data"], "buckets": [40]}}
    found = sweep.sweep(content, {"method": ["neuroada", "lora"]})
    assert [record["trained"] for record in found["members"]] == [2 * 16 * 3, 2 * 8 * 32]


@pytest.mark.slow
def test_members_of_an_encoder_have_their_seeds_dropout_and_classifier(tmp_path):
    model = write_bert(tmp_path / "bert")
    rows = [{"sentence1": "abcdef"[i % 6] * (1 + i % 9), "sentence2": "b", "label": i % 2, "idx": 0} for i in range(40)]
    train, dev = write_lines(tmp_path / "train.jsonl", rows[:28]), str(write_lines(tmp_path / "dev.jsonl", rows[28:]))
    data = {"task": "mrpc", "validation": dev, "max_length": 40}
    sets = {"sets": [{"name": "dev", "data": dev}], "before": False}
    content = run_config(tmp_path, model, train, data=data, bypass={"k": 2, "targets": ["query"]}, evaluation=sets)
    for buckets, groups in (([24], 1), (None, 2)):  # with one shape, the seeds share a program
        content["data"]["buckets"] = buckets
        found = sweep.sweep(content, {"seed": [1, 2], RATE: [0.02, 0.01]}, overwrite=True)
        assert len(found["plan"]) == groups
        for record in (found["members"][0], found["members"][-1]):
            same_as_a_run_of_its_own(tmp_path, json.loads(json.dumps(content)), record)


def begin(content, axes):
    """The members of a config before their first step, and the frozen weights."""
    members = grid.members(config_file.from_dict(content, "test"), axes, "test")
    model = open_with_tokenizer(content["model"]["path"], "auto")
    rows = starts.prepare(members, model)
    return starts.begin(members, rows, model[0].load())


@pytest.mark.parametrize("turns", [True, False], ids=["in turns", "vmapped"])
def test_the_step_keeps_the_weights_once_and_forms_no_dense_gradient(tmp_path, inputs, turns):
    members, layers, outputs, width = 5, 2, 24, 16
    content = settings(tmp_path, inputs, bypass={"targets": ["gate_proj"], "k": 2})
    weights, begun = begin(content, {RATE: [0.1 * (i + 1) for i in range(members)]})
    traced = group.Group(begun, group.Programs(begun[0], weights.base_model.model, turns)).trace(weights.params)
    made = [(each.primitive.name, out.aval.shape) for each in equations(traced.jaxpr.jaxpr) for out in each.outvars]
    shapes = [shape for _, shape in made]
    assert (members, layers, outputs, width) not in shapes  # the weights of every member
    assert ((members, outputs, width) in shapes) is not turns  # W + D of one layer, of all members
    dense = {(members, outputs, width), (outputs, width), (members, width, outputs), (width, outputs)}
    assert not dense & {shape for name, shape in made if name == "dot_general"}
