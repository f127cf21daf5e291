"""Bypass layers in plain NNX models: training against a dense oracle, merging, transformations, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import equations

import neuroada_jax as na
import neuroada_jax.nnx
from neuroada_jax.adapters import own
from neuroada_jax.core import trees
from neuroada_jax.core.ops import Layout
from neuroada_jax.errors import UserError

D, F, T = 12, 20, 5
BypassValue = na.nnx.BypassValue
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, T, D)), jnp.float32)


class Block(nnx.Module):
    """A transformer block from Flax's own parts, written by somebody who never heard of a bypass."""

    def __init__(self, rngs: nnx.Rngs, dtype=None):
        self.norm_1, self.norm_2 = nnx.LayerNorm(D, dtype=dtype, rngs=rngs), nnx.LayerNorm(D, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, D, dtype=dtype, decode=False, keep_rngs=False, rngs=rngs)
        self.up = nnx.Linear(D, F, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(F, D, dtype=dtype, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class Model(nnx.Module):
    """Two blocks, and one layer that is used twice."""

    def __init__(self, rngs: nnx.Rngs, dtype=None):
        self.blocks = nnx.List([Block(rngs, dtype) for _ in range(2)])
        self.shared = nnx.Linear(D, D, dtype=dtype, rngs=rngs)
        self.twice = self.shared

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.twice(nnx.tanh(self.shared(x)))


@functools.cache
def prepared(targets=None, k=1):
    """A model and a bypass with random values."""
    model = Model(nnx.Rngs(0))
    built = na.nnx.build(model, targets=targets, k=k)
    rng = np.random.default_rng(1)
    values = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype), built.values)
    return model, built._replace(values=values)


