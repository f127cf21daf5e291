"""The choice of the algorithm for the gradient of the values, and the blocks that they work in."""

import re

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
        (3, 64, "cpu", GradientAlgorithm.TOKEN_BLOCKS),
        (96, 576, "cpu", GradientAlgorithm.TOKEN_BLOCKS),
        (97, 576, "cpu", GradientAlgorithm.DENSE_CHUNKS),
        (341, 4096, "cpu", GradientAlgorithm.TOKEN_BLOCKS),
        (342, 4096, "cpu", GradientAlgorithm.DENSE_CHUNKS),
        (1, 4096, "gpu", GradientAlgorithm.COLUMN_GATHER),
        (2, 4096, "gpu", GradientAlgorithm.PALLAS),
        (20, 4096, "gpu", GradientAlgorithm.PALLAS),
        (20, 4096, "tpu", GradientAlgorithm.DENSE_CHUNKS),
    ],
)
def test_choose_algorithm(k, inputs, backend, expected):
    assert choose_algorithm(k, inputs, backend, split=False) is expected


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


@pytest.mark.parametrize("outputs", [64, 67])
def test_chunks_need_not_divide_the_neurons(outputs, monkeypatch):
    monkeypatch.setattr(value_gradient, "_DENSE_CHUNK_BYTES", 16 * 48 * 8)
    near_the_oracle(problem(3, (2, 24), outputs, 48, 5), GradientAlgorithm.DENSE_CHUNKS)


@pytest.mark.parametrize("tokens", [1, 128, 256, 300])
def test_blocks_need_not_divide_the_tokens(tokens):
    near_the_oracle(problem(3, (tokens,), 20, 48, 5), GradientAlgorithm.TOKEN_BLOCKS)


def near_the_oracle(arrays, algorithm):
    with jax.enable_x64(True):
        *_, dvalues = actual(*arrays, algorithm, True, jnp.float64, jnp.float64)
    np.testing.assert_allclose(dvalues, oracle(*arrays)[2], rtol=1e-12, atol=1e-12)


def test_on_a_cpu_token_blocks_read_pieces_that_are_stored():
    """What produces dy, the transposes and the slices of blocks are computed once, not for every read by a gather."""

    def gradient(dy, x, columns):
        return value_gradient.value_gradient(jnp.exp(dy), x, columns, GradientAlgorithm.TOKEN_BLOCKS)

    arrays = jnp.zeros((300, 24)), jnp.zeros((300, 16)), jnp.zeros((24, 3), jnp.int32)
    program = jax.jit(gradient).lower(*arrays).compile().as_text()
    gathering = [each for each in program.split("\n\n") if " gather(" in each]
    assert len(gathering) == 1 and gathering[0].count(" gather(") == 16
    assert not re.search(r"f32\S+ (copy|transpose|dynamic-slice|exponential)\(", gathering[0])
