"""Every family with quantised kernels, and with values, shared columns or low-rank factors in all of its maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from config_cases import BASES, forward, outcome

from neuroada_jax import models
from neuroada_jax.core import bypass, low_rank, quantised
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.pretrained.load import open_model

FORMS = ("values", "shared columns", "factors")


def adapter(params, paths, form):
    """An adapter of random values, or factors, on the maps at the paths."""
    if form == "factors":
        built = low_rank.build(params, paths, 2, 0.7, jax.random.key(0))
    else:
        built = bypass.build(params, paths, 3, shared=form == "shared columns")
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32)), built.values)
    return Bypass(values, built.columns)


# Maps apart, and fused maps.
FIRST = ("bert", "phi3")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind in FIRST else pytest.mark.slow) for kind in BASES])
def test_a_family_computes_with_its_merged_weights(kind, tmp_path):
    assert outcome(kind, tmp_path, {}, []) == "same"
    model = open_model(str(tmp_path), "float32").model
    plain = open_model(str(tmp_path), "float32").load().params
    held = open_model(str(tmp_path), "float32", quantization_of="int8").load().params
    dense = quantised.map_quantised(quantised.dequantise, held)
    paths = models.match_targets(plain, list(model.architecture.targets), model.layers_path)
    of_dense = forward(kind, model, dense)
    np.testing.assert_allclose(forward(kind, model, held), of_dense, rtol=0, atol=1e-4)
    assert np.abs(of_dense - forward(kind, model, plain)).max() > 1e-3
    for form in FORMS:
        own = adapter(plain, paths, form)
        want = forward(kind, model, (low_rank.merge if form == "factors" else bypass.merge)(dense, own))
        np.testing.assert_allclose(forward(kind, model, held, own), want, rtol=0, atol=2e-4, err_msg=form)
        of_adapter = forward(kind, model, dense, own)
        np.testing.assert_allclose(of_adapter, want, rtol=0, atol=2e-4, err_msg=form)
        if form == "factors":
            np.testing.assert_array_equal(forward(kind, model, low_rank.beside(dense, own)), of_adapter)
        assert np.abs(want - of_dense).max() > 0.01
