"""Schedules against transformers' own, and an optimiser that moves nothing but the bypass."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from neuroada_jax.core import bypass, ops
from neuroada_jax.training import optimizer
from neuroada_jax.training.config import OptimizerSection

REFERENCES = {
    "linear": lambda o, warmup, total: transformers.get_linear_schedule_with_warmup(o, warmup, total),
    "cosine": lambda o, warmup, total: transformers.get_cosine_schedule_with_warmup(o, warmup, total),
    "constant": lambda o, warmup, total: transformers.get_constant_schedule_with_warmup(o, warmup),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(("total", "ratio", "warmup"), [(10, 0.0, 0), (20, 0.06, 2), (7, 0.5, 4), (3, 1.0, 3), (1, 0.0, 0)])
def test_schedules_equal_transformers_step_by_step(name, total, ratio, warmup):
    torch_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    reference = REFERENCES[name](torch_optimizer, warmup, total)
    rates = optimizer.schedule(OptimizerSection(learning_rate=3e-3, schedule=name, warmup_ratio=ratio), total)
    for step in range(total):
        assert float(rates(step)) == pytest.approx(reference.get_last_lr()[0], rel=1e-5, abs=1e-10), step
        torch_optimizer.step()
        reference.step()


def tree(scale: float):
    """A combined tree; only `bypass` may move."""
    module = {"self_attn": {"q_proj": {"kernel": jnp.full((3, 5, 4), scale)}}}
    return {
        "params": module,
        "bypass": {"self_attn": {"q_proj": {"values": jnp.full((3, 5, 2), scale)}}},
        "columns": {"self_attn": {"q_proj": {"columns": jnp.ones((3, 5, 2), jnp.int32)}}},
        "base_entries": {"self_attn": {"q_proj": {"base_entries": jnp.full((3, 5, 2), scale)}}},
    }


def test_a_combined_tree_moves_in_its_bypass_alone():
    transformation = optimizer.build(OptimizerSection(learning_rate=0.1, weight_decay=0.1), 10)
    weights, gradients = tree(0.5), tree(2.0)
    state = transformation.init(weights)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert [leaf.shape for leaf in moments] == [(3, 5, 2)] * 2  # mu and nu of the values, nothing else
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = transformation.update(gradients, state, weights)
    for collection in ("params", "columns", "base_entries"):
        assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(updates[collection]))
    assert all(np.asarray(leaf).all() for leaf in jax.tree.leaves(updates["bypass"]))


def test_a_combined_tree_is_clipped_by_the_norm_of_its_bypass():
    section = OptimizerSection(learning_rate=0.1, clip_norm=1.0, epsilon=1.0)  # with epsilon 1 the scale shows
    transformation = optimizer.build(section, 10)

    def values_update(gradients, weights):
        with jax.numpy_dtype_promotion("standard"):
            return transformation.update(gradients, transformation.init(weights), weights)[0]["bypass"]

    weights, gradients = tree(0.5), tree(2.0)
    alone = values_update({"bypass": gradients["bypass"]}, {"bypass": weights["bypass"]})
    jax.tree.map(np.testing.assert_array_equal, values_update(gradients, weights), alone)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_updates_equal_pytorch_adamw(clip_norm):
    """Five updates with decay and warm-up, the norm clipped as torch's Trainer does."""
    rng = np.random.default_rng(0)
    start, gradients = rng.standard_normal((4, 2), np.float32), rng.standard_normal((5, 4, 2), np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    reference = torch.optim.AdamW([parameter], lr=0.05, weight_decay=0.1)
    scheduler = transformers.get_linear_schedule_with_warmup(reference, 1, 5)
    section = OptimizerSection(learning_rate=0.05, weight_decay=0.1, warmup_ratio=0.2, clip_norm=clip_norm)
    transformation = optimizer.build(section, 5)
    values = {"bypass": {"values": jnp.asarray(start)}}
    state = transformation.init(values)
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient.copy())
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([parameter], clip_norm)
        reference.step()
        scheduler.step()
        with jax.numpy_dtype_promotion("standard"):
            updates, state = transformation.update({"bypass": {"values": jnp.asarray(gradient)}}, state, values)
        values = optax.apply_updates(values, updates)
    assert values["bypass"]["values"].dtype == jnp.float32
    np.testing.assert_allclose(values["bypass"]["values"], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_bfloat16_values_follow_the_published_formula_on_one_linear_map():
    """20 steps of W.flatten().scatter_add(0, positions, values) under PyTorch's AdamW, all of it in bfloat16."""
    outputs, inputs, k, tokens = 24, 32, 3, 40
    rng = np.random.default_rng(0)
    kernel, x, y = (rng.standard_normal(shape) for shape in ((outputs, inputs), (tokens, inputs), (tokens, outputs)))
    params = {"map": {"kernel": jnp.asarray(0.1 * kernel, jnp.bfloat16)}}
    x, y = jnp.asarray(x, jnp.bfloat16), jnp.asarray(y, jnp.bfloat16)
    built = bypass.build(params, [("map",)], k, dtype=jnp.bfloat16)
    columns, base_entries = built.columns["map"]["columns"], bypass.read(params, built.columns)

    weight, their_x, their_y = (
        torch.from_numpy(np.array(array, np.float32)).bfloat16() for array in (params["map"]["kernel"], x, y)
    )
    positions = torch.from_numpy((np.arange(outputs)[:, None] * inputs + np.asarray(columns)).reshape(-1)).long()
    theirs = torch.nn.Parameter(torch.zeros(outputs * k, dtype=torch.bfloat16))
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0)
    transformation = optimizer.build(OptimizerSection(learning_rate=0.01, schedule="constant"), 20)
    values = {"bypass": built.values}
    state = transformation.init(values)

    @jax.jit
    def step(values, state):
        trained = bypass.Bypass(values["bypass"], built.columns)
        resident = bypass.make_resident(params, trained, base_entries)["map"]["kernel"]

        def loss(values):
            out = ops.bypass_dense(x, resident, columns, values["bypass"]["map"]["values"], resident=True)
            return jnp.mean(jnp.square((out - y).astype(jnp.float32)))

        value, gradient = jax.value_and_grad(loss)(values)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = transformation.update(gradient, state, values)
        return optax.apply_updates(values, updates), state, value

    for _ in range(20):
        merged = weight.flatten().scatter_add(0, positions, theirs).view_as(weight)
        loss = (torch.nn.functional.linear(their_x, merged) - their_y).float().square().mean()
        reference.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        reference.step()
        values, state, ours = step(values, state)
        assert float(ours) == pytest.approx(loss.item(), rel=2e-3)
    ours = values["bypass"]["map"]["values"]
    assert ours.dtype == jnp.bfloat16
    ours, theirs = np.asarray(ours, np.float32).reshape(-1), theirs.detach().float().numpy()
    # A number in bfloat16 is right to 0.4 %; 20 roundings in another order make it 0.8 % here.
    assert np.linalg.norm(ours - theirs) < 0.02 * np.linalg.norm(theirs)
