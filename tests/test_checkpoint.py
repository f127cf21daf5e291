"""Resuming a run: what comes after the newest checkpoint is what would have come without the stop."""

import json

import numpy as np
import pytest
from helpers import run_config, write_model, write_rows

from neuroada_jax import bypass, checkpoint, weights
from neuroada_jax.errors import UserError
from neuroada_jax.formats import native
from neuroada_jax.models import names
from neuroada_jax.training import config, connections, run

SETTINGS = {"targets": ["q_proj"], "k": 2}
PATHS = [("model", "layers", "self_attn", "q_proj")]
TRAINING = {"steps": 6, "save_every": 2, "log_every": 3, "batch_size": 4, "remat": "none"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model"), write_rows(folder / "rows.jsonl")


def settings(folder, inputs, packing=False, **training):
    data = {"packing": packing, "max_length": 32}
    return config.from_dict(run_config(folder, *inputs, bypass=SETTINGS, data=data, training=TRAINING | training), "test")


def lines(folder):
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def train_until(step, settings, monkeypatch):
    """A run that is interrupted right after the checkpoint of `step`."""
    save = checkpoint.Checkpoints.save

    def save_and_stop(self, state):
        save(self, state)
        if int(state.step) == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run.train(settings)


@pytest.mark.parametrize("packing", [False, True])
def test_stop_and_resume_equals_one_run(tmp_path, inputs, monkeypatch, packing):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    results = run.train(settings(whole, inputs, packing))
    train_until(4, settings(parted, inputs, packing), monkeypatch)
    assert not (parted / "out" / "adapter").exists()
    resumed = run.train(settings(parted, inputs, packing), resume=True)

    assert lines(parted) == lines(whole) and [line["step"] for line in lines(parted)] == [1, 2, 3, 4, 5, 6]
    assert resumed["last_loss"] == results["last_loss"] and resumed["first_loss"] == results["first_loss"]
    a, b = (native.read(str(folder / "out" / "adapter")) for folder in (whole, parted))
    assert all(np.array_equal(a.values[module], b.values[module]) for module in a.values)
    assert any(leaf.any() for leaf in a.values.values())


def test_what_cannot_be_resumed_is_refused(tmp_path, inputs, monkeypatch):
    with pytest.raises(UserError, match="holds no run to resume"):
        run.train(settings(tmp_path, inputs), resume=True)
    train_until(2, settings(tmp_path, inputs), monkeypatch)
    with pytest.raises(UserError, match=r"use --overwrite to replace it, --resume to go on"):
        run.train(settings(tmp_path, inputs))
    with pytest.raises(UserError, match=r"changed: training\.batch_size \(4 then, 8 now\)"):
        run.train(settings(tmp_path, inputs, batch_size=8), resume=True)
    with pytest.raises(UserError, match="not both"):
        run.train(settings(tmp_path, inputs), overwrite=True, resume=True)


def test_a_run_without_checkpoints_says_so(tmp_path, inputs):
    run.train(settings(tmp_path, inputs, save_every=None, steps=1))
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        run.train(settings(tmp_path, inputs, save_every=None, steps=1), resume=True)


def test_resuming_keeps_the_connections_that_were_chosen(tmp_path, inputs, monkeypatch):
    """Those of a gradient pass are not computed again: the sums might round another way."""
    content = run_config(tmp_path, *inputs, bypass=SETTINGS | {"score": "gradient"}, training=TRAINING)
    chosen = config.from_dict(content, "test")
    train_until(4, chosen, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(connections, "gradient_sums", None)
        run.train(chosen, resume=True)
    resumed = native.read(str(tmp_path / "out" / "adapter"))
    results = run.train(chosen, overwrite=True)
    whole = native.read(str(tmp_path / "out" / "adapter"))
    assert whole.metadata["rule"] == resumed.metadata["rule"] == "gradient"
    base = weights.load_model(str(inputs[0]))
    by_magnitude = dict(names.unstacked(bypass.build(base.params, PATHS, 2).columns, base.model.stack))
    assert any((whole.columns[module] != by_magnitude[module]).any() for module in whole.columns)
    for module, columns in whole.columns.items():
        np.testing.assert_array_equal(resumed.columns[module], columns)
        np.testing.assert_array_equal(resumed.values[module], whole.values[module])
    assert results["first_loss"] != results["last_loss"]
