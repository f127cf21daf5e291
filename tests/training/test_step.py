"""The training step: what it computes and what it leaves alone. Parity with the official code is in test_parity.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import CONFIG

from neuroada_jax import models
from neuroada_jax.core import bypass, trees
from neuroada_jax.data.batches import Batch, Batches
from neuroada_jax.data.examples import Examples
from neuroada_jax.models import Remat, losses
from neuroada_jax.models import remat as remat_module
from neuroada_jax.training import config, optimizer, step

ALL = list(models.LLAMA_TARGETS)
SOME = ("q_proj", "down_proj")  # two targets compile in a third of the time


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray((0.3 * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)),
        model.abstract_params(),
    )


def random_batch(rows=4, time=12, targets=8, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, time + 1, rows).astype(np.int32)
    mask = (np.arange(targets)[None] < rng.integers(1, targets + 1, rows)[:, None]).astype(np.float32)
    return Batch(
        input_ids=rng.integers(0, CONFIG["vocab_size"], (rows, time)).astype(np.int32),
        lengths=lengths,
        label_positions=(rng.integers(0, time - 1, (rows, targets)) * mask).astype(np.int32),
        label_ids=(rng.integers(0, CONFIG["vocab_size"], (rows, targets)) * mask).astype(np.int32),
        label_mask=mask,
    )


@functools.cache
def compiled(dtype=jnp.float32, remat=Remat.NONE, accumulation=1, **section):
    """(model, transformation, run) for a learning rate of 0.02, compiled once for all tests."""
    model = models.from_hf_config(CONFIG, dtype)
    section = config.OptimizerSection(**{"learning_rate": 0.02, "schedule": "constant", **section})
    transformation = optimizer.build(section, 100)
    run = step.make_step(model.module(remat), transformation, accumulation)
    return model, transformation, run


def fresh(model, transformation, targets=SOME, k=1):
    """(params, state); `params` are NumPy copies, since the state's are donated."""
    params = random_params(model)
    kept = jax.tree.map(lambda leaf: np.array(leaf), params)
    built = bypass.build(params, models.match_targets(params, list(targets), model.layers_path), k)
    return kept, step.initial_state(params, built, transformation)


def test_no_base_leaf_is_in_gradients_or_opt_state():
    model, transformation, _ = compiled()
    params, state = fresh(model, transformation, ALL, k=3)
    allowed = {leaf.shape for leaf in jax.tree.leaves(state.trainable)}
    frozen = {leaf.shape for leaf in jax.tree.leaves(params)}
    assert not allowed & frozen  # else the shapes would prove nothing
    seen = []
    spy = optax.GradientTransformation(
        transformation.init,
        lambda gradient, *rest: seen.append(gradient) or transformation.update(gradient, *rest),
    )
    new, _ = jax.eval_shape(step.make_step(model.module(), spy), state, random_batch())
    (gradient,) = seen
    assert jax.tree.structure(gradient) == jax.tree.structure(state.trainable)
    assert {leaf.shape for leaf in jax.tree.leaves(gradient)} == allowed
    for tree in (state.opt_state, new.opt_state):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            keys = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
            assert leaf.ndim == 0 or (leaf.shape in allowed and keys[-1] == "values"), path
            assert not {"kernel", "scale", "embedding", "columns", "base"} & set(keys), path
    assert jax.tree.structure(new) == jax.tree.structure(state)


@pytest.mark.parametrize(("parts", "packed"), [(2, False), (4, False), (2, True)])
def test_accumulation_equals_one_batch(parts, packed):
    batch = random_batch()
    batch.label_mask[3] = 0  # parts with different numbers of targets, one of them empty
    if packed:
        positions = [[*range(split), *range(12 - split)] for split in (5, 1, 8, 12)]
        batch = batch._replace(positions=np.array(positions, np.int32))
    results = []
    for accumulation in (1, parts):
        model, transformation, run = compiled(accumulation=accumulation)
        _, state = fresh(model, transformation)
        for _ in range(2):
            state, metrics = run(state, batch)
        results.append((metrics, state.trainable))
    (whole, values), (split, split_values) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, split)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), values, split_values)


