"""bypass_dense against a dense float64 oracle, and what its custom VJP keeps and forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equations
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import jit

from neuroada_jax.core import ops
from neuroada_jax.core.entries import Layout, add_entries
from neuroada_jax.core.value_gradient import GradientAlgorithm

# On a CPU, CUDA is another of these: test_cuda_kernels.py runs its own source.
ALGORITHMS = [algorithm for algorithm in GradientAlgorithm if algorithm is not GradientAlgorithm.CUDA]
LAYOUTS = list(Layout)


def random_columns(rng, outputs, inputs, k):
    """Ascending distinct columns (O, k)."""
    return np.sort(np.argsort(rng.random((outputs, inputs)), axis=1)[:, :k], axis=1).astype(np.int32)


def problem(seed, batch, outputs, inputs, k):
    """Random float64 numpy arrays x, kernel, values, dy and int32 columns."""
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(size=(*batch, inputs)), rng.normal(size=(*batch, outputs))
    kernel, values = rng.normal(size=(outputs, inputs)), rng.normal(size=(outputs, k))
    return x, kernel, random_columns(rng, outputs, inputs, k), values, dy


@jit
def dense_autodiff(x, kernel, columns, values, dy):
    """(y, dx, dvalues) by plain autodiff of the dense sum."""

    def dense(x, values):
        rows = jnp.arange(kernel.shape[0])[:, None]
        return jnp.einsum("...i,oi->...o", x, kernel.at[rows, columns].add(values))

    y, vjp = jax.vjp(dense, x, values)
    return y, *vjp(dy)


def oracle(x, kernel, columns, values, dy):
    """`dense_autodiff` in float64, from and to numpy arrays."""
    with jax.enable_x64(True):
        wide = lambda a: np.asarray(a, np.float64)  # noqa: E731
        return tuple(np.asarray(a) for a in dense_autodiff(wide(x), wide(kernel), columns, wide(values), wide(dy)))


def laid_out(kernel, layout):
    """A kernel (*L, O, I) in the given layout."""
    return kernel if layout is Layout.OI else kernel.swapaxes(-1, -2)


def actual(x, kernel, columns, values, dy, algorithm, resident, dtype, values_dtype, layout=Layout.OI):
    """(y, dx, dkernel, dvalues) of bypass_dense in the given dtypes, as numpy arrays."""
    x, kernel, dy = (jnp.asarray(a, dtype) for a in (x, laid_out(kernel, layout), dy))

    @jit
    def value_and_pullback(x, kernel, columns, values, dy):
        kernel = add_entries(kernel, columns, values, layout) if resident else kernel

        def apply(x, kernel, values):
            return ops.bypass_dense(x, kernel, columns, values, resident=resident, algorithm=algorithm, layout=layout)

        y, vjp = jax.vjp(apply, x, kernel, values)
        return y, *vjp(dy)

    y, dx, dkernel, dvalues = value_and_pullback(x, kernel, columns, jnp.asarray(values, values_dtype), dy)
    assert (y.dtype, dx.dtype, dvalues.dtype) == (dtype, dtype, values_dtype)
    return tuple(np.asarray(a, np.float64) for a in (y, dx, dkernel, dvalues))


shapes = st.tuples(
    st.sampled_from([(), (1,), (5,), (2, 3), (2, 1, 4)]),  # leading batch dimensions
    st.sampled_from([1, 3, 64, 96]),  # O
    st.sampled_from([1, 2, 17, 40]),  # I
    st.sampled_from([1, 3, 20, None]),  # k, clipped to I; None: all
    st.integers(0, 2**31),
)


@pytest.mark.parametrize("resident", [False, True], ids=["on_the_fly", "resident"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=6)
@given(shape=shapes, layout=st.sampled_from(LAYOUTS))
def test_float64_equals_the_dense_oracle(algorithm, resident, shape, layout):
    batch, outputs, inputs, k, seed = shape
    arrays = problem(seed, batch, outputs, inputs, min(k or inputs, inputs))
    y, dx, dvalues = oracle(*arrays)
    with jax.enable_x64(True):
        got_y, got_dx, got_dkernel, got_dvalues = actual(*arrays, algorithm, resident, jnp.float64, jnp.float64, layout)
    np.testing.assert_allclose(got_y, y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got_dx, dx, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got_dvalues, dvalues, rtol=1e-12, atol=1e-12)
    assert not got_dkernel.any()  # frozen: the kernel's cotangent is zero


@pytest.mark.parametrize("resident", [False, True], ids=["on_the_fly", "resident"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)], ids=["f32", "bf16"])
def test_working_precision_stays_near_the_dense_oracle(algorithm, resident, dtype, tolerance):
    near_the_dense_oracle(algorithm, resident, dtype, tolerance, Layout.OI)


@pytest.mark.parametrize("resident", [False, True], ids=["on_the_fly", "resident"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)], ids=["f32", "bf16"])
def test_working_precision_in_the_other_layout(resident, dtype, tolerance):
    near_the_dense_oracle(GradientAlgorithm.COLUMN_GATHER, resident, dtype, tolerance, Layout.IO)


def near_the_dense_oracle(algorithm, resident, dtype, tolerance, layout):
    arrays = problem(0, (2, 24), 64, 48, 5)
    x, kernel, dy = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (arrays[0], arrays[1], arrays[4]))
    columns, values = arrays[2], np.asarray(arrays[3], np.float32)
    truth = oracle(x, kernel, columns, values, dy)
    y, dx, _, dvalues = actual(x, kernel, columns, values, dy, algorithm, resident, dtype, jnp.float32, layout)
    for got, want in zip((y, dx, dvalues), truth, strict=True):
        assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)
    # The sum over tokens is float32 at least: with exact bfloat16 factors dvalues has float32 accuracy.
    assert np.linalg.norm(dvalues - truth[2]) <= 2e-6 * np.linalg.norm(truth[2])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_values_in_the_base_dtype_get_a_gradient_in_it(algorithm):
    arrays = problem(1, (8,), 16, 12, 3)
    dvalues = oracle(*arrays)[2]
    got = actual(*arrays, algorithm, False, jnp.bfloat16, jnp.bfloat16)[3]
    np.testing.assert_allclose(got, dvalues, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_forward_pass_reads_the_weight_that_merging_writes(layout, k, dtype):
    """Bit for bit in both forms, forward and for dx, with values of which many round to nothing."""
    arrays = problem(3, (2, 24), 64, 48, k)
    x, kernel, dy = (jnp.asarray(a, dtype) for a in (arrays[0], laid_out(arrays[1], layout), arrays[4]))
    columns, values = jnp.asarray(arrays[2]), jnp.asarray(arrays[3] * np.logspace(-5, -1, 64)[:, None], jnp.float32)
    merged = np.array(kernel).swapaxes(-1, -2) if layout is Layout.IO else np.array(kernel)
    entries = np.take_along_axis(merged, arrays[2], axis=1)
    new = (entries.astype(np.float32) + np.asarray(values)).astype(entries.dtype)
    assert 0.1 < np.mean(new == entries) < 0.9
    np.put_along_axis(merged, arrays[2], new, axis=1)
    merged = jnp.asarray(laid_out(merged, layout))

    def plain(x):
        return jax.lax.dot_general(x, merged, (((2,), (1 if layout is Layout.OI else 0,)), ((), ())))

    def on_the_fly(x):
        return ops.bypass_dense(x, kernel, columns, values, layout=layout)

    def resident(x):
        return ops.bypass_dense(x, merged, columns, values, resident=True, layout=layout)

    def forward_and_backward(function):
        y, pull = jit(functools.partial(jax.vjp, function))(x)
        return y, *jit(pull)(dy)

    want = forward_and_backward(plain)
    for function in on_the_fly, resident:
        jax.tree.map(np.testing.assert_array_equal, forward_and_backward(function), want)


@pytest.mark.parametrize("per_adapter_columns", [False, True])
def test_vmap_over_adapters_equals_one_by_one(per_adapter_columns):
    rng = np.random.default_rng(6)
    x, kernel, _, _, _ = problem(6, (5,), 12, 10, 3)
    x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    columns = jnp.asarray(np.stack([random_columns(rng, 12, 10, 3) for _ in range(4)]))
    columns = columns if per_adapter_columns else columns[0]
    values = jnp.asarray(rng.normal(size=(4, 12, 3)), jnp.float32)
    axes = (0 if per_adapter_columns else None, 0)

    def loss(columns, values):
        y = ops.bypass_dense(x, kernel, columns, values)
        return jnp.sum(jnp.sin(y)), y

    gradient = jax.grad(loss, argnums=1, has_aux=True)
    one = jit(gradient)
    got_gradient, got_y = jit(jax.vmap(gradient, in_axes=axes))(columns, values)
    for i in range(4):
        want_gradient, want_y = one(columns[i] if per_adapter_columns else columns, values[i])
        np.testing.assert_allclose(got_y[i], want_y, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got_gradient[i], want_gradient, rtol=1e-4, atol=1e-4)


# What the VJP keeps and what the gradient forms. Sizes are all different, so that a shape tells what an array is.
T, O, I, K = 96, 320, 80, 3


def arguments(dtype=jnp.float32):
    arrays = problem(7, (T,), O, I, K)
    x, kernel, dy = (jnp.asarray(a, dtype) for a in (arrays[0], arrays[1], arrays[4]))
    columns, values = jnp.asarray(arrays[2]), jnp.asarray(arrays[3], jnp.float32)
    return x, kernel, columns, values, dy


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("resident", [False, True], ids=["on_the_fly", "resident"])
def test_residuals_are_the_arguments_alone(algorithm, resident, dtype):
    x, kernel, columns, values, _ = arguments(dtype)
    _, vjp = jax.vjp(
        lambda x, kernel, values: ops.bypass_dense(x, kernel, columns, values, resident=resident, algorithm=algorithm),
        x,
        kernel,
        values,
    )
    residuals = [leaf for leaf in jax.tree.leaves(vjp) if leaf.size]
    kept = {"kernel": kernel, "columns": columns} if resident else {"kernel": kernel, "columns": columns, "values": values}
    assert sorted(r.shape for r in residuals) == sorted([x.shape, *(a.shape for a in kept.values())])
    # The very buffers, not copies: the kernel costs nothing for being kept.
    pointers = {r.unsafe_buffer_pointer() for r in residuals}
    assert {a.unsafe_buffer_pointer() for a in kept.values()} <= pointers


def gradient_equations(algorithm, resident, layout=Layout.OI):
    x, kernel, columns, values, _ = arguments()
    kernel = laid_out(kernel, layout)

    def loss(x, values, kernel):
        return jnp.sum(
            jnp.sin(ops.bypass_dense(x, kernel, columns, values, resident=resident, algorithm=algorithm, layout=layout))
        )

    return list(equations(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, values, kernel).jaxpr))


def rows_of_dense_gradient(equations):
    """The number of rows of every dot product that contracts the tokens into (rows, I)."""
    outputs = [e.outvars[0].aval.shape for e in equations if e.primitive.name == "dot_general"]
    return [shape[0] for shape in outputs if len(shape) == 2 and shape[1] == I and shape[0] != T]


@pytest.mark.parametrize("algorithm", [GradientAlgorithm.COLUMN_GATHER, GradientAlgorithm.TOKEN_BLOCKS])
@pytest.mark.parametrize("resident", [False, True], ids=["on_the_fly", "resident"])
def test_no_dense_kernel_gradient_is_formed(algorithm, resident):
    found = gradient_equations(algorithm, resident)
    assert rows_of_dense_gradient(found) == []
    weight_sized = [
        e.primitive.name for e in found for v in e.outvars if v.aval.size >= O * I and v.aval.shape[-1:] == (I,)
    ]
    # On the fly forms W + D once in the forward and once in the backward pass; resident nothing of the kind.
    formed = [name for name in weight_sized if name not in ("pjit", "jit", "custom_vjp_call", "custom_vjp_call_jaxpr")]
    assert formed == ([] if resident else ["scatter-add", "scatter-add"])


@pytest.mark.parametrize("resident", [False, True], ids=["on_the_fly", "resident"])
def test_the_other_layout_transposes_no_kernel(resident):
    found = gradient_equations(GradientAlgorithm.COLUMN_GATHER, resident, Layout.IO)
    assert rows_of_dense_gradient(found) == []
    of_kernel = [e.primitive.name for e in found for v in e.outvars if sorted(v.aval.shape) == sorted((O, I))]
    formed = [name for name in of_kernel if name not in ("pjit", "jit", "custom_vjp_call", "custom_vjp_call_jaxpr")]
    assert formed == ([] if resident else ["scatter-add", "scatter-add"])
