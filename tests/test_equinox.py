"""Bypass layers in plain Equinox models: training against a dense oracle, merging, and what is refused."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import equations

import neuroada_jax as na
import neuroada_jax.equinox
from neuroada_jax.adapters import own
from neuroada_jax.core import trees
from neuroada_jax.errors import UserError

D, F, B, T = 12, 20, 4, 5
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)


class Block(eqx.Module):
    """A transformer block from Equinox's own parts, written by somebody who never heard of a bypass."""

    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norm: eqx.nn.LayerNorm
    size: int = eqx.field(static=True)

    def __init__(self, key):
        keys = jax.random.split(key)
        self.attention, self.norm = eqx.nn.MultiheadAttention(3, D, key=keys[0]), eqx.nn.LayerNorm(D)
        self.mlp, self.size = eqx.nn.MLP(D, D, F, 1, key=keys[1]), D

    def __call__(self, x):
        y = jax.vmap(self.norm)(x)
        x = x + self.attention(y, y, y)
        return x + jax.vmap(self.mlp)(x)


def prepared(model, k=1, **options):
    """A bypass with random values."""
    built = na.equinox.build(model, k=k, **options)
    rng = np.random.default_rng(1)
    random = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype), built.values)
    return built._replace(values=random)


@functools.cache
def block():
    model = Block(jax.random.key(0))
    return model, prepared(model, k=2)


def forward(model, x):
    return eqx.filter_jit(lambda model, x: jax.vmap(model)(x))(model, x)


def losses_of(model, bypass, with_values):
    """Four steps of Adam on the values alone; the losses and the values."""
    transformation = optax.adam(0.01)

    @jax.jit
    def step(values, state):
        loss = lambda values: jnp.mean(jax.vmap(jax.vmap(with_values(model, bypass._replace(values=values))))(X) ** 2)  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(values)
        with jax.numpy_dtype_promotion("standard"):  # for Adam
            updates, state = transformation.update(gradient, state)
        return optax.apply_updates(values, updates), state, value

    values, state, losses = bypass.values, transformation.init(bypass.values), []
    for _ in range(4):
        values, state, loss = step(values, state)
        losses.append(loss)
    return losses, values


def test_training_values_alone_equals_the_dense_oracle():
    model = eqx.nn.MLP(D, 3, F, 2, key=jax.random.key(1))
    bypass = prepared(model, k=2)
    got = losses_of(model, bypass, na.equinox.attach)
    want = losses_of(model, bypass, na.equinox.merge)  # autodiff through kernels with the values scattered into them
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)
    assert got[0][-1] < got[0][0]


def test_no_dense_gradient_is_formed():
    model = eqx.nn.MLP(D, 3, F, 2, key=jax.random.key(1))
    bypass = prepared(model)

    def dense_products(loss, wrt):
        traced = jax.make_jaxpr(jax.grad(loss))(wrt)
        dots = [e.outvars[0].aval.shape[-2:] for e in equations(traced.jaxpr) if e.primitive.name == "dot_general"]
        return sum(sorted(shape) in ([D, F], [F, F], [3, F]) for shape in dots)

    def loss(values):
        return jnp.sum(jax.vmap(jax.vmap(na.equinox.attach(model, bypass._replace(values=values))))(X))

    arrays, static = eqx.partition(model, eqx.is_array)
    assert dense_products(loss, bypass.values) == 0
    assert dense_products(lambda arrays: jnp.sum(jax.vmap(jax.vmap(eqx.combine(arrays, static)))(X)), arrays) == 3


def test_merging_gives_plain_layers():
    model, bypass = block()
    got, merged = forward(na.equinox.attach(model, bypass), X), na.equinox.merge(model, bypass)
    np.testing.assert_allclose(forward(merged, X), got, rtol=1e-5, atol=1e-5)
    assert np.abs(got - forward(model, X)).max() > 0.05
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    base = na.read(na.equinox.parameters(model), bypass.columns)
    original = na.unmerge(na.equinox.parameters(merged), bypass.columns, base)
    assert eqx.tree_equal(trees.from_nested(merged, original), model)


