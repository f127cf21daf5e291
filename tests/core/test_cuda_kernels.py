"""The CUDA kernel: its source, compiled for the CPU and run there; its PTX; and the call, compiled for described GPUs.

cuda_host/run.cpp runs the kernel's text with the launches that `plan` gives it, so that both are tested together.
"""

import ctypes
import functools
import hashlib
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from test_pallas_kernels import assert_near, oracle

from neuroada_jax.core import cuda_kernels, ops, platform, value_gradient
from neuroada_jax.core.cuda_kernels import Card, plan
from neuroada_jax.core.value_gradient import GradientAlgorithm, choose_algorithm
from neuroada_jax.errors import NeuroadaWarning
from neuroada_jax.planning import machines

SOURCE = Path(cuda_kernels.__file__).parent / "cuda" / "value_gradient.cu"
HOST = Path(__file__).parent / "cuda_host"
CARDS = [Card(80, 166912, 108), Card(89, 101376, 128), Card(90, 232448, 132)]

gradient = functools.partial(value_gradient.value_gradient, algorithm=GradientAlgorithm.CUDA)


def test_the_ptx_is_built_from_this_source():
    header = SOURCE.with_suffix(".ptx").read_text(encoding="ascii").splitlines()[:3]
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    assert header[0] == f"// sha256 of value_gradient.cu: {digest}", "run `make ptx`"
    assert header[1:] == [".version 8.0", ".target sm_80"]  # what the assemblers of CUDA 12 and 13 take


# --- the source, on the CPU


