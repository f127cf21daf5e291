"""A vmap over examples is one call of the bypass op: equal to a batch, and no gradient of a single example is formed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equations
from quick import jit

from neuroada_jax.core import selection
from neuroada_jax.core.ops import Layout, bypass_dense

B, T, I, O, k = 5, 3, 12, 20, 3  # k = 3 of 12 inputs: the algorithm forms chunks of a dense dW
KERNEL, VALUES, X = (
    jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
    for seed, shape in enumerate([(O, I), (O, k), (B, T, I)])
)
COLUMNS = selection.select(KERNEL, k)


def layer(x, values=VALUES, kernel=KERNEL, columns=COLUMNS):
    return jnp.sin(bypass_dense(x, kernel, columns, values))


def batched(x, values):
    return layer(x, values)


FORMS = {
    "vmap": lambda x, values: jax.vmap(lambda x: layer(x, values))(x),
    "of vectors": lambda x, values: jax.vmap(jax.vmap(lambda x: layer(x, values)))(x),
    "other axes": lambda x, values: jax.vmap(lambda x: layer(x, values), in_axes=1, out_axes=1)(x),
    "jit inside": lambda x, values: jax.vmap(jax.jit(lambda x: layer(x, values)))(x),
    "remat": lambda x, values: jax.checkpoint(jax.vmap(lambda x: layer(x, values)))(x),
    "remat inside": lambda x, values: jax.vmap(jax.checkpoint(lambda x: layer(x, values)))(x),
    "scan inside": lambda x, values: jax.vmap(lambda x: jax.lax.scan(lambda _, x: (None, layer(x, values)), None, x)[1])(x),
}


@pytest.mark.parametrize("form", FORMS)
def test_examples_are_a_batch(form):
    def loss(function, x, values):
        y = function(x, values)
        return jnp.sum(y * jnp.cos(X @ KERNEL.T)), y

    got, want = (
        jit(jax.value_and_grad(functools.partial(loss, function), argnums=(0, 1), has_aux=True))(X, VALUES)
        for function in (FORMS[form], batched)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize("form", ["vmap", "of vectors", "remat inside"])
def test_no_gradient_of_an_example_is_formed(form):
    traced = jax.make_jaxpr(jax.grad(lambda values: jnp.sum(FORMS[form](X, values))))(VALUES)
    shapes = [out.aval.shape for equation in equations(traced.jaxpr) for out in equation.outvars]
    assert (O, k) in shapes
    assert not [shape for shape in shapes if len(shape) > 2 and shape[-2:] in ((O, I), (I, O), (O, k))]


def test_gradients_of_single_examples_are_there_for_who_asks():
    gradient = jax.grad(lambda values, x: jnp.sum(layer(x, values)))
    got = jit(jax.vmap(gradient, in_axes=(None, 0)))(VALUES, X)
    np.testing.assert_allclose(got, jnp.stack([gradient(VALUES, x) for x in X]), rtol=1e-5, atol=1e-5)


def test_layers_of_a_stack_are_mapped_one_by_one():
    kernels = jnp.stack([KERNEL, -KERNEL])
    columns, values = selection.select(kernels, k), jnp.stack([VALUES, 2 * VALUES])
    got = jit(jax.vmap(layer, in_axes=(None, 0, 0, 0)))(X, values, kernels, columns)
    want = [layer(X, *arrays) for arrays in zip(values, kernels, columns, strict=True)]
    np.testing.assert_allclose(got, jnp.stack(want), rtol=1e-5, atol=1e-5)


def test_a_kernel_with_its_neurons_last():
    def loss(values, x):
        return jnp.sum(jnp.sin(jax.vmap(lambda x: bypass_dense(x, KERNEL.T, COLUMNS, values, layout=Layout.IO))(x)))

    want = jit(jax.grad(lambda values: jnp.sum(batched(X, values))))(VALUES)
    np.testing.assert_allclose(jit(jax.grad(loss))(VALUES, X), want, rtol=1e-4, atol=1e-5)


def test_settings_are_those_of_the_call():
    def forward(x):
        with jax.default_matmul_precision("highest"):
            return layer(x)

    for function in (forward, jax.vmap(forward)):
        assert "precision = [HIGHEST, HIGHEST]" in jax.jit(function).lower(X).as_text()
