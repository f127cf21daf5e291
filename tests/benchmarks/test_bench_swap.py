"""benchmarks/swap.py on a tiny model."""

import contract
import jax
import numpy as np
import pytest
from helpers import NEURONS, write_model

from benchmarks import swap
from neuroada_jax.core import bypass
from neuroada_jax.pretrained.load import load_model

METHODS = ["full merge", "put in", "swap", "overwrite, equal columns", "removal"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("swap") / "model"))


def test_every_operation_has_a_row(model, tmp_path, capsys):
    swap.main(["--model", model, "--k", "1", "3", "--repeats", "2", "--out", str(tmp_path)])
    _, rows = contract.read(tmp_path, "swap")
    assert [(row["method"], row["k"]) for row in rows] == [(method, k) for k in (1, 3) for method in METHODS]
    assert [row["entries"] for row in rows] == [2 * NEURONS * k for k in (1, 3) for _ in METHODS]
    assert all(row["ratio_to_floor"] == 1 for row in rows if row["method"] == "full merge")
    assert all(row["allocated_bytes"] >= 0 for row in rows)
    assert contract.printed_rows(capsys.readouterr().out) == len(rows)


def test_a_turn_ends_with_the_original_weights_and_allocates_less_than_a_merge(model):
    base_model = load_model(model)
    live, paths = swap.Live(jax.tree.map(np.copy, base_model.params)), swap.targets(base_model.params, base_model.model)
    first, other = (swap._adapter(base_model.params, paths, 1, score) for score in (abs, lambda kernel: -abs(kernel)))
    merged = bypass.merge(base_model.params, other)
    allocated = {}
    for name, _, allocated[name] in swap._operations(live, first, other):
        if name == "overwrite, equal columns":
            jax.tree.map(np.testing.assert_array_equal, live.params, merged)
    jax.tree.map(np.testing.assert_array_equal, live.params, base_model.params)
    assert allocated["full merge"] > max(allocated[name] for name in METHODS[1:])
