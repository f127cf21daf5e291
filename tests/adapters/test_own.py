"""Adapters of a caller's own parameters: round trips of any pytree, and everything that is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_helpers import message_of
from helpers import write_model

import neuroada_jax as na
from neuroada_jax.adapters import inspection, native, on_base, own
from neuroada_jax.core.ops import Layout
from neuroada_jax.pretrained.load import load_model


def array(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


PARAMS = {
    "hidden": {"w": array(6, 8), "b": jnp.zeros(8)},
    "layers": [{"up": {"kernel": array(3, 8, 5, seed=1)}}, {"up": {"kernel": array(3, 8, 5, seed=2, dtype=jnp.bfloat16)}}],
    "out.1": array(8, 4, seed=3),
}
PATHS = [("hidden", "w"), ("layers", "0", "up"), ("layers", "1", "up"), ("out.1",)]


def trained(paths=PATHS, k=2):
    nested = na.core.trees.to_nested(PARAMS)
    built = na.build(nested, paths, k, layout=Layout.IO)
    return built._replace(values=jax.tree.map(lambda leaf: array(*leaf.shape, seed=9), built.values))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    own.save(tmp_path_factory.mktemp("own") / "adapter", trained(), PARAMS, seed=5)
    return tmp_path_factory.getbasetemp().glob("own*/adapter").__next__()


@pytest.fixture
def adapter(pristine, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(pristine, tmp_path / "adapter")


def test_round_trip_of_lists_stacked_layers_and_dotted_names(pristine):
    loaded = own.load(pristine, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, loaded, trained())
    assert loaded.values["layers"]["1"]["up"]["values"].shape == (3, 5, 2)


def test_what_is_in_it(pristine):
    about = json.loads((pristine / "adapter.json").read_text())
    assert about["base"]["kind"] == "tree" and about["base"]["digests"].keys() == about["inputs"].keys()
    assert about["inputs"] == {"hidden.w": 6, "layers.0.up": 8, "layers.1.up": 8, "out.1": 8}
    assert (about["k"], about["seed"], about["rule"]) == (2, 5, "magnitude")
    assert inspection.inspect_adapter(str(pristine))["values"] == na.count(trained().values)


def test_other_parameters_may_change(pristine):
    other = {**PARAMS, "hidden": {**PARAMS["hidden"], "b": jnp.ones(8)}, "more": array(2, 2)}
    own.load(pristine, other)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": {"w": PARAMS["hidden"]["w"].at[3, 2].add(1e-6)}}, "tensor 'hidden.w' differs"),
        ({"hidden": {}}, "tensor 'hidden.w' is missing"),
        ({"layers": PARAMS["layers"][::-1]}, "tensor 'layers.0.up' differs"),
    ],
)
def test_another_tree_is_refused(pristine, changed, message):
    found = message_of(own.load, pristine, {**PARAMS, **changed})
    assert found == f"this tree is not the base model of this adapter (own parameters): {message}"


def test_adapters_of_models_and_of_trees_are_told_apart(tmp_path, pristine):
    base = load_model(str(write_model(tmp_path / "model", None)))
    built = na.build(base.params, [("model", "layers", "self_attn", "q_proj")], 2)
    on_base.save(tmp_path / "a", built, base, native.Selection(2, ["q_proj"], seed=0))
    assert message_of(own.load, tmp_path / "a", base.params).endswith("expected one of the caller's own parameters")
    assert "is not the base model of this adapter (own parameters)" in message_of(on_base.load, str(pristine), base)


@pytest.mark.parametrize(
    ("bypass", "params", "message"),
    [
        (trained([("hidden", "w")]), {"hidden": {"w": array(3, 8)}}, r"hidden.w: columns \(8, 2\) up to [345] do not fit"),
        (trained([("hidden", "w")]), {"hidden": {"w": array(6, 7)}}, r"do not fit a kernel \(6, 7\)"),
        (trained([("hidden", "w")]), {"other": array(6, 8)}, "hidden.w holds no kernel"),
        (trained([("hidden", "w")])._replace(columns={}), PARAMS, "are not a bypass"),
        (na.Bypass({}, {}), PARAMS, "are not a bypass"),
        (trained([("out.1",)]), {"out.1": array(8, 4), "out": {"1": array(8, 4)}}, "two parameters are named out.1"),
    ],
)
def test_what_cannot_be_saved(tmp_path, bypass, params, message):
    with pytest.raises(na.UserError, match=message):
        own.save(tmp_path / "adapter", bypass, params)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "shapes", [None, {}, {"hidden.w": [4, 2]}, {"hidden.w": "8"}, {"hidden.w": []}, {"hidden.w": [-8, -2]}]
)
def test_shapes_that_do_not_fit(adapter, shapes):
    about = json.loads((adapter / "adapter.json").read_text())
    del about["fields_digest"]  # which would notice it first
    (adapter / "adapter.json").write_text(json.dumps({**about, "shapes": shapes}))
    assert "hidden.w has columns (8, 2)" in message_of(own.load, adapter, PARAMS)
