"""selection.select against a stable argsort in numpy."""

import inspect
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroada_jax.core import scores, selection
from neuroada_jax.core.entries import Layout
from neuroada_jax.errors import UserError


def oracle(kernel, k):
    """The k largest |W| of every row, ties to the lowest column, ascending."""
    order = np.argsort(-np.abs(np.asarray(kernel, np.float64)), axis=-1, kind="stable")
    return np.sort(order[..., :k], axis=-1)


def check(kernel, k):
    columns = selection.select(kernel, k)
    assert columns.dtype == jnp.int32
    assert columns.shape == (*kernel.shape[:-1], min(k, kernel.shape[-1]))
    np.testing.assert_array_equal(columns, oracle(kernel, k))


@settings(max_examples=40)
@given(
    # The last three are searched by blocks: from 9 inputs on at k = 1, from 81 k on above, over one or two levels.
    shape=st.sampled_from([(1, 1), (4, 7), (16, 33), (3, 5, 8), (2, 3, 4, 9), (2, 5, 64), (2, 2, 4, 328), (3, 1728)]),
    k=st.sampled_from([1, 2, 3, 20]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    levels=st.sampled_from([None, 2, 5]),  # few distinct magnitudes: ties everywhere
    seed=st.integers(0, 2**31),
)
def test_equals_a_stable_argsort(shape, k, dtype, levels, seed):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=shape) if levels is None else rng.integers(-levels, levels + 1, size=shape)
    check(jnp.asarray(kernel, dtype), k)


@pytest.mark.parametrize("shape", [(4, 7), (16, 33), (3, 5, 8), (2, 3, 4, 9), (2, 2, 4, 328)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_other_layout_gives_the_same_columns(shape, dtype, k):
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)
    columns = selection.select(kernel.swapaxes(-1, -2), k, layout=Layout.IO)
    assert columns.dtype == jnp.int32
    np.testing.assert_array_equal(columns, oracle(kernel, k))


@pytest.mark.parametrize("k", [1, 3, 20])
def test_blocks_of_equal_maxima_count_from_the_left(k):
    kernel = np.zeros((2, 1728), np.float32)
    kernel[0, 7::8] = 1  # one in every block, at its end
    kernel[1, 8:24] = [2, 2, 1, 2, 2, 2, 2, 2] * 2
    check(jnp.asarray(kernel), k)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_temporaries_are_less_than_one_layer(k, dtype):
    kernel = jax.ShapeDtypeStruct((6, 256, 1024), dtype)
    memory = selection.search.lower(kernel, k).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 256 * 1024 * jnp.dtype(dtype).itemsize


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_temporaries_of_the_other_layout_are_less_than_three_layers(dtype):
    kernel = jax.ShapeDtypeStruct((6, 1024, 256), dtype)
    memory = selection.search.lower(kernel, 4, layout=Layout.IO).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 3 * 256 * 1024 * jnp.dtype(dtype).itemsize


@pytest.mark.parametrize("k", [1, 3])
def test_ties_go_to_the_lowest_column(k):
    kernel = jnp.asarray([[0.5, -2.0, 2.0, -2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0], [-0.0, 1.0, -1.0, 0.5, 1.0]])
    expected = {1: [[1], [0], [1]], 3: [[1, 2, 3], [0, 1, 2], [1, 2, 4]]}[k]
    np.testing.assert_array_equal(selection.select(kernel, k), expected)


def test_bfloat16_ties_are_ties_of_the_stored_numbers():
    kernel = jnp.asarray([[1.0, 1.001, 0.25]]).astype(jnp.bfloat16)  # 1.001 rounds to 1
    np.testing.assert_array_equal(selection.select(selection.magnitude(kernel), 1), [[0]])


@pytest.mark.parametrize("k", [5, 6, 1000])
@pytest.mark.parametrize("leading", [(), (2,)])
def test_a_row_with_k_or_fewer_inputs_gets_all_of_them(k, leading):
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(*leading, 3, 5)), jnp.float32)
    columns = selection.select(kernel, k)
    np.testing.assert_array_equal(columns, np.broadcast_to(np.arange(5), (*leading, 3, 5)))


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_an_error(k):
    with pytest.raises(ValueError, match=f"k must be at least 1, found {k}"):
        selection.select(jnp.ones((2, 3)), k)


def test_another_score_selects_by_that_score():
    kernel = jnp.asarray([[-5.0, 3.0, 4.0], [1.0, -9.0, 0.0]])
    np.testing.assert_array_equal(selection.select(kernel, 2, lambda kernel: kernel), [[1, 2], [0, 2]])


@pytest.mark.parametrize("score", [scores.magnitude, scores.reverse])
@pytest.mark.parametrize("shape, dtype", [((3, 7), jnp.float32), ((2, 3, 328), jnp.bfloat16), ((2, 3, 328), jnp.float32)])
def test_weights_that_are_not_finite_are_named(score, shape, dtype):
    """Wherever they are, in both layouts; the last row is sound."""
    kernel = np.random.default_rng(0).normal(size=shape)
    for value, column in itertools.product((np.nan, np.inf, -np.inf), (0, shape[-1] // 2, shape[-1] - 1)):
        spoiled = kernel.copy()
        spoiled[..., 1, column] = value
        spoiled = jnp.asarray(spoiled, dtype)
        where = r"first at neuron \(0, 1\)" if len(shape) == 3 else r"first at neuron \(1,\)"
        with pytest.raises(UserError, match=f"NaN or infinite scores, {where}"):
            selection.select(spoiled, 2, score)
        with pytest.raises(UserError, match=where):
            selection.select(spoiled.swapaxes(-1, -2), 2, score, layout=Layout.IO)
    selection.select(jnp.asarray(kernel, dtype), 2, score)


@pytest.mark.parametrize(
    "score, expected",
    [
        (lambda kernel: np.abs(kernel), "write it with jax.numpy"),
        (lambda kernel: np.asarray(kernel), "write it with jax.numpy"),
        (lambda kernel: None, "the function returns None for kernel"),
        (lambda kernel: [kernel], r"has scores float32 \(1, 4, 16\)"),
        (lambda kernel: kernel[0], "expected float32"),
        (lambda kernel: kernel > 0, "expected float32"),
        (lambda kernel: kernel / 0, "NaN or infinite"),
    ],
)
def test_what_is_no_score_is_one_line(score, expected):
    with pytest.raises(UserError, match=expected):
        selection.select(jnp.ones((4, 16)), 2, score)
    with pytest.raises(UserError, match=r"expected a function .* found 'random'"):
        inspect.unwrap(selection.select)(jnp.ones((4, 16)), 2, "random")  # without the types that tests check


def test_abstract_shapes_are_enough():
    kernel = jax.ShapeDtypeStruct((32, 4096, 4096), jnp.bfloat16)
    columns = jax.eval_shape(lambda kernel: selection.select(kernel, 20), kernel)
    assert (columns.shape, columns.dtype) == ((32, 4096, 20), jnp.int32)


def test_a_layout_may_be_its_name_and_nothing_else():
    """In a process without the tests' own checks of argument types."""
    script = """
import jax, neuroada_jax as na
kernel = jax.random.normal(jax.random.key(0), (6, 6))
for layout in na.Layout:
    assert (na.select(kernel, 2, layout=layout.value) == na.select(kernel, 2, layout=layout)).all()
try:
    na.select(kernel, 2, layout="zz")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "'zz' is not a valid Layout\n"