def dense_loss(model, values, columns, x):
    """The oracle: autodiff through kernels with the values scattered into them."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    merged = na.merge(na.nnx.parameters(model), na.Bypass(values, columns), layout=Layout.IO)
    flat = dict(nnx.to_flat_state(params))
    for path, variable in flat.items():
        module = tuple(map(str, path[:-1]))
        if path[-1] == "kernel":
            flat[path] = variable.copy(trees.kernel_at(merged, module))
    return jnp.mean(nnx.merge(graphdef, nnx.from_flat_state(flat), rest)(x) ** 2)


def loss_of(model, x):
    return jnp.mean(model(x) ** 2)


def test_training_values_alone_equals_the_dense_oracle():
    plain, bypass = prepared(k=2)
    before = jax.tree.map(jnp.copy, nnx.state(plain, nnx.Param))
    model = na.nnx.attach(plain, bypass)
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=BypassValue)

    @nnx.jit
    def step(model, optimizer, x):
        value, gradient = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, BypassValue))(model, x)
        with jax.numpy_dtype_promotion("standard"):  # for Adam
            optimizer.update(model, gradient)
        return value

    losses = [step(model, optimizer, X) for _ in range(4)]

    oracle = jax.jit(jax.value_and_grad(lambda values: dense_loss(plain, values, bypass.columns, X)))
    values, transformation = bypass.values, optax.adam(0.01)
    state, expected = transformation.init(values), []
    for _ in range(4):
        value, gradient = oracle(values)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = transformation.update(gradient, state)
        values = optax.apply_updates(values, updates)
        expected.append(value)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    trained = na.nnx.detach(model)[1]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), trained.values, values)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.Param), before)


def test_no_dense_gradient_is_formed():
    plain, bypass = prepared()

    def dense_products(model, wrt):
        graphdef, differentiated, rest = nnx.split(model, wrt, ...)
        loss = lambda state: loss_of(nnx.merge(graphdef, state, rest), X)  # noqa: E731
        traced = jax.make_jaxpr(jax.grad(loss))(differentiated)
        dots = [e.outvars[0].aval.shape for e in equations(traced.jaxpr) if e.primitive.name == "dot_general"]
        return sum(sorted(shape) in ([D, F], [D, D], [3, 4, D]) for shape in dots)

    assert dense_products(na.nnx.attach(plain, bypass), BypassValue) == 0
    assert dense_products(plain, nnx.Param) == 2 * 6 + 2


def test_merging_gives_plain_layers_and_detaching_the_model():
    plain, bypass = prepared(k=3)
    attached = na.nnx.attach(plain, bypass)
    got = attached(X)
    merged = na.nnx.merge(plain, bypass)
    np.testing.assert_allclose(merged(X), got, rtol=1e-5, atol=1e-5)
    assert np.abs(got - plain(X)).max() > 0.05
    detached, trained = na.nnx.detach(attached)
    jax.tree.map(np.testing.assert_array_equal, trained, bypass)
    assert nnx.graphdef(merged) == nnx.graphdef(detached) == nnx.graphdef(plain)
    detached.shared.kernel[...] += 1
    assert (detached.shared.kernel[...] != attached.shared.kernel[...]).all()


def test_values_start_from_zero_and_types_are_their_own():
    model = Model(nnx.Rngs(0))
    built = na.nnx.build(model, targets=["up"], k=100, dtype=jnp.bfloat16, score=lambda kernel: -jnp.abs(kernel))
    values = built.values["blocks"]["1"]["up"]["values"]
    assert (values.shape, values.dtype, bool(values.any())) == ((F, D), jnp.bfloat16, False)
    attached = na.nnx.attach(model, built)
    assert len(jax.tree.leaves(nnx.state(attached, BypassValue))) == 2
    assert jax.tree.structure(nnx.state(attached, nnx.Param)) == jax.tree.structure(nnx.state(model, nnx.Param))
    with pytest.raises(ValueError, match="k must be at least 1"):
        na.nnx.build(model, targets=["up"], k=0)


def test_targets_are_paths_last_components_or_a_predicate():
    model, _ = prepared()

    def paths(targets):
        return [".".join(path) for path, _ in trees.leaves(na.nnx.build(model, targets=targets, k=1).columns, "columns")]

    assert paths(["blocks.1.up"]) == ["blocks.1.up"]
    assert paths(["query", "shared"])[:2] == ["blocks.0.attention.query", "blocks.1.attention.query"]
    assert paths(lambda path: path.startswith("blocks.0.") and "attention" not in path) == ["blocks.0.down", "blocks.0.up"]
    assert len(paths(None)) == 2 * 6 + 1
    for wrong in (["u"], ["blocks.1"], ["norm_1"], lambda path: False):
        with pytest.raises(UserError, match=r"no linear map.* this model has .*blocks.0.attention.query"):
            paths(wrong)


def test_half_precision_layers_of_float32_parameters_compute_what_the_merged_ones_do():
    """W + D is rounded to the parameters' dtype, and only then cast to the layer's; detached layers are as they were."""
    half, (_, bypass) = Model(nnx.Rngs(0), jnp.bfloat16), prepared()
    attached = na.nnx.attach(half, bypass)
    with jax.numpy_dtype_promotion("standard"):
        got, want = (nnx.jit(lambda model: model(X))(each) for each in (attached, na.nnx.merge(half, bypass)))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want)
    assert nnx.graphdef(na.nnx.detach(attached)[0]) == nnx.graphdef(half)


def test_scanned_and_rematerialised_layers():
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(key):
        return Block(nnx.Rngs(key))

    layers = stacked(jax.random.split(jax.random.key(0), 3))
    bypass = na.nnx.build(layers, targets=["query", "out", "down"], k=2)
    assert bypass.values["attention"]["out"]["values"].shape == (3, D, 2)
    bypass = bypass._replace(values=jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.1), bypass.values))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat
    def forward(block, x):
        return block(x)

    np.testing.assert_allclose(
        forward(na.nnx.attach(layers, bypass), X), forward(na.nnx.merge(layers, bypass), X), rtol=1e-5, atol=1e-5
    )

    @nnx.jit
    def gradient(layers):
        return nnx.grad(lambda layers: jnp.sum(forward(layers, X)), argnums=nnx.DiffState(0, BypassValue))(layers)

    got = gradient(na.nnx.attach(layers, bypass))
    want = jax.grad(lambda values: jnp.sum(forward(na.nnx.merge(layers, bypass._replace(values=values)), X)))(bypass.values)
    got = got["attention"]["query"]["dot_general"]["values"].get_value()
    np.testing.assert_allclose(got, want["attention"]["query"]["values"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [-1, (-2, -1), (1, 2), 1])
@pytest.mark.parametrize("features", [6, (2, 3)])
def test_linear_general_over_any_axes(axis, features):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4, 3)), jnp.float32)
    inputs = tuple(x.shape[each] for each in (axis if isinstance(axis, tuple) else (axis,)))
    model = nnx.Sequential(nnx.LinearGeneral(inputs, features, axis=axis, rngs=nnx.Rngs(0)))
    bypass = na.nnx.build(model, k=2)
    bypass = bypass._replace(values=jax.tree.map(jnp.ones_like, bypass.values))
    got = na.nnx.attach(model, bypass)(x)
    np.testing.assert_allclose(got, na.nnx.merge(model, bypass)(x), rtol=1e-5, atol=1e-5)
    assert np.abs(got - model(x)).max() > 0.1


def test_adapters_come_back_and_another_model_is_refused(tmp_path):
    model, bypass = prepared(k=2)
    own.save(tmp_path / "adapter", bypass, na.nnx.parameters(model))
    loaded = own.load(tmp_path / "adapter", na.nnx.parameters(Model(nnx.Rngs(0))))
    jax.tree.map(np.testing.assert_array_equal, loaded, bypass)
    other = Model(nnx.Rngs(0))
    other.blocks[1].up.kernel[...] += 1
    with pytest.raises(UserError, match=r"^this tree is not the base .*: tensor 'blocks.1.up' differs$"):
        own.load(tmp_path / "adapter", na.nnx.parameters(other))


class Own(nnx.Linear):
    """A layer that does not call `dot_general`."""

    def __call__(self, inputs, out_sharding=None):
        return inputs @ self.kernel[...]


def odd(name):
    rngs = nnx.Rngs(0)
    return {
        "precise": lambda: nnx.Linear(D, D, precision="highest", rngs=rngs),
        "wide": lambda: nnx.Linear(D, D, preferred_element_type=jnp.float32, rngs=rngs),
        "quantised": lambda: nnx.Linear(D, D, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k), rngs=rngs),
        "classed": lambda: nnx.LinearGeneral(D, D, dot_general_cls=lambda: jax.lax.dot_general, rngs=rngs),
        "batched": lambda: nnx.LinearGeneral(D, D, batch_axis={0: 2}, rngs=rngs),
        "own": lambda: Own(D, D, rngs=rngs),
    }[name]()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("precise", "precision highest"),
        ("wide", "preferred_element_type <class 'jax.numpy.float32'>"),
        ("quantised", "dot_general of its own"),
        ("classed", "dot_general of its own"),
        ("batched", "batch_axis"),
        ("own", "a Own with a __call__ of its own"),
    ],
)
def test_what_cannot_carry_a_bypass_is_named(name, message):
    model = nnx.Dict({name: odd(name), "plain": nnx.Linear(D, D, rngs=nnx.Rngs(0))})
    na.nnx.build(model, targets=["plain"], k=1)
    by_hand = na.build({name: jnp.ones((D, D))}, [(name,)], 1)
    for call in (
        lambda: na.nnx.build(model, targets=[name], k=1),
        lambda: na.nnx.attach(model, by_hand),
        lambda: na.nnx.merge(model, by_hand),
    ):
        with pytest.raises(UserError, match=f"^{name}: .*{message}"):
            call()


def test_bad_input():
    model, bypass = prepared()
    with pytest.raises(UserError, match=r"^a LayerNorm without nnx.Linear layers: nothing in it can carry a bypass$"):
        na.nnx.build(nnx.LayerNorm(D, rngs=nnx.Rngs(0)), k=1)
    attached = na.nnx.attach(model, bypass)
    with pytest.raises(UserError, match=r"^blocks.0.attention.key: this layer carries a bypass already$"):
        na.nnx.attach(attached, bypass)
    with pytest.raises(UserError, match=r"^other is no linear layer; this model has blocks.0"):
        na.nnx.attach(model, na.build({"other": jnp.ones((D, D))}, [("other",)], 1))
    unfit = na.build({"shared": jnp.ones((F, D))}, [("shared",)], 1)
    with pytest.raises(UserError, match=r"^shared: a kernel \(12, 12\) does not fit columns \(20, 1\)"):
        na.nnx.attach(model, unfit)
    with pytest.raises(UserError, match=r"^shared: a layer with a bypass cannot take out_sharding"):
        attached.shared(X, out_sharding=jax.sharding.PartitionSpec())
