"""Every score of connections against dense float64 NumPy: what it computes, and what is selected by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import jit

from neuroada_jax.core import bypass, scores, selection
from neuroada_jax.core.entries import Layout
from neuroada_jax.core.scores import RULES, Needs
from neuroada_jax.errors import UserError


def statistic_of(needs, kernel, rng):
    """A statistic of a stack of kernels (*L, O, I), as NumPy arrays."""
    *leading, outputs, inputs = kernel.shape
    match needs:
        case Needs.NOTHING:
            return None
        case Needs.GRADIENT:
            return {"kernel": rng.normal(size=kernel.shape).astype(np.float32)}
        case Needs.INPUTS:
            return {"for_all": rng.uniform(0.1, 2, (*leading, inputs)).astype(np.float32)}
        case Needs.FACTORS:
            rank = min(3, outputs, inputs)
            return jax.tree.map(np.asarray, scores.factors(jnp.asarray(kernel), rank, jax.random.key(1)))
        case Needs.SEEDS:
            return jax.tree.map(np.asarray, scores.seeds(jax.random.key(2), kernel.shape[:-1]))


def dense(name, kernel, statistic):
    """The scores (*L, O, I) of a rule in float64, by its formula."""
    kernel = np.asarray(kernel, np.float64)
    wide = {} if statistic is None else {key: np.asarray(leaf, np.float64) for key, leaf in statistic.items()}
    match name:
        case "magnitude":
            return abs(kernel)
        case "reverse":
            return -abs(kernel)
        case "gradient":
            return abs(wide["kernel"])
        case "gradient_over_magnitude":
            return abs(wide["kernel"]) / (abs(kernel) + 1e-8)
        case "activation":
            return abs(kernel) * wide["for_all"][..., None, :]
        case "lowrank":
            left, scale, right = np.linalg.svd(kernel, full_matrices=False)
            rank = wide["for_all"].shape[-2]
            return abs((left[..., :rank] * scale[..., None, :rank]) @ right[..., :rank, :])
        case "random":
            flat = statistic["by_neuron"].reshape(-1)
            draws = [jax.random.uniform(jax.random.key(seed), kernel.shape[-1:]) for seed in flat]
            return np.asarray(draws, np.float64).reshape(kernel.shape)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=3)
@given(
    shape=st.sampled_from([(4, 7), (12, 33), (2, 5, 24), (2, 1, 3, 64)]),
    k=st.sampled_from([1, 3, 20]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    levels=st.sampled_from([None, 2]),  # few distinct weights: ties everywhere
    layout=st.sampled_from(list(Layout)),
    compiled=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_best_of_every_neuron_are_those_of_the_dense_scores(name, shape, k, dtype, levels, layout, compiled, seed):
    """No entry that was left out scores more than one that was selected; equal scores go to the lowest columns."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=shape) if levels is None else rng.integers(-levels, levels + 1, size=shape)
    kernel = np.asarray(jnp.asarray(kernel, dtype))
    rule, k = RULES[name], min(k, shape[-1])
    statistic = statistic_of(rule.needs, kernel, rng)
    laid_out = jnp.asarray(kernel if layout is Layout.OI else kernel.swapaxes(-1, -2))
    select = lambda kernel, statistic: selection.select(kernel, k, rule.score, statistic, layout=layout)  # noqa: E731
    columns = np.asarray((jit(select) if compiled else select)(laid_out, statistic))
    assert (columns.dtype, columns.shape) == (np.int32, (*shape[:-1], k))
    assert (np.diff(columns, axis=-1) > 0).all()
    want = dense(name, kernel, statistic)
    chosen = np.take_along_axis(want, columns, axis=-1)
    others = want.copy()
    np.put_along_axis(others, columns, -np.inf, axis=-1)
    # By a product of float32 numbers, scores that are equal up to rounding may change places.
    tolerance = {"lowrank": 1e-5, "activation": 1e-6, "gradient_over_magnitude": 1e-6}.get(name, 0)
    assert (others.max(axis=-1) <= chosen.min(axis=-1) * (1 + np.sign(chosen.min(axis=-1)) * tolerance) + tolerance).all()
    if not tolerance:
        order = np.argsort(-want, axis=-1, kind="stable")
        np.testing.assert_array_equal(columns, np.sort(order[..., :k], axis=-1))


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (2, 48, 48)])
def test_a_randomised_approximation_is_that_of_the_svd(shape):
    """Where the projection is narrower than the matrix, and singular values fall off as those of trained weights do."""
    rng = np.random.default_rng(0)
    left, _, right = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    kernel = (left * 0.8 ** np.arange(left.shape[-1])) @ right
    found, again, other = (scores.factors(jnp.asarray(kernel, jnp.float32), 5, jax.random.key(seed)) for seed in (1, 1, 2))
    approximation = np.asarray(found["by_neuron"]) @ np.asarray(found["for_all"])
    want = (left[..., :5] * 0.8 ** np.arange(5)) @ right[..., :5, :]
    np.testing.assert_allclose(approximation, want, atol=2e-4)
    np.testing.assert_array_equal(found["by_neuron"], again["by_neuron"])  # deterministic in the seed
    assert not np.array_equal(found["by_neuron"], other["by_neuron"])


