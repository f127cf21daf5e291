"""The code on docs/own-models.md runs as it stands, block after block."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import write_model

from neuroada_jax import models
from neuroada_jax.adapters import native
from neuroada_jax.core import bypass
from neuroada_jax.pretrained.load import load_model

PAGE = Path(__file__).resolve().parents[1] / "docs" / "own-models.md"


@pytest.fixture(scope="module")
def namespace(tmp_path_factory):
    """What the page's code leaves behind, run where it finds a model and two adapters."""
    folder = tmp_path_factory.mktemp("docs")
    model = load_model(str(write_model(folder / "model")))
    built = bypass.build(model.params, models.match_targets(model.params, ["q_proj"], model.model.layers_path), 2)
    for number, name in enumerate(("one", "two"), start=1):
        values = jax.tree.map(lambda leaf, number=number: jnp.full_like(leaf, number), built.values)
        native.save(folder / "adapters" / name, built._replace(values=values), model, k=2, targets=["q_proj"], seed=0)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    found = {}
    with pytest.MonkeyPatch.context() as patch, jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        patch.chdir(folder)
        for block in blocks:
            exec(compile(block, PAGE.name, "exec"), found)
    return {**found, "folder": folder, "loaded": load_model(str(folder / "model"))}


@pytest.mark.parametrize("losses", ["losses", "vit_losses"])
def test_the_examples_learn(namespace, losses):
    assert namespace[losses][-1] < 0.7 * namespace[losses][0]


def test_the_swapped_model_is_the_original_again(namespace):
    jax.tree.map(np.testing.assert_array_equal, namespace["params"], namespace["loaded"].params)


def test_the_mixed_adapter_was_written(namespace):
    mixed = native.load(str(namespace["folder"] / "adapters" / "mixed"), namespace["loaded"])
    assert all((leaf == 1.25).all() for leaf in jax.tree.leaves(mixed.values))
    assert all((leaf == 1.5).all() for leaf in jax.tree.leaves(namespace["halfway"].values))