def test_parameters_of_the_model_get_no_gradient_from_its_bypass_layers():
    model, bypass = block()
    gradient = eqx.filter_grad(lambda model: jnp.sum(jax.vmap(model)(X) ** 2))(na.equinox.attach(model, bypass))
    weight = gradient.attention.query_proj.weight
    assert not weight.kernel.any() and weight.values.any() and gradient.norm.weight.any()


def test_ensembles_and_checkpointed_layers():
    models = eqx.filter_vmap(lambda key: eqx.nn.MLP(D, 3, F, 1, key=key))(jax.random.split(jax.random.key(0), 3))
    bypass = prepared(models, targets=["layers.0"], k=2)
    assert bypass.values["layers"]["0"]["weight"]["values"].shape == (3, F, 2)

    @eqx.filter_jit
    def run(models):
        of_one = eqx.filter_vmap(lambda model, x: eqx.filter_checkpoint(model)(x), in_axes=(eqx.if_array(0), None))
        return jax.vmap(lambda x: of_one(models, x))(X[0])

    got, want = run(na.equinox.attach(models, bypass)), run(na.equinox.merge(models, bypass))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_targets_are_paths_last_components_or_a_predicate():
    model, _ = block()

    def paths(targets):
        return [
            ".".join(path[:-1])
            for path, _ in trees.leaves(na.equinox.build(model, targets=targets, k=1).columns, "columns")
        ]

    assert paths(["mlp.layers.1"]) == ["mlp.layers.1"]
    assert paths(["query_proj"]) == ["attention.query_proj"]
    assert paths(lambda path: path.startswith("mlp")) == ["mlp.layers.0", "mlp.layers.1"]
    assert len(paths(None)) == 6
    for wrong in (["proj"], ["mlp"], ["norm"], lambda path: False):
        with pytest.raises(UserError, match=r"no linear map.* this model has .*attention.query_proj"):
            paths(wrong)


def test_options_of_build():
    model, _ = block()
    score = lambda kernel: -jnp.abs(kernel)  # noqa: E731
    built = na.equinox.build(model, targets=["query_proj"], k=3, dtype=jnp.bfloat16, score=score)
    node = built.values["attention"]["query_proj"]["weight"]["values"]
    assert (node.shape, node.dtype, bool(node.any())) == ((D, 3), jnp.bfloat16, False)
    columns = built.columns["attention"]["query_proj"]["weight"]["columns"]
    np.testing.assert_array_equal(columns, na.select(model.attention.query_proj.weight, 3, score))


def test_adapters_come_back_and_another_model_is_refused(tmp_path):
    model, bypass = block()
    own.save(tmp_path / "adapter", bypass, model)
    jax.tree.map(np.testing.assert_array_equal, own.load(tmp_path / "adapter", Block(jax.random.key(0))), bypass)
    with pytest.raises(UserError, match=r"^this tree is not the base .*: tensor 'attention.query_proj.weight' differs$"):
        own.load(tmp_path / "adapter", Block(jax.random.key(1)))


def test_bad_input():
    model, bypass = block()
    with pytest.raises(UserError, match=r"^a LayerNorm without eqx.nn.Linear layers: nothing in it can carry a bypass$"):
        na.equinox.build(eqx.nn.LayerNorm(D), k=1)
    attached = na.equinox.attach(model, bypass)
    with pytest.raises(UserError, match=r"^attention.query_proj.weight carries a bypass already$"):
        na.equinox.attach(attached, bypass)
    with pytest.raises(KeyError, match=r"attention.query_proj.weight holds no kernel"):
        na.equinox.attach(model.mlp, bypass)
    unfit = na.build({"layers": {"0": {"weight": jnp.ones((D, F))}}}, [("layers", "0", "weight")], 1)
    with pytest.raises(
        UserError, match=r"^layers.0.weight: a kernel \(20, 12\) in layout OI does not fit columns \(12, 1\)"
    ):
        na.equinox.attach(model.mlp, unfit)
    normed = eqx.nn.WeightNorm(eqx.nn.Linear(D, F, key=jax.random.key(0)))
    with pytest.raises((UserError, TypeError), match=r"layer.weight carries a bypass|BypassKernel"):
        na.equinox.attach(normed, prepared(normed))(X[0, 0])