def compiled_for_the_host(source, folder, optimisation="-O1"):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = folder / "kernel.so"
    options = ["-std=c++17", optimisation, "-shared", "-fPIC", f"-I{HOST}", f'-DSOURCE="{source}"']
    subprocess.run([compiler, *options, "-o", library, HOST / "run.cpp"], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return compiled_for_the_host(SOURCE, tmp_path_factory.mktemp("kernel"))


def in_tiles(x, launch):
    """x (T, I) as the kernel reads it, aligned to 16 bytes."""
    padded = np.zeros((launch.tiles * launch.tokens_per_tile, launch.inputs), x.dtype)
    padded[: x.shape[0], : x.shape[1]] = x
    tiles = padded.reshape(launch.tiles, launch.tokens_per_tile, launch.inputs).swapaxes(1, 2)
    aligned = np.empty(tiles.nbytes + 16, np.uint8)
    start = -aligned.ctypes.data % 16
    view = aligned[start : start + tiles.nbytes].view(x.dtype).reshape(tiles.shape)
    view[...] = tiles
    return view


def run_on(library, dy, x, columns, card, order=0):
    """dvalues by the library; every sum must have been written."""
    launch = plan(*dy.shape, x.shape[1], columns.shape[1], x.dtype, card)
    x_tiles, dy, columns = in_tiles(x, launch), np.ascontiguousarray(dy), np.ascontiguousarray(columns)
    sums = np.full((launch.grid[2], *columns.shape), np.nan, np.float32)
    pointer = lambda array: ctypes.c_void_p(array.ctypes.data)  # noqa: E731
    fault = library.launch(
        ctypes.cast(library[launch.entry], ctypes.c_void_p),
        (ctypes.c_int * 3)(*launch.grid),
        *(launch.threads, launch.shared, ctypes.c_uint(order)),
        *(pointer(x_tiles), ctypes.c_long(x_tiles.nbytes), pointer(dy), pointer(columns), pointer(sums)),
        (ctypes.c_int * 8)(*launch.scalars),
    )
    assert fault == 0
    return sums.sum(0)


def problem(seed, tokens, outputs, inputs, k, dtype):
    rng = np.random.default_rng(seed)
    dy, x = rng.normal(size=(tokens, outputs)).astype(dtype), rng.normal(size=(tokens, inputs)).astype(dtype)
    return dy, x, rng.integers(0, inputs, size=(outputs, k), dtype=np.int32)


sizes = st.tuples(
    st.one_of(st.integers(1, 33), st.sampled_from([63, 64, 100])),  # T
    st.sampled_from([1, 31, 32, 33, 70]),  # O
    st.integers(1, 70),  # I
    st.one_of(st.integers(1, 21), st.sampled_from([40, 41, 64])),  # k
    st.sampled_from([np.float32, ml_dtypes.bfloat16]),
)


@settings(max_examples=60)
@example(case=(100, 70, 64, 20, ml_dtypes.bfloat16), shared=2 * 16 * 64, cores=1, seed=0)  # just fits
@example(case=(100, 70, 65, 20, ml_dtypes.bfloat16), shared=2 * 16 * 64, cores=1, seed=0)  # 8 bytes for each input
@example(case=(100, 70, 64, 20, np.float32), shared=2 * 8 * 64, cores=2, seed=0)
@example(case=(100, 70, 65, 20, np.float32), shared=2 * 8 * 64, cores=2, seed=0)  # two slices
@example(case=(1, 1, 1, 1, np.float32), shared=CARDS[0].shared, cores=108, seed=0)
@example(case=(16, 1100, 3, 2, ml_dtypes.bfloat16), shared=CARDS[0].shared, cores=108, seed=0)  # two blocks of neurons
@given(case=sizes, shared=st.sampled_from([64, 256, 512, 1024, 232448]), cores=st.integers(1, 12), seed=st.integers(0, 999))
def test_the_source_equals_the_oracle(host, case, shared, cores, seed):
    arguments = problem(seed, *case)
    assert_near(run_on(host, *arguments, Card(90, shared, cores), seed), oracle(*arguments))


def test_equal_runs_have_equal_bits_in_any_order_of_threads(host):
    arguments = problem(0, 100, 70, 65, 21, np.float32)
    first, *others = (run_on(host, *arguments, Card(80, 1024, 3), order).tobytes() for order in range(4))
    assert others == [first] * 3


@pytest.mark.parametrize(
    ("found", "instead"),
    [
        ("      __syncthreads();", "      // no barrier"),
        ("__pipeline_wait_prior(0)", "__pipeline_wait_prior(1)"),
        ("stage ^= 1", "stage ^= 0"),
        ("column -= first;", ""),
        (
            "shape.k + group;\n#pragma unroll\n    for (int j = 0; j < K; ++j) {",
            "shape.k;\n    for (int j = 0; j < K; ++j) {",
        ),
    ],
    ids=["no barrier", "no wait", "one stage", "other slices", "one group"],
)
def test_a_fault_in_the_source_is_seen(found, instead, tmp_path):
    text = SOURCE.read_text(encoding="ascii")
    assert text.count(found) == 1
    others = re.compile(r"^ENTRIES\((?!float32_sliced).*\n", re.MULTILINE)
    (tmp_path / "faulty.cu").write_text(others.sub("", text.replace(found, instead)), encoding="ascii")
    library = compiled_for_the_host(tmp_path / "faulty.cu", tmp_path, "-O0")
    arguments = problem(0, 40, 70, 65, 21, np.float32)
    with pytest.raises(AssertionError):
        assert_near(run_on(library, *arguments, Card(80, 512, 1), 1), oracle(*arguments))


# --- the plan


@settings(max_examples=100)
@example(card=CARDS[1], tokens=16384, outputs=8192, inputs=28672, k=20, dtype=jnp.bfloat16)
@example(card=CARDS[2], tokens=1 << 20, outputs=53248, inputs=65536, k=64, dtype=jnp.float32)
@given(
    card=st.sampled_from(CARDS),
    tokens=st.integers(1, 1 << 17),
    outputs=st.integers(1, 60000),
    inputs=st.integers(1, cuda_kernels.MAX_INPUTS),
    k=st.integers(1, 100),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_any_plan_covers_everything_within_the_limits(card, tokens, outputs, inputs, k, dtype):
    launch = plan(tokens, outputs, inputs, k, dtype, card)
    blocks, groups, splits = launch.grid
    *_, connections, tiles, tiles_per_split, slice_inputs = launch.scalars
    assert launch.shared <= card.shared and launch.threads <= 1024 and launch.threads % 32 == 0
    assert groups <= 65535 and splits <= 65535
    assert blocks * launch.threads >= outputs and (blocks - 1) * launch.threads < outputs
    assert connections <= int(launch.entry.rpartition("_")[2]) and (groups - 1) * connections < k <= groups * connections
    assert launch.tokens_per_tile * tiles >= tokens and (splits - 1) * tiles_per_split < tiles <= splits * tiles_per_split
    assert 0 <= launch.inputs - inputs <= 1 and ("sliced" in launch.entry) == (slice_inputs < launch.inputs)
    assert launch.entry in cuda_kernels.ptx_of(launch.entry)


# --- the call, compiled for GPUs that are not there


@pytest.fixture(scope="module", params=["h100", "rtx4090"])
def compiler(request):
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip("JAX's CUDA plugin is not installed")
    return machines.compiler_for(machines.find(request.param, jnp.bfloat16), 8)


def shapes(tokens, outputs, inputs, k, dtype=jnp.bfloat16):
    abstract = jax.ShapeDtypeStruct
    return abstract((tokens, outputs), dtype), abstract((tokens, inputs), dtype), abstract((outputs, k), jnp.int32)


def calls(text):
    return text.count('custom_call_target="triton_kernel_call_ffi"')


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("sizes", [(2048, 4096, 11008, 20), (77, 33, 17, 1)], ids=["large", "small"])
def test_it_compiles_within_the_stated_memory(compiler, sizes, dtype):
    launch = plan(*sizes, dtype, cuda_kernels.card_of(compiler.devices[0]))
    compiled = compiler.compile(compiler.trace(jax.jit(lambda *a: gradient(*a)), *shapes(*sizes, dtype)))
    assert calls(compiled.as_text()) == 1
    in_tiles = launch.tiles * launch.tokens_per_tile * launch.inputs * dtype.dtype.itemsize
    sums = launch.grid[2] * sizes[1] * sizes[3] * 4
    assert compiled.memory_analysis().temp_size_in_bytes <= in_tiles + sums + 1024


def in_shard_map(compiler, check_vma):
    mesh = Mesh(np.array(compiler.devices), ("data",), axis_types=(AxisType.Auto,))
    rows, everything = PartitionSpec("data"), PartitionSpec()
    specs = (rows, rows, everything)
    summed = lambda *arguments: jax.lax.psum(gradient(*arguments), "data")  # noqa: E731
    mapped = jax.shard_map(summed, mesh=mesh, in_specs=specs, out_specs=everything, check_vma=check_vma)
    placed = [a.update(sharding=NamedSharding(mesh, s)) for a, s in zip(shapes(160, 40, 24, 3), specs, strict=True)]
    return jax.jit(mapped), placed


def in_scanned_layers(remat):
    def loss(values, x, kernels, columns):
        def layer(x, parts):
            kernel, columns, values = parts
            return jnp.sin(ops.bypass_dense(x, kernel, columns, values, algorithm=GradientAlgorithm.CUDA)), None

        y, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, (kernels, columns, values))
        return jnp.sum(y.astype(jnp.float32))

    abstract = jax.ShapeDtypeStruct
    values, columns = abstract((3, 40, 5), jnp.float32), abstract((3, 40, 5), jnp.int32)
    x, kernels = abstract((2, 35, 40), jnp.bfloat16), abstract((3, 40, 40), jnp.bfloat16)
    return jax.jit(jax.value_and_grad(loss), donate_argnums=0), (values, x, kernels, columns)


def test_it_compiles_inside_of_pmap(compiler):
    summed = jax.pmap(lambda *a: jax.lax.psum(gradient(*a), "data"), axis_name="data", devices=compiler.devices)
    arguments = [jax.ShapeDtypeStruct((8, *a.shape), a.dtype) for a in shapes(160, 40, 24, 3)]
    with platform.tracing_for("gpu", flash_attention=False, device=compiler.devices[0]):
        assert calls(summed.lower(*arguments).compile().as_text()) == 1


@pytest.mark.parametrize("form", ["vmap", "shard_map", "shard_map, checked", "scan", "scan, remat"])
def test_it_compiles_inside_of(form, compiler):
    if form == "vmap":
        function = jax.jit(jax.vmap(lambda *a: gradient(*a)))
        arguments = [jax.ShapeDtypeStruct((3, *a.shape), a.dtype) for a in shapes(160, 40, 24, 3)]
    elif form.startswith("shard_map"):
        function, arguments = in_shard_map(compiler, "checked" in form)
    else:
        function, arguments = in_scanned_layers("remat" in form)
    assert calls(compiler.compile(compiler.trace(function, *arguments)).as_text()) == 1


def test_maps_that_read_the_same_x_share_its_tiles(compiler):
    both = jax.jit(lambda dy, dy2, x, columns, columns2: (gradient(dy, x, columns), gradient(dy2, x, columns2)))
    (dy, x, columns), (dy2, _, columns2) = shapes(160, 40, 24, 3), shapes(160, 8, 24, 3)
    text = compiler.compile(compiler.trace(both, dy, dy2, x, columns, columns2)).as_text()
    assert calls(text) == 2 and len(re.findall(r" transpose\(", text)) == 1


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90a"])
def test_the_assembler_takes_the_ptx(architecture, tmp_path):
    assembler = shutil.which("ptxas")
    if assembler is None:
        pytest.skip("no ptxas")
    (tmp_path / "kernel.ptx").write_text(cuda_kernels.ptx_of("value_gradient_bfloat16_8_tokens_20"), encoding="ascii")
    command = [assembler, "-v", f"-arch={architecture}", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill loads", said)
    assert int(registers[1]) <= 64 and int(spilled[1]) <= 32  # a block of 1,024 threads has 64 registers for each


# --- where it cannot be used


class Device:
    core_count = 100

    def __init__(self, capability):
        self.compute_capability = capability


@pytest.mark.parametrize(
    ("capability", "dtype", "inputs", "reason"),
    [
        ("9.0", jnp.bfloat16, 4096, None),
        ("12.0", jnp.float32, 4096, None),
        ("7.5", jnp.bfloat16, 4096, "compute capability 7.5, expected 8.0 or later"),
        ("gfx942", jnp.bfloat16, 4096, "the device is not a CUDA GPU"),
        ("9.0", jnp.float16, 4096, "x is float16, expected float32 or bfloat16"),
        ("9.0", jnp.bfloat16, 65537, "65537 inputs, expected at most 65536"),
    ],
)
def test_what_the_kernel_takes(capability, dtype, inputs, reason, monkeypatch):
    monkeypatch.setattr(cuda_kernels, "_has_vehicle", lambda: True)
    with platform.tracing_for("gpu", flash_attention=False, device=Device(capability)):
        assert cuda_kernels.why_not(inputs, dtype) == reason


def test_by_name_it_falls_back_with_one_line(monkeypatch):
    monkeypatch.setattr(cuda_kernels, "_has_vehicle", lambda: False)
    value_gradient._warn.cache_clear()
    arguments = problem(0, 9, 4, 6, 2, np.float32)
    with pytest.warns(NeuroadaWarning) as told:
        got, _ = (gradient(*map(jnp.asarray, arguments)) for _ in range(2))
    assert [str(warning.message) for warning in told] == [
        "the CUDA kernel for the gradient of the values cannot be used (this JAX has no triton_kernel_call_ffi, of "
        "jaxlib.gpu_triton with a CUDA plugin): it falls back to column_gather"
    ]
    assert_near(got, oracle(*arguments))


def test_without_any_gpu_kernel_one_line_names_the_fallback(monkeypatch):
    monkeypatch.setattr(value_gradient, "_has_pallas", lambda: False)
    monkeypatch.setattr(cuda_kernels, "_has_vehicle", lambda: True)
    value_gradient._warn.cache_clear()
    with platform.tracing_for("gpu", flash_attention=False, device=Device("7.0")):
        with pytest.warns(NeuroadaWarning) as told:
            found = {choose_algorithm(20, 4096, split=False) for _ in range(3)}
        assert found == {GradientAlgorithm.DENSE_CHUNKS}
        assert [str(warning.message) for warning in told] == [
            "no GPU kernel for the gradient of the values (pallas: this JAX has no Pallas for Triton; cuda: compute "
            "capability 7.0, expected 8.0 or later): it falls back to dense_chunks"
        ]
    with platform.tracing_for("gpu", flash_attention=False, device=Device("8.6")):
        assert choose_algorithm(20, 4096, split=False) is GradientAlgorithm.CUDA


def test_more_than_its_integers_hold_is_refused():
    with pytest.raises(ValueError, match=r"8 tokens and 268435457 neurons, expected at most 2147483584 and 268435456"):
        jax.eval_shape(functools.partial(cuda_kernels.cuda_gradient, card=CARDS[0]), *shapes(8, (1 << 28) + 1, 4, 1))
