"""One batch on eight devices: every form of the step gives what one device gives, and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step as decoder
import test_step_encoder as encoder
from data_helpers import message_of
from helpers import CONFIG, write_model

from neuroada_jax import models
from neuroada_jax.core import bypass, low_rank, ops, quantise, trees
from neuroada_jax.core.quantised import QuantisedKernel
from neuroada_jax.models import Remat
from neuroada_jax.models.losses import classification_losses, label_losses
from neuroada_jax.planning.collectives import Traffic, collectives
from neuroada_jax.planning.roofline import nbytes
from neuroada_jax.pretrained.load import open_model
from neuroada_jax.training import optimizer, parallel, step
from neuroada_jax.training.config import OptimizerSection, ParallelSection, TrainingSection

STEPS = 10
FORMS = {
    "shard_map": {"mode": "shard_map"},
    "pmap": {"mode": "pmap"},
    "jit": {"mode": "jit"},
    "fsdp": {"mode": "jit", "fsdp": 8},
    "tensor": {"mode": "jit", "devices": 4, "tensor": 4},
    "all axes": {"mode": "jit", "fsdp": 2, "tensor": 2},
}
SINGLE = {"mode": "single"}


def rows_of(batch, empty):
    """The batch with its last rows as the last batch of an epoch has them."""
    for leaf in batch:
        if leaf is not None:
            leaf[len(leaf) - empty :] = 0
    return batch


def train(form, make_state, module, transformation, batches, losses=label_losses, dropout_seed=None, accumulation=1):
    """(losses of the steps, gradient norms, trained tree, targets of the last step) of a run on the devices of `form`."""
    devices = parallel.resolve(ParallelSection(**form))
    rows = batches[0].input_ids.shape[0]
    training = TrainingSection(steps=STEPS, batch_size=rows, accumulation=accumulation)
    state = devices.place(make_state())
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    run_step = devices.make_step(module, transformation, training, losses, dropout_seed)
    history = []
    for batch in batches:
        old = state
        state, metrics = run_step(state, batch)
        history.append([float(each) for each in metrics])
        donated = (old.params, old.trainable, old.opt_state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    assert int(state.step) == len(batches)
    kept = jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), state, where)
    assert devices.mode == "single" or all(jax.tree.leaves(kept))
    return np.array(history), jax.tree.map(np.asarray, devices.local(state.trainable))


def assert_equal(found, wanted):
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[0][:, 2], wanted[0][:, 2])  # the targets counted
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), found[1], wanted[1])
    assert all(leaf.any() for leaf in jax.tree.leaves(found[1]))


def train_decoder(form, rows=16, accumulation=1, k=3, remat=Remat.NONE, dtype=jnp.float32, steps=STEPS):
    model, transformation, _ = decoder.compiled(dtype=dtype)
    batches = [rows_of(decoder.random_batch(rows, seed=number % 3), 5 * (number % 3 == 2)) for number in range(steps)]
    make_state = lambda: decoder.fresh(model, transformation, decoder.ALL, k)[1]  # noqa: E731
    return train(form, make_state, model.module(remat), transformation, batches, accumulation=accumulation)


@pytest.fixture(scope="module")
def one_device():
    """What one device makes of the decoder's batches."""
    return train_decoder(SINGLE)


# "all axes" has a tensor axis, too.
@pytest.mark.parametrize("form", [pytest.param(form, marks=pytest.mark.slow if form == "tensor" else ()) for form in FORMS])
def test_a_decoder_trains_as_on_one_device(form, one_device):
    assert_equal(train_decoder(FORMS[form]), one_device)


@pytest.mark.parametrize(
    ("form", "remat"),
    [pytest.param("shard_map", Remat.FULL, marks=pytest.mark.slow), ("all axes", Remat.NAMES)],
)
def test_accumulation_and_remat_on_top(form, remat, one_device):
    assert_equal(train_decoder(FORMS[form], accumulation=2, remat=remat), one_device)


@pytest.mark.slow
def test_low_rank_factors_train_as_on_one_device():
    model, transformation, _ = decoder.compiled()
    batches = [rows_of(decoder.random_batch(16, seed=number), 5 * number) for number in range(2)]

    def make_state():
        params = decoder.random_params(model)
        paths = models.match_targets(params, decoder.ALL, model.layers_path)
        return step.initial_state(params, low_rank.build(params, paths, 2, 1.5, jax.random.key(0)), transformation)

    alone, *others = (
        train(form, make_state, model.module(remat), transformation, batches, accumulation=accumulation)
        for form, remat, accumulation in (
            (SINGLE, Remat.NONE, 1),
            (FORMS["pmap"], Remat.FULL, 2),
            (FORMS["all axes"], Remat.NAMES, 1),
        )
    )
    for found in others:
        assert_equal(found, alone)


