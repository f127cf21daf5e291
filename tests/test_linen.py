"""Bypass layers in plain Linen models: against merged weights, under every transformation, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from helpers import equations
from quick import jit

import neuroada_jax as na
from neuroada_jax import linen
from neuroada_jax.adapters import own
from neuroada_jax.core import bypass, selection, trees
from neuroada_jax.core.entries import Layout
from neuroada_jax.errors import UserError
from neuroada_jax.training import optimizer
from neuroada_jax.training.config import OptimizerSection

D, F, T = 12, 20, 5
TARGETS = ["query", "key", "value", "out", "up", "down"]
merge = jit(functools.partial(na.merge, layout=Layout.IO))


class Block(nn.Module):
    """A transformer block from Flax's own parts, written by somebody who never heard of a bypass."""

    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm(dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=3, dtype=self.dtype, name="attention")(y)
        y = nn.Dense(F, dtype=self.dtype, name="up")(nn.LayerNorm(dtype=self.dtype)(x))
        return x + nn.Dense(D, dtype=self.dtype, use_bias=False, name="down")(nn.gelu(y)), None


class Model(nn.Module):
    """Blocks one by one, or three of them in one scan; a convolution and a shared layer besides."""

    scanned: bool = False
    remat: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(D, (3,), dtype=self.dtype, name="conv")(x)
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        if self.scanned:
            layers_path = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = layers_path(self.dtype, name="blocks")(x, None)
        else:
            for layer in range(2):
                x, _ = block(self.dtype, name=f"block_{layer}")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        shared = nn.Dense(D, dtype=self.dtype, name="shared")
        return nn.Dense(4, dtype=self.dtype, name="classifier")(shared(nn.tanh(shared(x))).mean(1))


@functools.cache
def prepared(targets=tuple(TARGETS), k=3, dtype=jnp.float32, **fields):
    """A model, an input, its parameters and a bypass with random values."""
    model, x = Model(**fields), np.random.default_rng(0).normal(size=(2, T, D))
    x = jnp.asarray(x, dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), jit(model.init)(jax.random.key(0), x)["params"])
    built = linen.build(model, {"params": params}, x, targets=list(targets), k=k, dtype=dtype)
    rng = np.random.default_rng(1)
    random = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype), built.values)
    return model, x, params, built._replace(values=random)


def outputs(model, params, built, x, **options):
    apply = jit(functools.partial(linen.with_bypass(model.apply), **options))
    return apply({"params": params, "bypass": built.values, "columns": built.columns}, x)


def test_build_selects_the_columns_of_flattened_kernels():
    _, _, params, built = prepared()
    attention, columns = params["block_1"]["attention"], built.columns["block_1"]["attention"]
    expected = {"query": (D, D), "out": (D, D)}  # (D, 3, 4) and (3, 4, D)
    for name, shape in expected.items():
        rows = attention[name]["kernel"].reshape(shape).T
        np.testing.assert_array_equal(columns[name]["columns"], selection.select(rows, 3))
    np.testing.assert_array_equal(
        built.columns["block_0"]["up"]["columns"], selection.select(params["block_0"]["up"]["kernel"].T, 3)
    )
    assert na.count(built.values) == 3 * 2 * (5 * D + F)


def test_build_stacks_scanned_layers():
    _, _, params, built = prepared(scanned=True)
    kernel = params["blocks"]["attention"]["query"]["kernel"]
    assert kernel.shape == (3, D, 3, 4)
    columns = built.columns["blocks"]["attention"]["query"]["columns"]
    np.testing.assert_array_equal(columns, selection.select(kernel.reshape(3, D, D).swapaxes(1, 2), 3))
    assert built.values["blocks"]["down"]["values"].shape == (3, D, 3)


def test_build_starts_from_zero_and_takes_dtype_score_and_k():
    model, x, params, _ = prepared()
    built = linen.build(
        model,
        {"params": params},
        x,
        targets=["classifier"],
        k=100,
        dtype=jnp.bfloat16,
        score=lambda kernel: -jnp.abs(kernel),
    )
    values = built.values["classifier"]["values"]
    assert (values.shape, values.dtype, bool(values.any())) == ((4, D), jnp.bfloat16, False)
    with pytest.raises(ValueError, match="k must be at least 1"):
        linen.build(model, {"params": params}, x, targets=["classifier"], k=0)


