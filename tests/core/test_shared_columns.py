"""Columns that all neurons of a map share, against the same columns written out for every neuron, and in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equations
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import jit
from test_ops import LAYOUTS, laid_out, oracle, problem

from neuroada_jax.core import bypass, selection
from neuroada_jax.core.entries import Layout, add_entries, read_entries, write_entries
from neuroada_jax.core.ops import bypass_dense
from neuroada_jax.core.scores import magnitude
from neuroada_jax.core.value_gradient import GradientAlgorithm, value_gradient


def shared_problem(seed, batch, outputs, inputs, k):
    """x, kernel, columns (1, k), values, dy of `problem`, whose neurons share the columns of the first."""
    x, kernel, columns, values, dy = problem(seed, batch, outputs, inputs, k)
    return x, kernel, columns[:1], values, dy


def actual(x, kernel, columns, values, dy, resident, layout):
    """(y, dx, dkernel, dvalues) of bypass_dense."""

    @jit
    def value_and_pullback(x, kernel, columns, values, dy):
        kernel = add_entries(kernel, columns, values, layout) if resident else kernel
        apply = lambda x, kernel, values: bypass_dense(x, kernel, columns, values, resident=resident, layout=layout)  # noqa: E731
        y, vjp = jax.vjp(apply, x, kernel, values)
        return y, *vjp(dy)

    return value_and_pullback(x, laid_out(kernel, layout), columns, values, dy)


@pytest.mark.parametrize("resident", [False, True], ids=["on_the_fly", "resident"])
@settings(max_examples=4)
@given(
    batch=st.sampled_from([(), (5,), (2, 3)]),
    sizes=st.sampled_from([(1, 4, 1), (3, 7, 1), (3, 5, 5), (64, 40, 20), (17, 96, 20)]),  # O, I, k
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**31),
)
def test_float64_equals_the_dense_oracle(resident, batch, sizes, layout, seed):
    x, kernel, columns, values, dy = shared_problem(seed, batch, *sizes)
    y, dx, dvalues = oracle(x, kernel, np.repeat(columns, sizes[0], axis=0), values, dy)
    with jax.enable_x64(True):
        found = actual(*map(jnp.asarray, (x, kernel, columns, values, dy)), resident, layout)
    for got, want in zip(found, (y, dx, 0 * laid_out(kernel, layout), dvalues), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_is_summed_in_float32(dtype):
    x, _, columns, _, dy = shared_problem(4, (48,), 24, 40, 7)
    x, dy = jnp.asarray(x, dtype), jnp.asarray(dy, dtype)
    found = jit(value_gradient, static_argnums=3)(dy, x, jnp.asarray(columns), GradientAlgorithm.COLUMN_GATHER)
    want = np.asarray(dy, np.float64).T @ np.asarray(x, np.float64)[:, columns[0]]
    assert found.dtype == jnp.float32
    assert np.linalg.norm(found - want) <= 2e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_trains_is_what_is_merged_bit_for_bit(layout, dtype):
    """Resident, on the fly and merged weights are those of the columns written out, in one stack of layers."""
    rng = np.random.default_rng(1)
    kernels = jnp.asarray(rng.normal(size=(3, 12, 40)), dtype)
    columns = selection.select(kernels, 20, shared=True)
    assert columns.shape == (3, 1, 20)
    written_out = jnp.broadcast_to(columns, (3, 12, 20))
    values = jnp.asarray(rng.normal(size=(3, 12, 20)) * np.logspace(-5, -1, 20), jnp.float32)
    rows = laid_out(kernels, layout)
    base = read_entries(rows, columns, layout)
    np.testing.assert_array_equal(base, read_entries(rows, written_out, layout))
    merged = add_entries(rows, columns, values, layout)
    np.testing.assert_array_equal(merged, add_entries(rows, written_out, values, layout))
    resident = jit(write_entries, static_argnums=3)(rows, columns, base.astype(jnp.float32) + values, layout)
    np.testing.assert_array_equal(resident, merged)
    np.testing.assert_array_equal(write_entries(merged, columns, base, layout), rows)
    x = jnp.asarray(rng.normal(size=(5, 40)), dtype)
    y = [
        jit(bypass_dense, static_argnames=("resident", "layout"))(
            x, kernel[1], columns[1], values[1], resident=kernel is resident, layout=layout
        )
        for kernel in (rows, resident)
    ]
    np.testing.assert_array_equal(*y)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_neither_a_dense_gradient_nor_a_gather_for_every_neuron_is_formed(dtype):
    tokens, outputs, inputs, k = 24, 64, 48, 5
    x, kernel, columns, values, dy = shared_problem(2, (tokens,), outputs, inputs, k)
    x, kernel, dy = (jnp.asarray(leaf, dtype) for leaf in (x, kernel, dy))

    columns = jnp.asarray(columns)

    def pullback(x, values):
        return jax.vjp(lambda values: bypass_dense(x, kernel, columns, values, resident=True), values)[1](dy)

    sizes = [
        out.aval.size
        for each in equations(jax.make_jaxpr(pullback)(x, jnp.asarray(values, jnp.float32)).jaxpr)
        for out in each.outvars
    ]
    assert max(sizes) <= tokens * max(outputs, inputs)  # less than O times I, and than T times O times k


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resident_write_is_in_place(layout):
    kernel = jax.ShapeDtypeStruct((4, 256, 192) if layout is Layout.OI else (4, 192, 256), jnp.float32)
    columns, entries = jax.ShapeDtypeStruct((4, 1, 20), jnp.int32), jax.ShapeDtypeStruct((4, 256, 20), jnp.float32)
    write = jax.jit(write_entries, donate_argnums=0, static_argnums=3)
    memory = write.lower(kernel, columns, entries, layout).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 4 * 256 * 192 * 4
    assert memory.temp_size_in_bytes < 256 * 192 * 4


@settings(max_examples=6)
@given(
    shape=st.sampled_from([(4, 7), (16, 33), (3, 5, 8), (2, 2, 4, 64)]),
    k=st.sampled_from([1, 3, 20]),
    levels=st.sampled_from([None, 2]),
    compiled=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_columns_are_those_that_most_neurons_would_select(shape, k, levels, compiled, seed):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=shape) if levels is None else rng.integers(-levels, levels + 1, size=shape)
    inputs, k = shape[-1], min(k, shape[-1])
    own = np.argsort(-np.abs(kernel), axis=-1, kind="stable")[..., :k].reshape(-1, shape[-2] * k)
    votes = np.stack([np.bincount(row, minlength=inputs) for row in own])
    want = np.sort(np.argsort(-votes, axis=-1, kind="stable")[:, :k], axis=-1)
    select = lambda kernel: selection.select(kernel, k, shared=True)  # noqa: E731
    found = (jit(select) if compiled else select)(jnp.asarray(kernel, jnp.float32))
    np.testing.assert_array_equal(found, want.reshape(*shape[:-2], 1, k))


def test_a_bypass_with_shared_columns_merges_and_unmerges_bit_for_bit():
    rng = np.random.default_rng(3)
    params = {
        "layers": {"up": {"kernel": jnp.asarray(rng.normal(size=(3, 8, 6)), jnp.bfloat16)}},
        "apart": {"kernel": tuple(jnp.asarray(rng.normal(size=(8, 6)), jnp.bfloat16) for _ in range(2))},
    }
    built = bypass.build(params, [("layers", "up"), ("apart",)], 2, score=magnitude, shared=True)
    assert bypass.count(built.values) == 2 * 8 * (3 + 2)
    values = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), built.values)
    trained = bypass.Bypass(values, built.columns)
    base, merged = jit(lambda params: (bypass.read(params, built.columns), bypass.merge(params, trained)))(params)
    assert not np.array_equal(merged["apart"]["kernel"][1], params["apart"]["kernel"][1])
    written = jit(bypass.make_resident)(params, trained, base)
    restored = jit(bypass.unmerge)(written, built.columns, base)
    for one, other in ((written, merged), (restored, params)):
        jax.tree.map(np.testing.assert_array_equal, one, other)
