"""The kernels, interpreted on the CPU against a float64 oracle, lowered for CUDA and compiled for an H100.

What it shares with the other algorithms (precision, residuals, both forms of the op) test_ops.py asserts.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec, SingleDeviceSharding
from quick import jit

from neuroada_jax.core import ops, pallas_kernels
from neuroada_jax.core.value_gradient import GradientAlgorithm

H100 = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

gradient = functools.partial(ops.value_gradient, algorithm=GradientAlgorithm.PALLAS)


def problem(seed, tokens, outputs, inputs, k, dtype=jnp.float32):
    """Random dy, x and columns; columns may repeat within a row."""
    rng = np.random.default_rng(seed)
    dy, x = jnp.asarray(rng.normal(size=(tokens, outputs)), dtype), jnp.asarray(rng.normal(size=(tokens, inputs)), dtype)
    return dy, x, jnp.asarray(rng.integers(0, inputs, size=(outputs, k)), jnp.int32)


def oracle(dy, x, columns):
    """dvalues in float64, by numpy."""
    return np.einsum("to,tok->ok", np.asarray(dy, np.float64), np.asarray(x, np.float64)[:, np.asarray(columns)])


def assert_near(got, want):
    assert np.linalg.norm(np.asarray(got, np.float64) - want) <= 2e-6 * np.linalg.norm(want)


SLOW = pytest.mark.slow

cases = st.tuples(
    st.sampled_from([1, 63, 64, 65, 130, 300]),  # T; a tile has 64
    st.sampled_from([1, 31, 32, 33, 70]),  # O; a block has 32
    st.sampled_from([1, 5, 33]),  # I
    st.sampled_from([1, 3, 4, 5, 9]),  # k; a program takes 4 at most
    st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)


@pytest.mark.parametrize(
    "programs",
    [pytest.param(1, marks=SLOW), 2, pytest.param(1024, marks=SLOW)],
    ids=["all tiles in one program", "in two", "a program for each tile"],
)
@settings(max_examples=12)
@example(case=(300, 31, 5, 4, jnp.float32), seed=0)
@given(case=cases, seed=st.integers(0, 2**31))
def test_any_shape_equals_the_oracle(programs, case, seed):
    arguments = problem(seed, *case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_kernels, "PROGRAMS", programs)
        got = jit(lambda *arguments: gradient(*arguments))(*arguments)  # a new function: jit keeps traces by function
    assert got.dtype == jnp.float32
    assert_near(got, oracle(*arguments))


@pytest.mark.parametrize("remat", [False, True])
def test_gradient_of_scanned_layers_equals_the_column_gather(remat):
    rng = np.random.default_rng(0)
    layers, width, k = 3, 40, 3
    kernels = jnp.asarray(rng.normal(size=(layers, width, width)) / width**0.5, jnp.bfloat16)
    columns = jnp.asarray(np.argsort(rng.random(kernels.shape), axis=-1)[..., :k], jnp.int32)
    values = jnp.asarray(rng.normal(size=columns.shape) / 10, jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, 35, width)), jnp.bfloat16)

    def loss(values, algorithm):
        def layer(x, parts):
            kernel, columns, values = parts
            return jnp.sin(ops.bypass_dense(x, kernel, columns, values, algorithm=algorithm)), None

        y, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, (kernels, columns, values))
        return jnp.sum(y.astype(jnp.float32))

    got, want = (
        jit(jax.grad(functools.partial(loss, algorithm=algorithm)))(values)
        for algorithm in (GradientAlgorithm.PALLAS, GradientAlgorithm.COLUMN_GATHER)
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, 0), (0, 0, None)], ids=["all", "one x", "one set of columns"])
def test_vmap_equals_one_by_one(axes):
    problems = [problem(seed, 70, 40, 20, 3) for seed in range(3)]
    batched = [
        jnp.stack(arrays) if axis == 0 else arrays[0]
        for axis, arrays in zip(axes, zip(*problems, strict=True), strict=True)
    ]
    got = jit(jax.vmap(gradient, in_axes=axes))(*batched)
    for i in range(3):
        assert_near(got[i], oracle(*(a[i] if axis == 0 else a for axis, a in zip(axes, batched, strict=True))))


def data_parallel(check_vma):
    """The gradient with tokens shared by eight devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    summed = lambda *arguments: jax.lax.psum(gradient(*arguments), "data")  # noqa: E731
    return jax.shard_map(summed, mesh=mesh, in_specs=(rows, rows, whole), out_specs=whole, check_vma=check_vma)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="wants the eight virtual devices of a CPU")
