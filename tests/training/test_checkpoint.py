"""Checkpoints, whole and damaged; and resuming: what comes after one is what would have come without the stop."""

import json
import os
import resource
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from data_helpers import message_of
from helpers import run_config, write_model, write_rows

from neuroada_jax.adapters import native
from neuroada_jax.core import bypass
from neuroada_jax.errors import NeuroadaWarning, UserError
from neuroada_jax.models import names
from neuroada_jax.pretrained.load import load_model
from neuroada_jax.training import checkpoint, config_file, run, statistics, step
from neuroada_jax.training.checkpoint import Checkpoints

SETTINGS = {"targets": ["q_proj"], "k": 2}
PATHS = [("model", "layers", "self_attn", "q_proj")]
TRAINING = {"steps": 6, "save_every": 2, "log_every": 3, "batch_size": 4, "remat": "none"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model"), write_rows(folder / "rows.jsonl")


def settings(folder, inputs, packing=False, bypass=SETTINGS, **training):
    data = {"packing": packing, "max_length": 32}
    return config_file.from_dict(
        run_config(folder, *inputs, bypass=bypass, data=data, training=TRAINING | training), "test"
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def train_until(step, settings, monkeypatch):
    """A run that is interrupted right after the checkpoint of `step`."""
    save = checkpoint.Checkpoints.save

    def save_and_stop(self, state, *about):
        save(self, state, *about)
        if int(state.step) == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run.train(settings)


@pytest.mark.parametrize("packing", [False, True])
def test_stop_and_resume_equals_one_run(tmp_path, inputs, monkeypatch, packing):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    bypass = {**SETTINGS, "score": "random", "random_over": "block"} if packing else SETTINGS
    results = run.train(settings(whole, inputs, packing, bypass))
    train_until(4, settings(parted, inputs, packing, bypass), monkeypatch)
    assert not (parted / "out" / "adapter").exists()
    resumed = run.train(settings(parted, inputs, packing, bypass), resume=True)

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
    chosen = config_file.from_dict(content, "test")
    train_until(4, chosen, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "gradient_sums", None)
        run.train(chosen, resume=True)
    resumed = native.read(str(tmp_path / "out" / "adapter"))
    results = run.train(chosen, overwrite=True)
    whole = native.read(str(tmp_path / "out" / "adapter"))
    assert whole.metadata["rule"] == resumed.metadata["rule"] == "gradient"
    base_model = load_model(str(inputs[0]))
    by_magnitude = dict(names.unstacked(bypass.build(base_model.params, PATHS, 2).columns, base_model.model.layers_path))
    assert any((whole.columns[module] != by_magnitude[module]).any() for module in whole.columns)
    for module, columns in whole.columns.items():
        np.testing.assert_array_equal(resumed.columns[module], columns)
        np.testing.assert_array_equal(resumed.values[module], whole.values[module])
    assert results["first_loss"] != results["last_loss"]


# The checkpoints by themselves, of a state without a model around it.


def state_after(steps, neurons=32):
    """A state with random values, another one for every number of steps."""
    params = {"linear": {"kernel": jax.random.normal(jax.random.key(0), (neurons, 128))}}
    built = bypass.build(params, [("linear",)], 64)
    state = step.initial_state(params, built, optax.adam(0.1))
    values = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(steps), leaf.shape), state.trainable)
    return state._replace(step=jnp.int32(steps), trainable=values)


def save_steps(folder, *steps, **options):
    with Checkpoints(folder, **options) as checkpoints:
        for each in steps:
            checkpoints.save(state_after(each), {"losses": each})


