"""The choice of the algorithm for the gradient of the values, and the blocks that they work in."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_ops import I, O, actual, gradient_equations, oracle, problem, rows_of_dense_gradient

from neuroada_jax.core import value_gradient
from neuroada_jax.core.value_gradient import GradientAlgorithm, choose_algorithm
from neuroada_jax.errors import NeuroadaWarning


@pytest.mark.parametrize(
    ("k", "inputs", "backend", "expected"),
    [
        (1, 4096, "cpu", GradientAlgorithm.COLUMN_GATHER),
        (200, 4096, "cpu", GradientAlgorithm.DENSE_CHUNKS),
        (1, 4096, "gpu", GradientAlgorithm.COLUMN_GATHER),
        (2, 4096, "gpu", GradientAlgorithm.PALLAS),
        (20, 4096, "gpu", GradientAlgorithm.PALLAS),
        (20, 4096, "tpu", GradientAlgorithm.DENSE_CHUNKS),
    ],
)
def test_choose_algorithm(k, inputs, backend, expected):
    assert choose_algorithm(k, inputs, backend, split=False) is expected


@pytest.mark.parametrize(("cores", "largest"), [(1, 24), (2, 12), (4, 6), (8, 3), (64, 3)])
def test_row_blocks_are_for_few_cores(monkeypatch, cores, largest):
    """Their loop runs on one core, the dense product on all that the process may use."""
    monkeypatch.setattr(value_gradient, "_cores", lambda: cores)
    for given in ({"cores": cores}, {}):
        found = [choose_algorithm(k, 576, "cpu", split=False, **given) for k in (largest, largest + 1)]
        assert found == [GradientAlgorithm.ROW_BLOCKS, GradientAlgorithm.DENSE_CHUNKS]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not bind processes to cores")
def test_cores_are_those_that_the_process_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert choose_algorithm(20, 576, "cpu", split=False) is GradientAlgorithm.ROW_BLOCKS
    finally:
        os.sched_setaffinity(0, allowed)


def test_arrays_may_be_split_over_devices_but_not_inside_of_shard_map(monkeypatch):
    found = {}

    def choose(where):
        return lambda x: found.update({where: choose_algorithm(20, 4096, "gpu")}) or x

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    jax.jit(choose("jit"))(jnp.ones(2))
    jax.jit(jax.shard_map(choose("shard_map"), mesh=mesh, in_specs=rows, out_specs=rows))(jnp.ones(2))
    jax.pmap(choose("pmap"))(jnp.ones((2, 1)))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    jax.jit(choose("jit on one device"))(jnp.ones(2))
    kernels = GradientAlgorithm.PALLAS
    assert found == {
        "jit": GradientAlgorithm.DENSE_CHUNKS,
        "shard_map": kernels,
        "pmap": kernels,
        "jit on one device": kernels,
    }


@pytest.mark.parametrize(("k", "expected"), [(2, GradientAlgorithm.COLUMN_GATHER), (3, GradientAlgorithm.DENSE_CHUNKS)])
def test_a_gpu_without_the_kernels(monkeypatch, k, expected):
    assert choose_algorithm(k, 4096, "gpu", split=True) is expected  # XLA cannot split them
    monkeypatch.setattr(value_gradient, "_has_pallas", lambda: False)
    value_gradient._warn.cache_clear()
    with pytest.warns(NeuroadaWarning, match=f"no GPU kernel .* falls back to {expected}"):
        assert choose_algorithm(k, 4096, "gpu", split=False) is expected


def test_the_dense_algorithm_works_in_chunks(monkeypatch):
    assert rows_of_dense_gradient(gradient_equations(GradientAlgorithm.DENSE_CHUNKS, True)) == [O]
    monkeypatch.setattr(value_gradient, "_DENSE_CHUNK_BYTES", 33 * I * 4)
    assert rows_of_dense_gradient(gradient_equations(GradientAlgorithm.DENSE_CHUNKS, True)) == [32] * (O // 32)


@pytest.mark.parametrize("algorithm", [GradientAlgorithm.ROW_BLOCKS, GradientAlgorithm.DENSE_CHUNKS])
@pytest.mark.parametrize("outputs", [64, 67])
def test_blocks_need_not_divide_the_neurons(algorithm, outputs, monkeypatch):
    monkeypatch.setattr(value_gradient, "_ROW_BLOCK_BYTES", 16 * 5 * 48 * 8)
    monkeypatch.setattr(value_gradient, "_DENSE_CHUNK_BYTES", 16 * 48 * 8)
    arrays = problem(3, (2, 24), outputs, 48, 5)
    with jax.enable_x64(True):
        *_, dvalues = actual(*arrays, algorithm, True, jnp.float64, jnp.float64)
    np.testing.assert_allclose(dvalues, oracle(*arrays)[2], rtol=1e-12, atol=1e-12)