@pytest.mark.parametrize("fields", [{}, {"remat": True}, {"scanned": True}, {"scanned": True, "remat": True}], ids=str)
def test_outputs_are_those_of_the_merged_weights(fields):
    model, x, params, built = prepared(**fields)
    got = outputs(model, params, built, x)
    merged = merge(params, built)
    np.testing.assert_allclose(got, jit(model.apply)({"params": merged}, x), rtol=1e-5, atol=1e-5)
    assert np.abs(got - jit(model.apply)({"params": params}, x)).max() > 0.05
    base_entries = na.read(params, built.columns, layout=Layout.IO)
    jax.tree.map(np.testing.assert_array_equal, na.unmerge(merged, built.columns, base_entries, layout=Layout.IO), params)


@pytest.mark.parametrize("fields", [{}, {"scanned": True, "remat": True}], ids=str)
def test_float64_outputs_and_gradients_equal_autodiff_through_the_merged_weights(fields):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # the latter for Flax's own norms
        model, x, params, built = prepared((*TARGETS, "shared", "classifier"), dtype=jnp.float64, **fields)

        def loss(values, form):
            if form == "bypass":
                y = linen.with_bypass(model.apply)({"params": params, "bypass": values, "columns": built.columns}, x)
            else:
                y = model.apply({"params": na.merge(params, built._replace(values=values), layout=Layout.IO)}, x)
            return jnp.sum(jnp.sin(y))

        results = [
            jit(jax.value_and_grad(functools.partial(loss, form=form)))(built.values) for form in ("bypass", "merged")
        ]
        for got, want in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
            assert want.any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kept", [jnp.float32, jnp.bfloat16])
def test_layers_in_another_dtype_than_their_parameters_compute_what_the_merged_ones_do(kept, dtype):
    """W + D is rounded to the parameters' dtype, and only then cast to the layer's."""
    model, x, params, built = prepared()
    model, params = model.clone(dtype=dtype), jax.tree.map(lambda leaf: leaf.astype(kept), params)
    with jax.numpy_dtype_promotion("standard"):  # as Flax's own norms need it
        got = outputs(model, params, built, x)
        want = jit(model.apply)({"params": na.merge(params, built, layout=Layout.IO)}, x)
    assert got.dtype == dtype
    np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=1e-5, atol=1e-6)  # a bfloat16 step is 4e-3


def test_no_dense_gradient_is_formed():
    model, x, params, built = prepared(targets=("up",), k=1)

    def loss(values, params, with_bypass):
        variables = {"params": params, **({"bypass": values, "columns": built.columns} if with_bypass else {})}
        return jnp.sum(linen.with_bypass(model.apply)(variables, x))

    def dense_products(function, *arguments):
        """Products over the tokens that give (D, F) or its transpose."""
        shapes = [
            e.outvars[0].aval.shape
            for e in equations(jax.make_jaxpr(function)(*arguments).jaxpr)
            if e.primitive.name == "dot_general"
        ]
        return sum(sorted(shape) == sorted((D, F)) for shape in shapes)

    assert dense_products(jax.grad(lambda values: loss(values, params, True)), built.values) == 0
    assert dense_products(jax.grad(lambda params: loss(None, params, False)), params) == 4  # up and down, twice


def test_a_combined_tree_trains_through_optax_partition():
    model, x, params, built = prepared(targets=("query", "up"))
    combined = {"params": params, "bypass": built.values}
    transformation = optimizer.build(OptimizerSection(learning_rate=0.01), 10)
    state = transformation.init(combined)

    @jit
    def step(combined, state):
        def loss(combined):
            return jnp.mean(linen.with_bypass(model.apply)({**combined, "columns": built.columns}, x) ** 2)

        value, gradient = jax.value_and_grad(loss)(combined)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = transformation.update(gradient, state, combined)
        return optax.apply_updates(combined, updates), state, value

    losses = []
    for _ in range(5):
        combined, state, value = step(combined, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, combined["params"], params)


def test_other_collections_rngs_and_intermediates_are_flax_own():
    model, x, params, built = prepared(targets=("up",))
    variables = {"params": params, "bypass": built.values, "columns": built.columns}
    apply = linen.with_bypass(model.apply)
    dropped = apply(variables, x, train=True, rngs={"dropout": jax.random.key(1)})
    assert not np.array_equal(dropped, apply(variables, x))
    y, captured = apply(variables, x, capture_intermediates=True)
    assert [len(captured["intermediates"]["block_0"]["up"]["__call__"]), y.shape] == [1, (2, 4)]
    np.testing.assert_array_equal(apply({"params": params}, x), model.apply({"params": params}, x))