def kept(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def assert_goes_on_from(folder, want):
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.newest.step == want and checkpoints.newest.about["losses"] == want
        state = checkpoints.restore(state_after(0))
        assert jax.tree.all(jax.tree.map(jnp.array_equal, checkpoint.saved(state), checkpoint.saved(state_after(want))))
        merged = bypass.merge(state_after(0).params, state.bypass)["linear"]["kernel"]
        np.testing.assert_array_equal(state.params["linear"]["kernel"], merged)


def test_the_newest_and_the_best_stay(tmp_path):
    with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        for each, merit in ((1, -3.0), (2, None), (3, -1.0), (4, None), (5, -2.0), (6, -4.0)):
            checkpoints.save(state_after(each), {}, merit)
        checkpoints.save(state_after(6), {}, 0.0)  # is there already
    assert kept(tmp_path) == [3, 5, 6]
    save_steps(tmp_path, 7)
    assert kept(tmp_path) == [6, 7]


def delete(path):
    path.unlink()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", [delete, truncate, flip])
@pytest.mark.parametrize("which", ["about.json", "digests.json", "state/manifest.ocdbt", "state/_METADATA", "arrays"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage, which):
    save_steps(tmp_path, 2, 4)
    newest = tmp_path / "4"
    damage(largest(newest) if which == "arrays" else newest / which)
    with pytest.warns(NeuroadaWarning, match=r"4.*: skipped"):
        assert_goes_on_from(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"2", "4.damaged"}
    save_steps(tmp_path, 4)
    assert_goes_on_from(tmp_path, 4)


def test_no_whole_checkpoint(tmp_path):
    save_steps(tmp_path, 2)
    (tmp_path / "2" / "digests.json").unlink()
    with (
        pytest.warns(NeuroadaWarning, match="2: damaged, digests.json is missing: skipped"),
        Checkpoints(tmp_path) as checkpoints,
    ):
        assert message_of(checkpoints.restore, state_after(0)) == f"{tmp_path}: no checkpoint to resume from"


def test_a_checkpoint_of_another_version(tmp_path, monkeypatch):
    save_steps(tmp_path, 2)
    monkeypatch.setattr(checkpoint, "FORMAT", 4)
    assert message_of(lambda: Checkpoints(tmp_path).newest) == f"{tmp_path}/2: expected checkpoint format 4, found 3"
    (tmp_path / "2" / "default").mkdir()
    assert "found 1, which an older version wrote" in message_of(lambda: Checkpoints(tmp_path).newest)


def test_a_checkpoint_of_another_shape(tmp_path):
    save_steps(tmp_path, 2)
    with Checkpoints(tmp_path) as checkpoints:
        message = message_of(checkpoints.restore, state_after(0, neurons=16))
    start = f"{tmp_path}/2: this checkpoint is of another model or config: columns.linear.columns: expected int32[16,64]"
    assert message == f"{start}, found int32[32,64]"


@pytest.mark.parametrize("limit", [2000, 6000])
def test_a_full_disk(tmp_path, limit):
    """As far as a process may write: what is beyond is refused by the system, as by a disk without room."""
    save_steps(tmp_path, 2)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            message = message_of(lambda: (checkpoints.save(state_after(4), {"losses": 4}), checkpoints.wait()))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert message == (
        f"{tmp_path}/4: the checkpoint cannot be saved (File too large); the newest that is saved is that of step 2"
    )
    assert_goes_on_from(tmp_path, 2)
    save_steps(tmp_path, 4)
    assert kept(tmp_path) == [2, 4]


@pytest.fixture
def as_nobody():
    """Root may write everywhere, so the test is somebody else for a while; a folder that this one can reach."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        user = os.geteuid()
        yield Path(name), lambda: os.seteuid(65534 if user == 0 else user)
        os.seteuid(user)


def test_a_read_only_folder(as_nobody):
    folder, become_nobody = as_nobody
    folder /= "checkpoints"
    save_steps(folder, 2)
    folder.chmod(0o555)
    become_nobody()
    with Checkpoints(folder) as checkpoints:
        message = message_of(lambda: (checkpoints.save(state_after(4)), checkpoints.wait()))
    assert message == (
        f"{folder}/4: the checkpoint cannot be saved (Permission denied); the newest that is saved is that of step 2"
    )
    assert_goes_on_from(folder, 2)
    os.seteuid(os.getuid())
    folder.chmod(0o755)
