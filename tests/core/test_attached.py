"""A kernel with a bypass in the place of the array: every product, every transformation, and what raises."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equations
from quick import jit

import neuroada_jax as na
from neuroada_jax.core.attached import BypassKernel
from neuroada_jax.core.ops import Layout, add_entries
from neuroada_jax.errors import UserError

I, O, k = 12, 20, 2
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, I)), jnp.float32)


def kernel(layout, *leading):
    """An attached kernel with random values, and the same as an array."""
    rng = np.random.default_rng(1)
    array = jnp.asarray(rng.normal(size=(*leading, O, I) if layout is Layout.OI else (*leading, I, O)), jnp.float32)
    built = na.build({"hidden": {"w": array}}, [("hidden", "w")], k, layout=layout)
    values = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), built.values)
    attached = na.attach({"hidden": {"w": array}}, na.Bypass(values, built.columns), layout=layout)["hidden"]["w"]
    return attached, add_entries(array, attached.columns, attached.values, layout)


def scanned(w, x):
    return jax.lax.scan(lambda x, w: (jnp.sin(x @ w @ jnp.ones((O, I))), None), x, w)[0]


USES = {
    "x @ w": (Layout.IO, (), lambda w, x: x @ w),
    "x @ w.T": (Layout.OI, (), lambda w, x: x @ w.T),
    "w @ vector": (Layout.OI, (), lambda w, x: w @ x[0, 0]),
    "w @ matrices": (Layout.OI, (), lambda w, x: w @ x.mT),
    "w.T @ matrices": (Layout.IO, (), lambda w, x: w.T @ x.mT),
    "NumPy on the left": (Layout.IO, (), lambda w, x: np.ones((3, I), np.float32) @ w),
    "vmap over examples": (Layout.OI, (), lambda w, x: jax.vmap(jax.vmap(lambda x: w @ x))(x)),
    "vmap over the stack": (Layout.IO, (3,), lambda w, x: jax.vmap(lambda w: x @ w)(w)),
    "remat": (Layout.IO, (), lambda w, x: jax.checkpoint(lambda w, x: jnp.sin(x @ w))(w, x)),
    "scan over the stack": (Layout.IO, (3,), scanned),
    "jit inside": (Layout.IO, (), lambda w, x: jax.jit(lambda w, x: x @ w)(w, x)),
}


@pytest.mark.parametrize("use", USES)
def test_it_is_used_as_the_array_is(use):
    layout, leading, function = USES[use]
    attached, _ = kernel(layout, *leading)

    def loss(values, form):
        w = BypassKernel(attached.kernel, attached.columns, values, layout, "w")
        w = w if form == "attached" else add_entries(w.kernel, w.columns, values, layout)
        y = function(w, X)
        return jnp.sum(jnp.sin(y)), y

    got, want = (
        jit(jax.value_and_grad(functools.partial(loss, form=form), has_aux=True))(attached.values)
        for form in ("attached", "merged")
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, want)
    assert jax.tree.leaves(want)[-1].any()


@pytest.mark.parametrize("use", ["x @ w", "w @ matrices", "vmap over examples", "remat", "scan over the stack"])
def test_no_dense_gradient_is_formed(use):
    layout, leading, function = USES[use]
    attached, _ = kernel(layout, *leading)
    attached = na.BypassKernel(attached.kernel, attached.columns[..., :1], attached.values[..., :1], layout, "w")

    def products(loss, *arguments):
        traced = jax.make_jaxpr(jax.grad(loss))(*arguments)
        shapes = [e.outvars[0].aval.shape[-2:] for e in equations(traced.jaxpr) if e.primitive.name == "dot_general"]
        return shapes.count((O, I)) + shapes.count((I, O))

    def loss(values):
        return jnp.sum(function(BypassKernel(attached.kernel, attached.columns, values, layout, "w"), X))

    assert products(loss, attached.values) == 0
    assert products(lambda array: jnp.sum(function(array, X)), attached.kernel) > 0


def test_it_describes_the_array():
    attached, array = kernel(Layout.IO)
    assert (attached.shape, attached.ndim, attached.dtype) == (array.shape, 2, array.dtype)
    assert (attached.T.shape, attached.T.T.shape) == (array.T.shape, array.shape)
    assert copy.copy(attached).shape == array.shape
    np.testing.assert_allclose(attached(X), X @ array, rtol=1e-5, atol=1e-5)


def test_dtypes_are_promoted_as_for_arrays():
    attached, array = kernel(Layout.IO)
    half = X.astype(jnp.bfloat16)
    with pytest.raises(jax.dtypes.TypePromotionError, match="strict"):
        half @ attached
    with jax.numpy_dtype_promotion("standard"):
        assert (half @ attached).dtype == jnp.float32
        np.testing.assert_allclose(half @ attached, half @ array, rtol=1e-4, atol=1e-4)


def test_a_bfloat16_kernel_is_rounded_as_merged_before_it_meets_a_wider_x():
    attached, _ = kernel(Layout.IO)
    attached = dataclasses.replace(attached, kernel=attached.kernel.astype(jnp.bfloat16))
    merged = add_entries(attached.kernel, attached.columns, attached.values, Layout.IO)
    with jax.numpy_dtype_promotion("standard"):
        for function in (lambda w: X @ w), jit(lambda w: X @ w):
            np.testing.assert_array_equal(function(attached), function(merged))


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w[0],
        lambda w: w + 1.0,
        lambda w: 2.0 * w,
        lambda w: -w,
        lambda w: w**2,
        lambda w: X[0] * w,
        lambda w: w.reshape(-1),
        lambda w: w.astype(jnp.bfloat16),
        lambda w: w.at[0].set(0.0),
    ],
)
def test_other_uses_name_the_weight(use):
    with pytest.raises(UserError, match=r"^hidden.w carries a bypass, which supports only x @ w, w @ x, w.T and w\(x\)$"):
        use(kernel(Layout.IO)[0])


@pytest.mark.parametrize(
    "use",
    [
        lambda w: jnp.einsum("bti,io->bto", X, w),
        lambda w: jnp.dot(X, w),
        lambda w: jax.lax.dot_general(X, w, (((2,), (0,)), ((), ()))),
        lambda w: jnp.sum(w),
        lambda w: jnp.take(w, jnp.arange(2), axis=0),
    ],
)
def test_functions_of_arrays_name_the_class(use):
    with pytest.raises(TypeError, match="BypassKernel"):
        use(kernel(Layout.IO)[0])


def test_products_over_the_neurons_are_refused():
    for layout, product, use in (
        (Layout.OI, r"x @ w with layout OI", lambda w: X @ w),
        (Layout.IO, r"w @ x with layout IO", lambda w: w @ X.mT),
        (Layout.IO, r"x @ w with the transpose of layout IO", lambda w: X @ w.T),
    ):
        with pytest.raises(UserError, match=f"^hidden.w: {product} sums over neurons, expected over inputs$"):
            use(kernel(layout)[0])


def test_stacked_kernels_are_no_single_map():
    with pytest.raises(UserError, match=r"^hidden.w: found stacked kernels \(3, 12, 20\), expected one linear map"):
        X @ kernel(Layout.IO, 3)[0]


def test_attach_keeps_the_tree_and_checks_the_columns():
    array, other = jnp.ones((O, I)), jnp.ones(3)
    params = {"a": {"kernel": array, "bias": other}, "b": array, "c": other}
    built = na.build(params, [("a",), ("b",)], 1)
    attached = na.attach(params, built)
    assert (attached["a"]["kernel"].name, attached["b"].name) == ("a", "b")
    assert attached["a"]["bias"] is other and attached["c"] is other and params["b"] is array
    for message, call in (
        (
            r"^a: a kernel \(20, 12\) in layout IO does not fit columns \(20, 1\)",
            lambda: na.attach(params, built, layout=Layout.IO),
        ),
        ("^a carries a bypass already$", lambda: na.attach(attached, built)),
    ):
        with pytest.raises(UserError, match=message):
            call()
    with pytest.raises(KeyError, match="b holds no kernel"):
        na.attach({"a": params["a"]}, built)