def test_scores_of_one_layer_at_a_time_are_in_memory():
    kernel = jax.ShapeDtypeStruct((8, 128, 512), jnp.bfloat16)
    layer = 128 * 512 * 4
    for rule in (RULES[name] for name in ("activation", "lowrank", "random")):
        statistic = jax.eval_shape(lambda kernel, rule=rule: _abstract_statistic(rule.needs, kernel), kernel)
        memory = selection.search.lower(kernel, 4, rule.score, statistic).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 5 * layer, rule
    approximate = jax.jit(scores.factors, static_argnums=1)
    memory = approximate.lower(kernel, 8, jax.random.key(0)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 5 * layer


def _abstract_statistic(needs, kernel):
    outputs = {
        Needs.GRADIENT: lambda: {"kernel": jnp.zeros(kernel.shape)},
        Needs.INPUTS: lambda: {"for_all": jnp.zeros((kernel.shape[0], kernel.shape[2]))},
        Needs.FACTORS: lambda: scores.factors(kernel, 8, jax.random.key(0)),
        Needs.SEEDS: lambda: scores.seeds(jax.random.key(0), kernel.shape[:-1]),
    }
    return outputs[needs]() if needs in outputs else None


def by_row_norm(kernel):
    """A caller's score that needs complete rows."""
    return jnp.abs(kernel) / jnp.linalg.norm(kernel, axis=1, keepdims=True) - jnp.where(kernel > 0, 0.5, 0.0)


@pytest.mark.parametrize("layout", list(Layout))
def test_a_score_of_ones_own_sees_complete_rows_in_float32(layout):
    kernel = np.asarray(jnp.asarray(np.random.default_rng(4).normal(size=(2, 6, 16)), jnp.bfloat16))
    laid_out = jnp.asarray(kernel if layout is Layout.OI else kernel.swapaxes(-1, -2))
    wide = kernel.astype(np.float64)
    want = abs(wide) / np.linalg.norm(wide, axis=-1, keepdims=True) - 0.5 * (wide > 0)
    order = np.sort(np.argsort(-want, axis=-1, kind="stable")[..., :3], axis=-1)
    np.testing.assert_array_equal(selection.select(laid_out, 3, by_row_norm, layout=layout), order)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda kernel: jnp.where(kernel > 0, kernel, jnp.nan), r"up has NaN or infinite scores, first at neuron \(1, 0\)"),
        (
            lambda kernel: jnp.where(kernel > 0, kernel, -jnp.inf),
            r"up has NaN or infinite scores, first at neuron \(1, 0\)",
        ),
        (lambda kernel: kernel[:, :-1], r"up has scores float32 \(4, 7\), expected float32 \(4, 8\) \(O, I\)"),
        (lambda kernel: kernel.T, r"up has scores float32 \(8, 4\), expected float32 \(4, 8\)"),
        (lambda kernel: kernel > 0, r"up has scores bool \(4, 8\), expected float32"),
        (lambda kernel: 1.0, r"up has scores float32 \(\), expected float32"),
    ],
)
def test_a_score_that_cannot_be_used_is_refused_by_the_name_of_the_map(score, message):
    kernel = jnp.ones((2, 4, 8)).at[1, 0, 3].set(-1)
    with pytest.raises(UserError, match=f"^score: {message}"):
        bypass.build({"up": {"kernel": kernel}}, [("up",)], 2, score=score)
