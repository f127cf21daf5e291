"""One batch on eight devices: every form of the step gives what one device gives, and bad input."""

import jax
import numpy as np
import pytest
import test_step as decoder
import test_step_encoder as encoder
from data_helpers import message_of

from neuroada_jax import ops
from neuroada_jax.losses import classification_losses, target_losses
from neuroada_jax.models import Remat
from neuroada_jax.training import parallel, step
from neuroada_jax.training.config import ParallelSection, TrainingSection

STEPS = 10
FORMS = {
    "shard_map": {"mode": "shard_map"},
    "pmap": {"mode": "pmap"},
    "two devices": {"mode": "shard_map", "devices": 2},
}
SINGLE = {"mode": "single"}


def rows_of(batch, empty):
    """The batch with its last rows as the last batch of an epoch has them."""
    for leaf in batch:
        if leaf is not None:
            leaf[len(leaf) - empty :] = 0
    return batch


def train(form, make_state, module, transformation, batches, losses=target_losses, dropout_seed=None, accumulation=1):
    """(losses of the steps, gradient norms, trained tree, targets of the last step) of a run on the devices of `form`."""
    devices = parallel.resolve(ParallelSection(**form))
    rows = batches[0].input_ids.shape[0]
    training = TrainingSection(steps=STEPS, batch_size=rows, accumulation=accumulation)
    state = devices.place(make_state())
    run_step = devices.make_step(module, transformation, training, losses, dropout_seed)
    history = []
    for batch in batches:
        state, metrics = run_step(state, batch)
        history.append([float(each) for each in metrics])
    assert int(state.step) == len(batches)
    return np.array(history), jax.tree.map(np.asarray, devices.local(state.trainable))


def assert_equal(found, wanted):
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[0][:, 2], wanted[0][:, 2])  # the targets counted
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), found[1], wanted[1])
    assert all(leaf.any() for leaf in jax.tree.leaves(found[1]))


def train_decoder(form, rows=16, accumulation=1, k=3, remat=Remat.NONE):
    model, transformation, _ = decoder.compiled()
    batches = [rows_of(decoder.random_batch(rows, seed=number % 3), 5 * (number % 3 == 2)) for number in range(STEPS)]
    make_state = lambda: decoder.fresh(model, transformation, decoder.ALL, k)[1]  # noqa: E731
    return train(form, make_state, model.module(remat), transformation, batches, accumulation=accumulation)


@pytest.fixture(scope="module")
def one_device():
    """What one device makes of the decoder's batches."""
    return train_decoder(SINGLE)


@pytest.mark.parametrize("form", FORMS)
def test_a_decoder_trains_as_on_one_device(form, one_device):
    assert_equal(train_decoder(FORMS[form]), one_device)


@pytest.mark.parametrize("form", ["shard_map", "pmap"])
def test_accumulation_and_remat_on_top(form, one_device):
    assert_equal(train_decoder(FORMS[form], accumulation=2, remat=Remat.FULL), one_device)


def test_rows_that_do_not_divide_are_filled_up(capsys):
    """12 rows in two parts on each of 8 devices: 16, of which the last two devices have none."""
    alone = train_decoder(SINGLE, rows=12)
    assert_equal(train_decoder(FORMS["shard_map"], rows=12, accumulation=2), alone)
    assert "12 rows on 8 devices: 4 empty rows fill every batch up to 16" in capsys.readouterr().err


@pytest.mark.parametrize("algorithm", [ops.GradientAlgorithm.ROW_BLOCKS, ops.GradientAlgorithm.COLUMN_GATHER])
def test_every_algorithm_of_the_op_is_summed_once(algorithm, one_device, monkeypatch):
    monkeypatch.setattr(ops, "choose_algorithm", lambda *_: algorithm)
    assert_equal(train_decoder(FORMS["shard_map"]), one_device)


def train_encoder(form, dropout, rows=16, seed=7):
    model, transformation, make_state = encoder.setup("bert", dropout=dropout)
    batches = [rows_of(encoder.random_batch(rows, seed=number % 3), 3 * (number % 3 == 2)) for number in range(4)]
    seed = seed if dropout else None
    return train(form, make_state, model.module(), transformation, batches, classification_losses, seed)


def test_an_encoder_with_its_head_trains_as_on_one_device():
    alone = train_encoder(SINGLE, 0.0)
    for form in ("shard_map", "pmap"):
        assert_equal(train_encoder(FORMS[form], 0.0), alone)


