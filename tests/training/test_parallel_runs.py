"""Whole runs on eight devices, from a config: every mode leaves the same adapter, with its checkpoints and scores."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from helpers import run_config, write_bert, write_config, write_model, write_rows
from test_run_encoder import content, rows, write_lines

from neuroada_jax import cli

SCRIPT = Path(__file__).resolve().parents[2] / "train" / "finetune_pmap.py"
SECTIONS = {"bypass": {"targets": ["q_proj", "down_proj"], "k": 2}, "training": {"steps": 7, "batch_size": 8}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(model directory, file of rows that make an uneven last batch)."""
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model"), write_rows(folder / "rows.jsonl", 21)


def train(folder, inputs, *overrides):
    """The outcome of a run."""
    path = write_config(folder / "run.yaml", run_config(folder, *inputs, **SECTIONS))
    assert cli.main(["train", str(path), *overrides]) == 0
    return outcome(folder / "out")


def outcome(out):
    """(adapter tensors, losses) of the run in a folder."""
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    return safetensors.numpy.load_file(out / "adapter" / "adapter.safetensors"), np.array(losses)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, inputs):
    """The run on one device."""
    return train(tmp_path_factory.mktemp("alone"), inputs)


def assert_equal(found, wanted):
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)
    assert found[0].keys() == wanted[0].keys()
    for name, tensor in wanted[0].items():
        if name.endswith(".columns"):
            np.testing.assert_array_equal(found[0][name], tensor)
        else:
            np.testing.assert_allclose(found[0][name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["shard_map", "pmap", "jit"])
def test_the_adapter_is_that_of_one_device(mode, tmp_path, inputs, alone):
    assert_equal(train(tmp_path, inputs, f"parallel.mode={mode}"), alone)


@pytest.mark.parametrize("method", ["neuroada", "lora"])
def test_a_run_whose_weights_are_shared_is_scored_and_merged_as_on_one_device(method, tmp_path, inputs):
    section = {"sets": [{"name": "held out", "data": str(inputs[1]), "limit": 6, "max_new_tokens": 2}]}
    for name, overrides in {"alone": [], "shared": ["parallel.fsdp=4", "parallel.tensor=2"]}.items():
        (tmp_path / name).mkdir()
        lora = {"r": 2, "targets": SECTIONS["bypass"]["targets"]}
        sections = {**SECTIONS, "method": method, "lora": lora, "evaluation": section, "merge": True}
        path = write_config(tmp_path / name / "run.yaml", run_config(tmp_path / name, *inputs, **sections))
        assert cli.main(["train", str(path), *overrides]) == 0
    alone, shared = tmp_path / "alone" / "out", tmp_path / "shared" / "out"
    assert_equal(outcome(shared), outcome(alone))
    predictions = "predictions-held out-after.jsonl"
    assert (shared / predictions).read_text() == (alone / predictions).read_text()
    merged = [safetensors.numpy.load_file(out / "merged" / "model.safetensors") for out in (alone, shared)]
    for name, tensor in merged[0].items():
        np.testing.assert_allclose(merged[1][name], tensor, rtol=0, atol=1e-4)


def test_the_pmap_script(tmp_path, inputs, alone, monkeypatch):
    path = write_config(tmp_path / "run.yaml", run_config(tmp_path, *inputs, **SECTIONS))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 0
    assert_equal(outcome(tmp_path / "out"), alone)
    assert "mode: pmap" in (tmp_path / "out" / "config.yaml").read_text()


def test_pmap_refuses_rows_that_do_not_divide_before_it_reads_weights(tmp_path, inputs, capsys):
    path = write_config(tmp_path / "run.yaml", run_config(tmp_path, *inputs, training={"batch_size": 12}))
    assert cli.main(["train", str(path), "parallel.mode=pmap"]) == 2
    assert capsys.readouterr().err == (
        "neuroada: error: training.batch_size: 12 examples cannot be divided over 8 devices in 1 micro batch(es) each "
        "(training.accumulation); with parallel.mode: pmap use 8 or 16, or use another mode, which pads the batch\n"
    )
    assert not (tmp_path / "out").exists()


def test_an_encoder_keeps_its_best_epoch_as_on_one_device(tmp_path):
    model = write_bert(tmp_path / "bert")
    config = json.loads((model / "config.json").read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # what is dropped depends on the devices
    (model / "config.json").write_text(json.dumps(config | still))
    files = {
        name: str(write_lines(tmp_path / f"{name}.jsonl", rows(21, seed))) for seed, name in enumerate(["train", "dev"])
    }
    found = []
    for mode in ("single", "shard_map"):
        (tmp_path / mode).mkdir()
        run = content(tmp_path / mode, model, files, training={"batch_size": 5, "epochs": 2}, parallel={"mode": mode})
        assert cli.main(["train", str(write_config(tmp_path / mode / "run.yaml", run))]) == 0
        found.append(outcome(tmp_path / mode / "out"))
    assert_equal(found[1], found[0])


def test_a_run_goes_on_on_another_mesh(tmp_path, inputs, alone):
    """Begun on one device with nothing shared, ended on eight that share the weights, and the other way round."""
    for number, (before, after) in enumerate([([], ["parallel.fsdp=4", "parallel.tensor=2"]), (["parallel.fsdp=8"], [])]):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = write_config(folder / "run.yaml", run_config(folder, *inputs, **SECTIONS))
        assert cli.main(["train", str(path), "training.save_every=4", *before]) == 0
        checkpoints = folder / "out" / "checkpoints"
        shutil.rmtree(checkpoints / "7")  # as if it had ended after step 4
        assert [step.name for step in checkpoints.iterdir()] == ["4"]
        assert cli.main(["train", str(path), "training.save_every=4", "--resume", *after]) == 0
        assert_equal(outcome(folder / "out"), alone)