KINDS = {
    "windows": {"model_type": "gemma2", "query_pre_attn_scalar": 16, "sliding_window": 5, "head_dim": 8},
    "fused": {"model_type": "phi3", "pad_token_id": 0},
    "experts": {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def quantised_experts(params):
    """The parameters with the kernels of experts in int8."""
    for path, kernel in list(trees.kernels(params)):
        if kernel.ndim == 4:
            parts = jax.vmap(jax.vmap(lambda own: quantise.quantise(own, "int8")))(kernel)
            params = trees.put(params, (*path, "kernel"), QuantisedKernel(parts, "int8", kernel.dtype))
    return params


@pytest.mark.parametrize(
    "kind", ["int8", *(pytest.param(each, marks=pytest.mark.slow) for each in ("experts", "windows", "fused"))]
)
def test_kinds_of_decoders_train_as_on_one_device(kind):
    model = models.from_hf_config({**CONFIG, **KINDS["experts" if kind == "int8" else kind]})
    transformation = optimizer.build(OptimizerSection(learning_rate=0.02, schedule="constant", epsilon=1e-3), 100)
    batches = [decoder.random_batch(16, seed=number) for number in range(2)]

    def make_state():
        params = decoder.random_params(model)
        params = quantised_experts(params) if kind == "int8" else params
        paths = models.match_targets(params, list(model.architecture.targets), model.layers_path)
        return step.initial_state(params, bypass.build(params, paths, 3), transformation)

    found, wanted = (
        train(form, make_state, model.module(), transformation, batches) for form in (FORMS["all axes"], SINGLE)
    )
    assert_equal(found, wanted)


@pytest.mark.slow
def test_a_bfloat16_base():
    with jax.numpy_dtype_promotion("standard"):  # JAX transposes its own attention in mixed precision
        wanted, found = (train_decoder(FORMS[form], dtype=jnp.bfloat16, steps=3) for form in ("shard_map", "fsdp"))
    np.testing.assert_allclose(found[0][:, :2], wanted[0][:, :2], rtol=2e-3)
    for a, b in zip(*map(jax.tree.leaves, (found[1], wanted[1])), strict=True):
        assert np.abs(a - b).mean() < 0.05 * np.abs(b).mean()  # AdamW makes much of small differences


def test_rows_that_do_not_divide_are_filled_up(capsys):
    """12 rows in two parts on each of 8 devices: 16, of which the last two devices have none."""
    alone = train_decoder(SINGLE, rows=12)
    assert_equal(train_decoder(FORMS["shard_map"], rows=12, accumulation=2), alone)
    assert "12 examples on 8 devices: every batch is padded with 4 empty examples to 16" in capsys.readouterr().err


def test_another_algorithm_of_the_op(one_device, monkeypatch):
    monkeypatch.setattr(ops, "choose_algorithm", lambda *_, **__: ops.GradientAlgorithm.TOKEN_BLOCKS)
    assert_equal(train_decoder(FORMS["fsdp"], remat=Remat.FULL), one_device)


def train_encoder(form, dropout, rows=16, seed=7, kind="bert"):
    model, transformation, make_state = encoder.setup(kind, dropout=dropout)
    batches = [rows_of(encoder.random_batch(rows, seed=number % 3), 3 * (number % 3 == 2)) for number in range(4)]
    seed = seed if dropout else None
    return train(form, make_state, model.module(), transformation, batches, classification_losses, seed)


@pytest.mark.parametrize(
    ("kind", "forms"),
    [
        ("modernbert", ["all axes"]),
        *(
            pytest.param(kind, ["shard_map", "fsdp", "all axes"], marks=pytest.mark.slow)
            for kind in ("bert", "modernbert", "electra", "distilbert", "deberta-v2", "mpnet")
        ),
    ],
)
def test_an_encoder_with_its_head_trains_as_on_one_device(kind, forms):
    alone = train_encoder(SINGLE, 0.0, kind=kind)
    for form in forms:
        assert_equal(train_encoder(FORMS[form], 0.0, kind=kind), alone)


def test_with_dropout_the_forms_on_eight_devices_agree():
    wanted = train_encoder(FORMS["shard_map"], 0.3)
    assert_equal(train_encoder(FORMS["fsdp"], 0.3), wanted)


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
        ({"devices": 9}, "parallel: needs 9 devices, found 8 (cpu)"),
        ({"fsdp": 4, "tensor": 4}, "parallel: fsdp 4 x tensor 4: needs 16 devices, found 8 (cpu)"),
        ({"fsdp": 3}, "parallel: fsdp 3 x tensor 1 does not divide 8 devices"),
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
    assert f"with parallel.mode: pmap use {take}, or use another mode" in message_of(devices.padded_size, training)


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


def test_weights_are_read_to_where_they_belong(tmp_path):
    """No device holds more than its part, from the first tensor on; and what is built on them is split alike."""
    path = str(write_model(tmp_path / "model"))
    devices = parallel.resolve(ParallelSection(mode="jit", fsdp=4, tensor=2))
    opened = open_model(path)
    placed = devices.weight_shardings(opened.model.abstract_params())
    loaded, plain = opened.load(shardings=placed), opened.load()
    assert loaded.digests == plain.digests
    jax.tree.map(np.testing.assert_array_equal, loaded.params, plain.params)
    same = jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), loaded.params, placed)
    assert all(jax.tree.leaves(same))
    kernel = loaded.params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.shape == (2, 24, 16) and {part.data.shape for part in kernel.addressable_shards} == {(2, 3, 16)}
    paths = [("model", "layers", "mlp", "up_proj")]
    built = devices.by_neuron(lambda params: bypass.build(params, paths, 2))(loaded.params)
    jax.tree.map(np.testing.assert_array_equal, built, bypass.build(plain.params, paths, 2))
    for (leaf,) in map(jax.tree.leaves, (built.columns, built.values, bypass.read(loaded.params, built.columns))):
        assert {part.data.shape for part in leaf.addressable_shards} == {(2, 3, 2)}


