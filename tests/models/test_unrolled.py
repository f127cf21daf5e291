"""Layers that lie apart: the same numbers as the scan over stacked ones, and what lies where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CONFIG, equations

from neuroada_jax import models
from neuroada_jax.core import bypass, platform, trees
from neuroada_jax.generation.generate import Ending, generate
from neuroada_jax.generation.sampling import Decoding
from neuroada_jax.models import Remat, unrolled
from neuroada_jax.models.attention import packed_mask

ENCODER = {**CONFIG, "model_type": "bert", "hidden_act": "gelu"}
MODERNBERT = {  # whose first layer lacks a norm
    **{name: value for name, value in CONFIG.items() if name not in ("model_type", "rope_parameters")},
    "model_type": "modernbert",
    "num_hidden_layers": 3,
    "global_attn_every_n_layers": 2,
    "local_attention": 4,
}


def random_tree(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray((0.3 * rng.normal(size=leaf.shape)).astype(leaf.dtype)), shapes)


def random_model(config=CONFIG, **fields):
    """A model, its parameters, and a bypass of all its linear maps."""
    model = models.from_hf_config({**config, **fields}, "float32")
    params = random_tree(model.abstract_params())
    built = bypass.build(params, models.match_targets(params, list(model.architecture.targets), model.layers_path), 2)
    return model, params, built._replace(values=random_tree(built.values, 1))


def random_ids(*shape):
    return jnp.asarray(np.random.default_rng(2).integers(0, CONFIG["vocab_size"], shape), jnp.int32)


def value_and_grad(model, params, built, ids, remat):
    """Sum of squares of the output, and its gradient by the values, of resident weights."""
    module = model.module(remat)

    @jax.jit
    def run(params, values):
        def loss(values):
            out = module.apply({"params": params, "columns": built.columns, "resident": values}, ids)
            return jnp.mean((out[0] if model.architecture.is_decoder else out) ** 2)

        return jax.value_and_grad(loss)(values)

    return run(params, built.values)


def equal(a, b, **tolerance):
    compare = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
    jax.tree.map(lambda x, y: compare(x, y, **tolerance), a, b)


@pytest.fixture
def preferred(monkeypatch):
    monkeypatch.setattr(unrolled, "preferred", lambda depth: True)


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def apart_of(model, params):
    return unrolled.apart(copied(params), model.layers_path)


def test_the_form_follows_platform_and_depth():
    model, params, _ = random_model()
    assert unrolled.apart(params, model.layers_path) == params and not unrolled.is_apart(params)
    with platform.tracing_for("gpu", flash_attention=True):
        assert unrolled.preferred(unrolled.DEEPEST) and not unrolled.preferred(unrolled.DEEPEST + 1)
        shapes = unrolled.apart(model.abstract_params(), model.layers_path)
    assert unrolled.is_apart(shapes)


def test_apart_and_back(preferred):
    model, params, _ = random_model(num_hidden_layers=3)
    given = copied(params)
    apart = unrolled.apart(given, model.layers_path)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), apart) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), unrolled.apart(model.abstract_params(), model.layers_path)
    )
    layers = trees.get(given, model.layers_path)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(layers))  # no second copy of the weights
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(apart))
    assert unrolled.apart(apart, model.layers_path) == apart
    equal(unrolled.stacked(apart), params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(trees.get(apart, model.layers_path)))


def test_the_bypass_of_kernels_that_lie_apart(preferred):
    model, params, built = random_model()
    apart = apart_of(model, params)
    paths = [path for path, _ in trees.leaves(built.columns, "columns")]
    equal(bypass.build(apart, paths, 2).columns, built.columns)
    base_entries = bypass.read(params, built.columns)
    equal(bypass.read(apart, built.columns), base_entries)
    for change in (
        lambda tree: bypass.merge(tree, built),
        lambda tree: bypass.make_resident(tree, built, base_entries),
        lambda tree: bypass.unmerge(bypass.merge(tree, built), built.columns, base_entries),
    ):
        equal(unrolled.stacked(change(copied(apart))), change(params))


@pytest.mark.parametrize(
    ("config", "remat"), [*((CONFIG, remat) for remat in Remat), (ENCODER, Remat.FULL), (MODERNBERT, Remat.NAMES)]
)
def test_loss_and_gradient_equal_those_of_the_scan(preferred, config, remat):
    model, params, built = random_model(config)
    ids = random_ids(2, 9)
    want = value_and_grad(model, params, built, ids, remat)
    equal(value_and_grad(model, apart_of(model, params), built, ids, remat), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"model_type": "mistral", "sliding_window": 3}], ids=["packed", "windows"])
def test_hidden_states_equal_those_of_the_scan(preferred, fields):
    model, params, _ = random_model(**fields)
    ids, positions = random_ids(2, 9), jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 0, 1]] * 2, jnp.int32)
    mask = None if fields else packed_mask(positions)
    run = jax.jit(lambda params: model.module().apply({"params": params}, ids, positions, mask)[0])
    equal(run(apart_of(model, params)), run(params), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", Remat)
def test_nothing_lets_xla_merge_a_recomputation_with_the_forward_pass(preferred, remat):
    """Outside of a loop it would, and every activation would be kept after all."""
    model, params, built = random_model()

    def checkpoints(params):
        variables = {"params": params, "columns": built.columns}
        apply = lambda values: model.module(remat).apply({**variables, "bypass": values}, random_ids(2, 16))[0]  # noqa: E731
        found = equations(jax.make_jaxpr(apply)(built.values).jaxpr)
        # The norm after the last layer belongs to no layer.
        return [each.params["prevent_cse"] for each in found if "prevent_cse" in each.params][:-1]

    assert checkpoints(params) and not any(checkpoints(params))
    apart = checkpoints(apart_of(model, params))
    assert len(apart) >= 3 * model.config.num_layers and all(apart)


def test_dropout_of_an_encoder_follows_its_key(preferred):
    model, params, _ = random_model({**MODERNBERT, "mlp_dropout": 0.1})
    params, ids = apart_of(model, params), random_ids(2, 7)
    run = lambda seed: model.module().apply({"params": params}, ids, rngs={"dropout": jax.random.key(seed)})  # noqa: E731
    assert not np.array_equal(run(0), run(1))
    np.testing.assert_array_equal(run(0), run(0))


@pytest.mark.parametrize("beams", [1, 2])
def test_decoding_equals_that_of_stacked_layers(preferred, beams):
    model, params, _ = random_model()
    prompts = [np.asarray(random_ids(size)).tolist() for size in (3, 5)]
    options = {"max_new_tokens": 5, "decoding": Decoding(beams=beams)}
    want = generate(model, params, prompts, Ending(), **options)
    assert generate(model, apart_of(model, params), prompts, Ending(), **options) == want