def test_with_dropout_all_forms_on_eight_devices_agree():
    wanted = train_encoder(FORMS["shard_map"], 0.3)
    assert_equal(train_encoder(FORMS["pmap"], 0.3), wanted)


def test_every_device_drops_something_else():
    """One row eight times over: without that, all devices would have the same loss, and the mean would be one of them."""
    model, transformation, make_state = encoder.setup("bert", dropout=0.5)
    one = encoder.random_batch(1)
    state, sums = make_state(), step.make_sums(model.module(), 1, classification_losses, 3)
    one_shard = jax.jit(lambda shard: sums(state, one, shard).loss)
    each = [float(one_shard(np.int32(shard))) for shard in range(8)]
    assert len(set(each)) == 8
    eight = jax.tree.map(lambda leaf: np.repeat(leaf, 8, axis=0), one)
    found = train(FORMS["shard_map"], make_state, model.module(), transformation, [eight], classification_losses, 3)
    assert found[0][0, 0] == pytest.approx(np.mean(each), rel=1e-5)


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_the_state_is_donated_on_every_device(mode):
    model, transformation, _ = decoder.compiled()
    devices = parallel.resolve(ParallelSection(mode=mode))
    state = devices.place(decoder.fresh(model, transformation)[1])
    run_step = devices.make_step(model.module(), transformation, TrainingSection(steps=1, batch_size=8))
    new, _ = run_step(state, decoder.random_batch(8))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.trainable, state.optimizer)))
    assert all(leaf.sharding.device_set == set(jax.devices()) for leaf in jax.tree.leaves(new))


def found(platform="cpu", available=8, **section):
    return parallel.layout(ParallelSection(**section), platform, available)


def test_what_auto_takes():
    assert found("gpu", 4) == ("shard_map", (4, 1, 1))
    assert found("gpu", 1) == ("single", (1, 1, 1))
    assert found("gpu", 4, devices=1) == ("single", (1, 1, 1))
    assert found("cpu", 8) == ("single", (1, 1, 1))  # CPU devices are several only to try things
    assert found("cpu", 8, devices=4) == ("shard_map", (4, 1, 1))
    assert found("cpu", 8, fsdp=2) == ("jit", (4, 2, 1))


def test_meshes():
    assert found(mode="jit") == ("jit", (8, 1, 1))
    assert found(mode="jit", fsdp=2, tensor=2) == ("jit", (2, 2, 2))
    assert found(mode="jit", devices=6, fsdp=3) == ("jit", (2, 3, 1))
    assert found(mode="pmap", available=1) == ("pmap", (1, 1, 1))
    devices = parallel.resolve(ParallelSection(mode="jit", devices=6, fsdp=3))
    assert dict(devices.mesh.shape) == {"data": 2, "fsdp": 3, "tensor": 1} and devices.shards == 6


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"devices": 9}, "parallel: a mesh of 9 devices, but there are 8 (cpu)"),
        ({"fsdp": 4, "tensor": 4}, "parallel: 4 x 4, a mesh of 16 devices, but there are 8 (cpu)"),
        ({"fsdp": 3}, "parallel: 3 x 1, fsdp times tensor, does not divide 8 devices"),
    ],
)
def test_a_mesh_that_cannot_be(section, message):
    assert message_of(parallel.resolve, ParallelSection(**section)) == message


@pytest.mark.parametrize(
    ("rows", "accumulation", "take"), [(12, 1, "8 or 16"), (4, 1, "8"), (20, 2, "16 or 32"), (17, 1, "16 or 24")]
)
def test_pmap_refuses_rows_that_do_not_divide(rows, accumulation, take):
    devices = parallel.resolve(ParallelSection(mode="pmap"))
    training = TrainingSection(steps=1, batch_size=rows, accumulation=accumulation)
    assert f"with parallel.mode: pmap take {take}, or another mode" in message_of(devices.filled_rows, training)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"mode": "pmap", "fsdp": 2}, "parallel.mode: found 'pmap', but fsdp and tensor need jit"),
        ({"mode": "single", "devices": 2}, "parallel.devices: found 2, but mode single means one"),
    ],
)
def test_sections_that_contradict_themselves(section, message):
    with pytest.raises(ValueError, match=message):
        ParallelSection(**section)