def dense_loss(model, params, batch):
    """The mean loss from the logits of every position, in NumPy."""
    hidden, _ = model.module().apply({"params": params}, jnp.asarray(batch.input_ids))
    logits = np.asarray(model.module().apply({"params": params}, hidden, method="unembed"), np.float64)
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    rows = np.arange(len(logits))[:, None]
    picked = logits[rows, batch.label_positions, batch.label_ids] - log_z[rows, batch.label_positions]
    return -(picked * batch.label_mask).sum() / batch.label_mask.sum()


def test_loss_equals_the_one_over_full_logits():
    model, transformation, run = compiled()
    params, state = fresh(model, transformation)
    batch = random_batch()
    want = dense_loss(model, params, batch)
    new, metrics = run(state, batch)
    assert float(metrics.loss) == pytest.approx(want, rel=1e-5)
    assert float(metrics.labels) == batch.label_mask.sum()
    assert float(metrics.gradient_norm) > 0
    # The next loss is that of the updated weights: the resident write has happened.
    want = dense_loss(model, new.params, batch)
    assert float(run(new, batch)[1].loss) == pytest.approx(want, rel=1e-5)


WINDOWS = {"use_sliding_window": True, "sliding_window": 3}
# Rotary distances are relative, so that only this kind, whose base grows with the longest position, shows a missing reset.
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, "max_position_embeddings": 16}


@pytest.mark.parametrize(
    "fields",
    [DYNAMIC, {"model_type": "mistral", "sliding_window": 3}, {"model_type": "qwen2", "max_window_layers": 1, **WINDOWS}],
    ids=["full", "windows", "mixed windows"],
)
def test_packed_losses_and_gradients_equal_unpacked_ones(fields):
    model = models.from_hf_config({**CONFIG, **fields})
    params, module = random_params(model), model.module()
    built = bypass.build(params, models.match_targets(params, list(SOME), model.layers_path), 2)
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 15, 9)
    ids = rng.integers(0, CONFIG["vocab_size"], lengths.sum()).astype(np.int32)
    is_label = rng.random(len(ids)) < 0.4
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    is_label[offsets[:-1]], is_label[offsets[1:] - 1] = False, True
    examples = Examples(ids, is_label, np.arange(9, dtype=np.int32), offsets, 0, 0)

    @jax.jit
    def gradient_and_losses(values, batch):
        def total(values):
            each = losses.label_losses(module, {"params": params, "bypass": values, "columns": built.columns}, batch)
            return jnp.sum(each), each

        return jax.grad(total, has_aux=True)(values)

    results = []
    for batches in (Batches(examples, 9, 0, [16]), Batches(examples, 6, 0, packed_length=24)):  # an empty row at the end
        batch = batches.batch(0, 0)
        gradient, each = gradient_and_losses(built.values, batch)
        counts = examples.label_counts[batches.row_numbers(0, 0)]
        per_example = np.split(np.asarray(each)[batch.label_mask == 1], np.cumsum(counts)[:-1])
        results.append((gradient, dict(zip(batches.row_numbers(0, 0).tolist(), per_example, strict=True))))
    (gradient, unpacked), (packed_gradient, packed) = results
    assert not batch.lengths[-1] and batch.positions[0].tolist().count(0) > 1
    for number in range(9):
        np.testing.assert_allclose(packed[number], unpacked[number], rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), packed_gradient, gradient)


def train(run, state, batch, steps=4):
    losses = []
    for _ in range(steps):
        state, metrics = run(state, batch)
        losses.append(float(metrics.loss))
    return state, losses


def test_steps_reduce_the_loss_and_keep_the_resident_invariant():
    model, transformation, run = compiled()
    params, state = fresh(model, transformation)
    state, losses = train(run, state, random_batch())
    assert losses == sorted(set(losses), reverse=True)
    assert (int(state.step), int(state.failed_step)) == (4, -1)
    check_resident(params, state)


@pytest.mark.parametrize("remat", [Remat.NAMES, Remat.FULL])
def test_remat_policies_agree(remat):
    results = []
    for policy in (Remat.NONE, remat):
        model, transformation, run = compiled(remat=policy)
        results.append(train(run, fresh(model, transformation)[1], random_batch())[1])
    np.testing.assert_allclose(*results, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "parts"), [(24, 2), (1, 4), (48, 1)])  # of 4 x 12
