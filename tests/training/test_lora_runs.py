"""Runs of `method: lora`: resumed, planned, used by the commands and from Python; and what they refuse in one line."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from data_helpers import message_of
from helpers import run_config, write_model, write_rows

import neuroada_jax as na
from neuroada_jax import cli
from neuroada_jax.adapters import exchange, inspection, native, on_base
from neuroada_jax.core import trees
from neuroada_jax.planning import plan
from neuroada_jax.training import config_file, run

TRAINED = 2 * 2 * ((16 + 16) + (24 + 16))  # two layers, r = 2, q_proj (16, 16) and down_proj (16, 24)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model"), write_rows(folder / "rows.jsonl")


def settings(folder, inputs, **sections):
    made = {"method": "lora", "lora": {"r": 2, "targets": ["q_proj", "down_proj"]}, **sections}
    return run_config(folder, *inputs, **made)


def train(content, **options):
    return run.train(config_file.from_dict(content, "test"), **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, inputs):
    """The folder of a run with checkpoints, that keeps the best of its validations."""
    folder = tmp_path_factory.mktemp("run")
    training = {"steps": 6, "save_every": 3, "validate_every": 3}
    results = train(settings(folder, inputs, data={"validation": 0.25}, training=training))
    assert results["trainable"] == TRAINED and results["method"] == "lora"
    assert results["last_loss"] < results["first_loss"] - 0.1
    return folder


def copy_of(trained, folder):
    """A copy of the run, interrupted after step 3, and its config."""
    content = dataclasses.asdict(config_file.load(str(trained / "out" / "config.yaml")))
    shutil.copytree(trained / "out", folder / "out")
    shutil.rmtree(folder / "out" / "checkpoints" / "6")
    shutil.rmtree(folder / "out" / "adapter")
    (folder / "out" / "results.json").unlink()
    return {**content, "output": str(folder / "out")}


def test_a_resumed_run_is_the_uninterrupted_one(trained, tmp_path):
    train(copy_of(trained, tmp_path), resume=True)
    whole, again = (native.read(str(folder / "out" / "adapter")) for folder in (trained, tmp_path))
    assert len(whole.factors) == 4 and whole.size == TRAINED and all(pair.b.any() for pair in whole.factors.values())
    jax.tree.map(np.testing.assert_array_equal, again.factors, whole.factors)


def test_a_run_does_not_resume_with_another_scale_or_base(trained, tmp_path, inputs):
    content = copy_of(trained, tmp_path)
    other = {**content, "lora": {**content["lora"], "alpha": 3.0}}
    assert "changed: lora.alpha (None then, 3.0 now)" in message_of(train, other, resume=True)
    weights, kept = inputs[0] / "model.safetensors", tmp_path / "kept"
    shutil.copy(weights, kept)
    shutil.copy(write_model(tmp_path / "other", seed=5) / "model.safetensors", weights)
    try:
        assert "cannot resume on another base model" in message_of(train, content, resume=True)
    finally:
        shutil.copy(kept, weights)


def test_commands_take_the_adapter(trained, tmp_path, inputs, capfd):
    adapter, merged = str(trained / "out" / "adapter"), str(tmp_path / "merged")
    assert cli.main(["merge", "--adapter", adapter, "--out", merged]) == 0
    texts = []
    for model in (["--adapter", adapter], ["--model", merged]):
        capfd.readouterr()
        assert cli.main(["generate", *model, "--prompt", "after a,", "--max-new-tokens", "4", "--json"]) == 0
        texts.append(json.loads(capfd.readouterr().out)["generations"])
    assert texts[0] == texts[1]
    assert cli.main(["inspect", adapter]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "total: 288 values in 4 linear maps" in shown and "LoRA r 2, LoRA alpha 4.0" in shown
    assert (
        cli.main(["push", adapter, "ada/own", "--dry-run", "--base-model", "ada/m", "--out", str(tmp_path / "card")]) == 0
    )
    card = " ".join((tmp_path / "card" / "README.md").read_text().split())
    assert "288 trained values (3.2787 % of the model), in low-rank factors with r = 2 and alpha = 4" in card
    assert "--to peft-lora" in card and "k input" not in card
    exchange.export_adapter(adapter, "peft-lora", str(tmp_path / "peft"))
    found = inspection.inspect(str(tmp_path / "peft"), 1)
    assert found["values"] == TRAINED and found["lora"] == {"r": 2, "alpha": 4.0}
    for name in ("official", "peft-shira", "peft-supertuning"):
        assert f"--to {name} has no low-rank factors" in message_of(exchange.export_adapter, adapter, name, merged + name)


def test_from_python_the_weights_are_not_written_to(trained, inputs):
    model = na.load(inputs[0])
    before = jax.tree.map(np.array, model._loaded.params)
    rows = [{"prompt": "after a,", "completion": "b"}] * 4
    options = {"steps": 2, "batch_size": 4, "learning_rate": 0.02, "max_length": 32}
    tuned = na.fine_tune(model, rows, method="lora", lora={"r": 2, "targets": ["q_proj"]}, **options)
    assert repr(tuned).endswith("LoRA r=2, 128 values)")
    again = na.TunedModel(model, native.read(str(trained / "out" / "adapter")))
    held, down = model._params(again.adapter), ("model", "layers", "mlp", "down_proj")
    assert trees.get(held, down)["kernel"] is trees.get(model._loaded.params, down)["kernel"]
    assert np.abs(trees.get(held, down)["lora_b"]).max() > 1e-3
    factors = on_base.load(str(trained / "out" / "adapter"), model._loaded)
    for call in (
        lambda: na.merge(before, factors),
        lambda: na.average([factors]),
        lambda: na.swap(before, {}, {}, factors),
    ):
        assert "has low-rank factors (LoRA) in the place of columns" in message_of(call)
    for each in (tuned, again, model):
        each.generate(["after a,"], max_new_tokens=1)
    jax.tree.map(np.testing.assert_array_equal, model._loaded.params, before)


def test_a_plan_counts_factors(inputs, tmp_path):
    made = plan.plan(config_file.from_dict(settings(tmp_path, inputs), "test"), "cpu")
    assert made.trainable == TRAINED and made.adapter_bytes == 4 * TRAINED


def test_what_does_not_fit_is_one_line(inputs, tmp_path, capsys):
    cases = {
        "lora.r: 17 is more than the rank of model.layers.mlp.down_proj (16, 24); expected at most 16": {"lora": {"r": 17}},
        "lora.targets: 'x_proj' matches no linear map": {"lora": {"targets": ["x_proj"]}},
        "lora.lora_alpha: unknown field; did you mean 'alpha'": {"lora": {"lora_alpha": 8}},
        "lora.lora_dropout: unknown field; known: r, alpha, targets": {"lora": {"lora_dropout": 0.1}},
        "fidelity: official is the published NeuroAda code": {"fidelity": "official"},
        "lora.r: input should be greater than or equal to 1": {"lora": {"r": 0}},
    }
    for message, sections in cases.items():
        found = message_of(lambda sections=sections: train(settings(tmp_path, inputs, **sections)))
        assert message in found, found
    capsys.readouterr()
    sections = {"bypass": {"k": 4, "score": "random"}, "lora": {"r": 2, "targets": ["x_proj"]}}
    message_of(train, settings(tmp_path, inputs, **sections))
    message_of(train, settings(tmp_path, inputs, method="neuroada", bypass={"targets": ["x_proj"]}))
    said = capsys.readouterr().err
    assert "method: lora does not use bypass.k, bypass.score; the section lora counts" in said
    assert "method: neuroada does not use lora.r, lora.targets; the section bypass counts" in said
    assert not (tmp_path / "out").exists()