# What crosses the wire.

# Heads that two devices can share. All sizes differ, so that a shape says what an array is.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
}


@functools.cache
def sent(k=1, remat=Remat.FULL, **section):
    """(what a step sends, bytes of all values, bytes of the layers' kernels, those of the embedding) of a tiny LLaMA."""
    model = models.from_hf_config({**decoder.CONFIG, **SIZES})
    transformation = optimizer.build(OptimizerSection(learning_rate=0.02), 100)
    devices = parallel.resolve(ParallelSection(**section))

    def first_state(params):
        built = bypass.build(params, models.match_targets(params, decoder.ALL, model.layers_path), k)
        return step.initial_state(params, built, transformation)

    state = jax.eval_shape(first_state, model.abstract_params())
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, decoder.random_batch(16)))
    program = devices.program(model.module(remat), transformation)
    if devices.mode == "pmap":
        batch = jax.eval_shape(lambda batch: step.split(batch, 8), batch)
        compiled = program.lower(state, batch).compile()
    else:
        compiled = program.lower(*devices.abstract(state, batch)).compile()
    kernels = sum(nbytes(kernel) for _, kernel in trees.kernels(state.params))
    return collectives(compiled.as_text()), nbytes(state.trainable), kernels, nbytes(state.params["model"]["embed_tokens"])


@pytest.mark.parametrize(("mode", "k"), [("shard_map", 1), ("shard_map", 20), ("pmap", 20), ("jit", 20)])
def test_data_parallel_sends_four_bytes_for_each_value_at_once(mode, k):
    """One reduction: the gradient, the loss and the count of targets. Nothing as large as a weight, and none for each k."""
    traffic, values, *_ = sent(k, mode=mode)
    assert values == 4 * k * 3 * (32 + 16 + 16 + 32 + 40 + 40 + 32)
    assert traffic == {"all-reduce": Traffic(1, values + 8)}


@pytest.mark.parametrize("remat", [Remat.FULL, Remat.NONE])
def test_fsdp_gathers_weights_twice_and_reduces_values_alone(remat):
    traffic, values, kernels, embedding = sent(3, remat, mode="jit", fsdp=8)
    assert traffic.keys() == {"all-gather", "all-reduce"}
    columns = values  # int32, gathered in the backward pass
    # The backward pass needs no output of a layer's last map, but its kernel for the gradient of the input.
    assert traffic["all-gather"].bytes == 2 * kernels + columns + embedding
    # A few scalars beside: loss and count, the norm twice (metrics, clipping), whether all is finite.
    assert values < traffic["all-reduce"].bytes <= values + 100
    assert traffic["all-reduce"].count <= 10


def test_tensor_sends_activations():
    """Split by neurons: what a map reads is gathered, and the gradient for it summed. No weight moves."""
    traffic, *_ = sent(1, mode="jit", devices=2, tensor=2)
    assert set(traffic) <= {"all-gather", "all-reduce", "all-to-all", "collective-permute"}
    residual = 4 * 16 * 12 * 32  # bytes of (B, T, D)
    # Forward, again and backward, a layer moves its normed inputs, attention's output and the gated product (F = 1.25 D),
    # and backward the gradients for the inputs of seven maps.
    assert 3 * 11 * residual < sum(each.bytes for each in traffic.values()) < 3 * 25 * residual