def test_full_remat_in_parts_of_the_batch_agrees(tokens, parts, monkeypatch):
    model, transformation, run = compiled()
    whole = train(run, fresh(model, transformation)[1], random_batch())
    monkeypatch.setattr(remat_module, "_PART_TOKENS", tokens)
    run = step.make_step(model.module(Remat.FULL), transformation)
    split = train(run, fresh(model, transformation)[1], random_batch())
    np.testing.assert_allclose(split[1], whole[1], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), split[0].trainable, whole[0].trainable
    )
    jaxpr = str(jax.make_jaxpr(run)(fresh(model, transformation)[1], random_batch()))
    assert (f"f32[{parts},{4 // parts},12,{CONFIG['hidden_size']}]" in jaxpr) == (parts > 1)


def check_resident(params, state):
    """params at columns == base + values, rounded once; everything else bit for bit as it was."""
    targets = dict(trees.leaves(state.columns, "columns"))
    for path, leaf in trees.flatten(params):
        now = np.asarray(trees.get(state.params, path))
        assert now.dtype == leaf.dtype
        want = leaf.copy()
        module = path[:-1]
        if module in targets and path[-1] == "kernel":
            chosen = np.asarray(targets[module])
            base_entries = np.take_along_axis(leaf, chosen, -1)
            values = np.asarray(trees.get(state.bypass.values, module)["values"])
            np.testing.assert_array_equal(np.asarray(trees.get(state.base_entries, module)["base_entries"]), base_entries)
            assert values.any(axis=(1, 2)).all()  # every layer has learnt something
            np.put_along_axis(want, chosen, (base_entries.astype(np.float32) + values).astype(leaf.dtype), -1)
        assert want.tobytes() == now.tobytes(), path


def test_bfloat16_base_trains_float32_values():
    model, transformation, run = compiled(dtype=jnp.bfloat16)
    params, state = fresh(model, transformation)
    with jax.numpy_dtype_promotion("standard"):  # JAX transposes its own attention in mixed precision
        state, losses = train(run, state, random_batch())
    assert losses[-1] < losses[0]
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state.params))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.trainable))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    check_resident(params, state)


def snapshot(state):
    return jax.tree.map(lambda leaf: np.array(leaf), (state.step, state.trainable, state.opt_state, state.params))


def test_a_step_that_is_not_finite_freezes_the_state():
    model, transformation, run = compiled()
    _, state = fresh(model, transformation)
    good, bad = random_batch(), random_batch(seed=1)
    bad = bad._replace(label_mask=np.full_like(bad.label_mask, np.nan))
    state, _ = run(state, good)
    state, _ = run(state, good)
    kept = snapshot(state)
    state, metrics = run(state, bad)
    assert not np.isfinite(float(metrics.loss))
    assert int(state.failed_step) == 2  # counted from 0
    for batch in (good, bad, good):
        jax.tree.map(np.testing.assert_array_equal, snapshot(state), kept)
        state, metrics = run(state, batch)
    assert np.isfinite(float(metrics.loss))  # a later good step is seen, and changes nothing
    jax.tree.map(np.testing.assert_array_equal, snapshot(state), kept)
    assert int(state.failed_step) == 2


def test_an_infinite_weight_fails_the_first_step():
    model, transformation, run = compiled()
    _, state = fresh(model, transformation)
    tokens = state.params["model"]["embed_tokens"]
    tokens["embedding"] = tokens["embedding"].at[:, 0].set(jnp.inf)
    state, _ = run(state, random_batch())
    assert int(state.failed_step) == 0 and int(state.step) == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.trainable))


def test_values_never_become_infinite():
    """A finite gradient and an absurd learning rate: the update itself overflows."""
    model, transformation, run = compiled(learning_rate=1e38)
    _, state = fresh(model, transformation)
    for _ in range(8):
        state, _ = run(state, random_batch())
    assert int(state.failed_step) >= 0
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state.trainable))


def test_the_state_is_donated():
    model, transformation, run = compiled()
    _, state = fresh(model, transformation)
    new, _ = run(state, random_batch())
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.trainable, state.opt_state)):
        assert leaf.is_deleted(), path
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_an_empty_batch_changes_nothing_but_the_count():
    model, transformation, run = compiled()
    _, state = fresh(model, transformation)
    batch = random_batch()
    batch = batch._replace(label_mask=np.zeros_like(batch.label_mask))
    state, metrics = run(state, batch)
    assert (float(metrics.loss), float(metrics.gradient_norm), int(state.failed_step)) == (0, 0, -1)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.trainable))