def test_shard_map_sums_over_devices():
    arguments = problem(0, 160, 40, 20, 3)
    assert_near(jit(data_parallel(check_vma=False))(*arguments), oracle(*arguments))
    # JAX 0.10's interpreter loses track of what varies over the mesh. On a GPU nothing is interpreted: see below.
    with pytest.raises(ValueError, match=r"mismatched varying manual axes(.|\n)*check_vma=False"):
        jit(data_parallel(check_vma=True))(*arguments)


def lowered(function, *arguments, platform):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="since 0.11 JAX lowers for a described device alone, as below")
@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize("form", ["plain", "vmap", "shard_map"])
def test_lowers_to_one_kernel_for_a_gpu_that_is_not_there(form, platform):
    arguments = problem(0, 160, 40, 20, 3)
    function = {"plain": gradient, "vmap": jax.vmap(gradient), "shard_map": data_parallel(check_vma=True)}[form]
    if form == "vmap":
        arguments = [a[None] for a in arguments]
    assert lowered(function, *arguments, platform=platform).count("custom_call @__gpu$xla.gpu.triton") == 1


def test_more_entries_than_an_offset_reaches_are_refused():
    dy, x = (jax.ShapeDtypeStruct((1 << 20, width), jnp.bfloat16) for width in (2048, 64))
    with pytest.raises(ValueError, match=r"an array \(1048576, 2048\) has 2147483648 entries, expected fewer than 2\^31"):
        jax.eval_shape(gradient, dy, x, jax.ShapeDtypeStruct((2048, 2), jnp.int32))


def test_other_platforms_are_refused():
    with pytest.raises(NotImplementedError, match="not found for platform tpu"):
        lowered(gradient, *problem(0, 160, 40, 20, 3), platform="tpu")


@pytest.fixture(scope="session")
def h100():
    """A described H100 to compile for; there need be none."""
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip("JAX's CUDA plugin is not installed")
    from jax.experimental import topologies

    return SingleDeviceSharding(
        topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices[0]
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "shape",
    [(8192, 4096, 4096), (8192, 4096, 11008), (2048, 1536, 576), (77, 33, 17)],
    ids=lambda shape: "x".join(map(str, shape)),
)
@pytest.mark.parametrize("k", [1, 4, 20])
def test_compiles_for_an_h100_within_the_stated_memory(h100, k, shape, dtype):
    tokens, outputs, inputs = shape
    abstract = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=h100)  # noqa: E731
    arguments = (abstract((tokens, outputs), dtype), abstract((tokens, inputs), dtype), abstract((outputs, k), jnp.int32))
    compiled = jax.jit(gradient).lower(*arguments).compile()
    assert compiled.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == 1
    x_rows, sums = tokens * inputs * dtype.dtype.itemsize, -(-tokens // pallas_kernels.TOKENS) * outputs * k * 4
    assert compiled.memory_analysis().temp_size_in_bytes <= x_rows + sums + 1024


def test_maps_that_read_the_same_x_share_its_transpose_on_an_h100(h100):
    dy, x, columns = (jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=h100) for a in problem(0, 512, 96, 128, 3))
    both = lambda dy1, dy2, x, columns1, columns2: (gradient(dy1, x, columns1), gradient(dy2, x, columns2))  # noqa: E731
    text = jax.jit(both).lower(dy, dy, x, columns, columns).compile().as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 2
    assert text.count(" transpose(") == 1