@pytest.mark.parametrize("axis", [-1, (-2, -1), (1, 2), 1])
@pytest.mark.parametrize("features", [6, (2, 3)])
def test_dense_general_over_any_axes(axis, features):
    model = nn.DenseGeneral(features, axis, name="map")
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4, 3)), jnp.float32)

    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            return model.clone(parent=self)(x)

    params = jit(Wrapped().init)(jax.random.key(0), x)["params"]
    built = linen.build(Wrapped(), {"params": params}, x, targets=["map"], k=2)
    built = built._replace(values=jax.tree.map(jnp.ones_like, built.values))
    got = outputs(Wrapped(), params, built, x)
    np.testing.assert_allclose(got, Wrapped().apply({"params": merge(params, built)}, x), rtol=1e-5, atol=1e-5)


def test_targets_are_exact_paths_or_last_components():
    model, x, params, _ = prepared()
    paths = lambda *targets: [  # noqa: E731
        ".".join(path)
        for path, _ in trees.leaves(
            linen.build(model, {"params": params}, x, targets=list(targets), k=1).columns, "columns"
        )
    ]
    assert paths("block_1.up") == ["block_1.up"]
    assert paths("up", "classifier") == ["block_0.up", "block_1.up", "classifier"]
    for wrong in ("u", "block_1", "conv", "attention.query"):
        with pytest.raises(UserError, match=rf"'{wrong}' matches no linear map; this model has .*block_0.attention.query"):
            paths(wrong)


def test_targets_may_be_a_predicate_or_all_and_there_must_be_some():
    model, x, params, _ = prepared()
    build = functools.partial(linen.build, model, {"params": params}, x, k=1)
    assert na.count(build(targets=lambda path: path.startswith("block_1.attention")).values) == 4 * D
    assert na.count(build(targets=None).values) == 2 * (5 * D + F) + D + 4
    with pytest.raises(
        UserError, match=r"^a LayerNorm without Dense or DenseGeneral layers: nothing in it can carry a bypass$"
    ):
        linen.build(nn.LayerNorm(), {"params": {"scale": jnp.ones(D), "bias": jnp.ones(D)}}, x, targets=None, k=1)


def test_adapters_come_back_and_other_parameters_are_refused(tmp_path):
    _, _, params, built = prepared(scanned=True)
    own.save(tmp_path / "adapter", built, params)
    jax.tree.map(np.testing.assert_array_equal, own.load(tmp_path / "adapter", params), built)
    scaled = {**params, "blocks": {**params["blocks"], "up": {"kernel": 2 * params["blocks"]["up"]["kernel"]}}}
    with pytest.raises(UserError, match=r"^this tree is not the base .*: tensor 'blocks.up' differs$"):
        own.load(tmp_path / "adapter", scaled)


class Odd(nn.Module):
    """Linear maps that cannot carry a bypass."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(D, precision="highest", name="precise")(x)
        x = nn.Dense(D, dot_general=jax.lax.dot_general, name="quantised")(x)
        return nn.Conv(D, (1,), name="conv")(nn.DenseGeneral(D, batch_dims=0, name="batched")(x))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("precise", "precision highest cannot be kept"),
        ("quantised", "dot_general of its own"),
        ("batched", "batch_dims"),
        ("conv", "a Conv cannot carry a bypass"),
    ],
)
def test_what_cannot_carry_a_bypass_is_named(name, message):
    x = jnp.ones((2, T, D))
    params = jit(Odd().init)(jax.random.key(0), x)["params"]
    if name != "conv":
        with pytest.raises(UserError, match=f"^{name}: .*{message}"):
            linen.build(Odd(), {"params": params}, x, targets=[name], k=1)
    by_hand = bypass.build({name: jnp.ones((D, D))}, [(name,)], 1)
    with pytest.raises(UserError, match=f"^{name}: .*{message}"):
        outputs(Odd(), params, by_hand, x)


def test_incomplete_or_unfit_collections_are_refused():
    model, x, params, built = prepared(targets=("up",))
    apply = linen.with_bypass(model.apply)
    whole = {"params": params, "bypass": built.values, "columns": built.columns}
    base_entries = na.read(params, built.columns, layout=Layout.IO)
    for wrong in ({**whole, "base_entries": base_entries}, {"params": params, "bypass": built.values}):
        with pytest.raises(
            UserError, match="needs the collections bypass and columns, and no base_entries; found params, bypass"
        ):
            apply(wrong, x)
    with pytest.raises(KeyError, match="nowhere holds no kernel"):
        apply({**whole, "columns": {"nowhere": built.columns["block_0"]["up"]}}, x)
    unfit = {"block_0": {"up": {"columns": jnp.zeros((D, 3), jnp.int32), "values": jnp.zeros((D, 3))}}}
    with pytest.raises(ValueError, match=r"kernel \(12, 20\) in layout IO does not fit columns \(12, 3\)"):
        apply({**whole, "columns": unfit, "bypass": unfit}, x)
