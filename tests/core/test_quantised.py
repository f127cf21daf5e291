"""Quantised kernels: their formats, the op on them, and the bypass of a tree that holds them."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.quants import dequantize
from helpers import equations

from neuroada_jax.core import bypass, gguf_blocks, ops, platform, quantise, quantised, selection
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.core.quantised import QuantisedKernel
from neuroada_jax.core.quantised_formats import FORMATS, NF4, bits, check_inputs
from neuroada_jax.errors import UserError

INPUTS, OUTPUTS, LAYERS, K = 256, 6, 3, 2
INTEGERS = [name for name in FORMATS if name.startswith(("int4_", "int8_"))]
_QUICK = ("int4_128", "int4_32_any_order", "int8_row")  # of these; all of them have one decoder
EVERY_FORMAT = [
    pytest.param(name, marks=pytest.mark.slow if name in INTEGERS and name not in _QUICK else ()) for name in FORMATS
]


def _stored(name: str, rows: int, inputs: int) -> np.ndarray:
    """Return random rows in a GGUF format, whose float16 fields are finite."""
    block = gguf_blocks.BLOCKS[name]
    random = np.random.default_rng(0)
    raw = random.integers(0, 256, (rows, inputs // block.entries, block.nbytes), dtype=np.uint8)
    start = 0
    for dtype, count in block.fields.values():
        stop = start + np.dtype(dtype).itemsize * count
        if dtype == np.float16:
            numbers = random.standard_normal((*raw.shape[:2], count)).astype(np.float16)
            raw[..., start:stop] = numbers.view(np.uint8)
        start = stop
    return raw.reshape(rows, -1)


def _integers(name: str, seed: int) -> dict[str, np.ndarray]:
    """Return random integers with scales and zero points in a format."""
    random, made = np.random.default_rng(seed), {}
    for part, (dtype, width, shared) in FORMATS[name].parts.items():
        shape = (1 if shared else OUTPUTS, width(INPUTS))
        if dtype == jnp.float16:
            made[part] = random.standard_normal(shape).astype(np.float16)
        else:  # the zero points of 4 bits are below 16, and the groups of inputs are as many as there are scales
            largest = {"group": FORMATS[name].parts["scale"].width(INPUTS), "zero": 16}.get(part, 256)
            made[part] = random.integers(0, largest, shape).astype(np.dtype(dtype))
    return made


def _kernel(name: str, dtype=jnp.float32, leading: tuple[int, ...] = ()) -> QuantisedKernel:
    """Return a quantised kernel of random entries, the layers stacked if `leading` asks for it."""
    layers = []
    for number in range(leading[0] if leading else 1):
        if name in gguf_blocks.BLOCKS:
            parts = gguf_blocks.split_fields(_stored(name, OUTPUTS, INPUTS), gguf_blocks.BLOCKS[name])
            parts = {field: np.roll(part, number, 0) for field, part in parts.items()}
        elif name in INTEGERS:
            parts = _integers(name, number)
        elif name == "fp8_blocks":
            made = quantise.quantise(jax.random.normal(jax.random.key(number), (OUTPUTS, INPUTS)), "fp8")
            parts = {"codes": made["codes"], "scale": jnp.repeat(made["scale"], INPUTS // 128, axis=1)}
        else:
            parts = quantise.quantise(jax.random.normal(jax.random.key(number), (OUTPUTS, INPUTS)), name)
        layers.append(QuantisedKernel(jax.tree.map(jnp.asarray, dict(parts)), name, jnp.dtype(dtype)))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers) if leading else layers[0]


@pytest.mark.parametrize("name", gguf_blocks.BLOCKS)
def test_gguf_blocks_are_those_of_the_gguf_package(name: str) -> None:
    stored, block = _stored(name, 4, 512), gguf_blocks.BLOCKS[name]
    parts = gguf_blocks.split_fields(stored, block)
    expected = dequantize(stored, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(gguf_blocks.decode(parts, block), expected)
    np.testing.assert_array_equal(jax.jit(lambda parts: gguf_blocks.decode(parts, block))(parts), expected)
    assert bits(name, 512) * 512 / 8 == stored.shape[1]


def test_nf4_takes_the_nearest_number_and_packs_the_first_into_the_high_half() -> None:
    kernel = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32)
    kernel[1, :64] = 0
    parts = quantise.quantise(kernel, "nf4")
    codes = np.stack([parts["codes"] >> 4, parts["codes"] & 15], -1).reshape(3, 2, 64)
    absmax = np.abs(kernel.reshape(3, 2, 64)).max(-1)
    np.testing.assert_array_equal(parts["absmax"], absmax)
    distances = np.abs(kernel.reshape(3, 2, 64, 1) - NF4 * absmax[..., None, None])
    chosen = np.take_along_axis(distances, codes[..., None].astype(int), -1)[..., 0]
    np.testing.assert_allclose(chosen, distances.min(-1), atol=1e-6)
    dense = quantised.dequantise(QuantisedKernel(parts, "nf4", jnp.dtype("float32")))
    np.testing.assert_array_equal(dense, (NF4[codes] * absmax[..., None]).reshape(3, 128))


@pytest.mark.parametrize("inputs", [64, 192, 256, 14336])
def test_double_quantisation_is_that_of_the_flattened_scales(inputs: int) -> None:
    kernel = np.random.default_rng(0).standard_normal((9, inputs)).astype(np.float32)
    parts = {name: np.asarray(part) for name, part in quantise.quantise(kernel, "nf4_nested").items()}
    once = quantise.quantise(kernel, "nf4")
    np.testing.assert_array_equal(parts["codes"], once["codes"])
    flat = np.asarray(once["absmax"]).reshape(-1) - parts["offset"][0, 0]
    largest = np.repeat([np.abs(flat[start : start + 256]).max() for start in range(0, flat.size, 256)], 256)[: flat.size]
    expected = parts["table"][0][parts["absmax"].reshape(-1)] * largest + parts["offset"][0, 0]
    node = QuantisedKernel(parts, "nf4_nested", jnp.dtype("float32"))
    found = np.abs(np.asarray(jax.jit(quantised.dequantise)(node))).reshape(-1, 64).max(1)
    np.testing.assert_allclose(found, np.abs(expected), rtol=1e-6)
    np.testing.assert_allclose(found, np.asarray(once["absmax"]).reshape(-1), rtol=0.1)


@pytest.mark.parametrize(("name", "error"), [("nf4", 0.16), ("nf4_nested", 0.17), ("int8", 0.004), ("fp8", 0.07)])
def test_quantised_kernels_are_near_the_kernel(name: str, error: float) -> None:
    kernel = jax.random.normal(jax.random.key(1), (16, INPUTS))
    node = QuantisedKernel(quantise.quantise(kernel, name), name, jnp.dtype("float32"))
    assert jnp.max(jnp.abs(quantised.dequantise(node) - kernel)) < error * jnp.max(jnp.abs(kernel))
    zeros = QuantisedKernel(quantise.quantise(jnp.zeros_like(kernel), name), name, jnp.dtype("float32"))
    assert not jnp.any(quantised.dequantise(zeros))


def _oracle(dense: np.ndarray, x: np.ndarray, columns: np.ndarray, values: np.ndarray, dy: np.ndarray) -> tuple:
    """Return y, dx and dvalues in float64."""
    merged = dense.astype(np.float64)
    np.put_along_axis(merged, columns, np.take_along_axis(merged, columns, 1) + values, 1)
    gathered = x.astype(np.float64)[:, columns]
    return x @ merged.T, dy @ merged, np.einsum("to,tok->ok", dy.astype(np.float64), gathered)


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_the_op_is_that_of_the_dequantised_kernel(name: str) -> None:
    kernel = _kernel(name)
    dense = np.asarray(quantised.dequantise(kernel))
    random = np.random.default_rng(0)
    x, dy = (jnp.asarray(random.standard_normal((5, size)), jnp.float32) for size in (INPUTS, OUTPUTS))
    columns = selection.select(kernel, K)
    np.testing.assert_array_equal(columns, selection.select(jnp.asarray(dense), K))
    values = jnp.asarray(random.standard_normal((OUTPUTS, K)), jnp.float32)
    y, pullback = jax.vjp(lambda x, values: ops.bypass_dense(x, kernel, columns, values, resident=True), x, values)
    for found, expected in zip((y, *pullback(dy)), _oracle(dense, *map(np.asarray, (x, columns, values, dy))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
    frozen, pullback = jax.vjp(lambda x: ops.quantised_dense(x, kernel), x)
    np.testing.assert_allclose(frozen, x @ dense.T, rtol=2e-5, atol=2e-5 * np.abs(frozen).max())
    np.testing.assert_allclose(pullback(dy)[0], dy @ dense, rtol=2e-5, atol=2e-5 * np.abs(dy @ dense).max())


@pytest.mark.parametrize("name", ["nf4_nested", "int8", "Q4_1", "Q6_K"])
def test_rows_and_products_of_a_vocabulary_in_parts(name: str, monkeypatch) -> None:
    monkeypatch.setattr(ops, "_CHUNK", 2 * INPUTS)
    kernel = _kernel(name)
    dense = np.asarray(quantised.dequantise(kernel))
    ids = jnp.array([[5, 0], [2, 2]], jnp.int32)
    np.testing.assert_array_equal(quantised.read_rows(kernel, ids), dense[np.asarray(ids)])
    x, dy = (jax.random.normal(jax.random.key(size), (1, 2, size)) for size in (INPUTS, OUTPUTS))
    y, pullback = jax.vjp(lambda x: ops.vocabulary_dense(x, kernel), x)
    for found, expected in ((y, x @ dense.T), (pullback(dy)[0], dy @ dense)):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
    made = [out.aval for each in equations(jax.make_jaxpr(pullback)(dy).jaxpr) for out in each.outvars]
    assert max(aval.size for aval in made if jnp.issubdtype(aval.dtype, jnp.floating)) < dense.size
    assert [ops._chunks(*shape) for shape in ((7, 512), (12, 512), (1, 8))] == [7, 12, 1]


@pytest.mark.parametrize("name", ["nf4_nested", "Q6_K"])
def test_a_few_rows_on_a_gpu_are_the_product(name: str) -> None:
    kernel = _kernel(name, jnp.bfloat16)
    columns, values = selection.select(kernel, K), jax.random.normal(jax.random.key(0), (OUTPUTS, K))
    for own in (kernel, quantised.with_bypass(kernel, columns, values), quantised.with_bypass(kernel, columns[:1], values)):
        dense = np.asarray(quantised.dequantise(own), np.float32)
        for rows in ((), (1,), (2, 2), (5,)):
            x = jax.random.normal(jax.random.key(1), (*rows, INPUTS))
            with platform.tracing_for("gpu", flash_attention=False):
                traced = jax.make_jaxpr(lambda x, own=own: ops.quantised_dense(x, own))(x)
            assert any(each.primitive.name == "dot_general" for each in equations(traced.jaxpr)) is (rows == (5,))
            found = jax.core.eval_jaxpr(traced.jaxpr, traced.consts, x)[0]
            expected = np.asarray(x) @ dense.T
            np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


def _kept(function, *arguments) -> list:
    """Return the floating-point arrays that the backward pass keeps, as shapes."""
    _, pullback = jax.eval_shape(lambda *arguments: jax.vjp(function, *arguments), *arguments)
    return [leaf for leaf in jax.tree.leaves(pullback) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def test_nothing_of_the_size_of_the_weight_is_kept() -> None:
    kernel, x = _kernel("nf4"), jnp.ones((2, INPUTS))
    columns, values = jnp.zeros((OUTPUTS, 1), jnp.int32), jnp.zeros((OUTPUTS, 1))
    squares = jnp.zeros(INPUTS)
    of_values = lambda x, values: ops.bypass_dense(x, kernel, columns, values)  # noqa: E731
    largest = max(x.size, kernel.parts["absmax"].size)
    assert largest < kernel.size
    for function, arguments in (
        (of_values, (x, values)),
        (lambda x: ops.quantised_dense(x, kernel), (x,)),
        (lambda x, squares: ops.observed_dense(x, kernel, squares), (x, squares)),
    ):
        assert all(leaf.size <= largest for leaf in _kept(function, *arguments))
    plain = lambda x: x @ quantised.dequantise(kernel).T  # noqa: E731
    assert any(leaf.size == kernel.size for leaf in _kept(plain, x))  # the check sees what it is for


def test_examples_under_vmap_share_one_dequantisation() -> None:
    kernel, x = _kernel("int8"), jax.random.normal(jax.random.key(0), (3, 2, INPUTS))
    columns, values = selection.select(kernel, K), jnp.ones((OUTPUTS, K))
    each = jax.vmap(lambda x: ops.bypass_dense(x, kernel, columns, values))(x)
    np.testing.assert_allclose(each, ops.bypass_dense(x, kernel, columns, values), rtol=1e-5, atol=1e-4)
    members = jax.vmap(lambda values: ops.bypass_dense(x, kernel, columns, values))(jnp.stack([values, 2 * values]))
    np.testing.assert_allclose(members[0], each, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["nf4_nested", "Q4_K"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_trained_is_what_is_merged(name: str, dtype) -> None:
    kernel = _kernel(name, dtype, (LAYERS,))
    params = {"map": {"kernel": kernel}}
    built = bypass.build(params, [("map",)], K)
    values = {"map": {"values": jax.random.normal(jax.random.key(0), (LAYERS, OUTPUTS, K))}}
    merged = bypass.merge(params, Bypass(values, built.columns))
    dense = {"map": {"kernel": jax.vmap(quantised.dequantise)(kernel)}}
    np.testing.assert_array_equal(
        bypass.read(params, built.columns)["map"]["base_entries"], bypass.read(dense, built.columns)["map"]["base_entries"]
    )
    expected = bypass.merge(dense, Bypass(values, built.columns))["map"]["kernel"]
    np.testing.assert_array_equal(jax.vmap(quantised.dequantise)(merged["map"]["kernel"]), expected)
    x = jnp.eye(INPUTS, dtype=dtype)
    for layer in range(LAYERS):
        own = [tree["map"][leaf][layer] for tree, leaf in ((built.columns, "columns"), (values, "values"))]
        np.testing.assert_array_equal(ops.bypass_dense(x, kernel[layer], *own).T, expected[layer])
    entries = bypass.read(params, built.columns)
    back = bypass.unmerge(merged, built.columns, entries)
    assert back["map"]["kernel"].values is None
    assert bypass.make_resident(params, Bypass(values, built.columns), entries)["map"]["kernel"] is kernel
    swapped, _ = bypass.swap(merged, built.columns, entries, Bypass(values, built.columns))
    np.testing.assert_array_equal(jax.vmap(quantised.dequantise)(swapped["map"]["kernel"]), expected)
    with pytest.raises(UserError, match="unmerge them first"):
        bypass.merge(merged, Bypass(values, built.columns))


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_shapes_are_known_before_there_are_arrays(name: str) -> None:
    kernel = _kernel(name, jnp.bfloat16, (LAYERS,))
    dense = jax.ShapeDtypeStruct((LAYERS, OUTPUTS, INPUTS), jnp.bfloat16)
    abstract = quantised.abstract(dense, name)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), kernel.parts) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract.parts
    )
    assert (abstract.shape, abstract.ndim, abstract.size) == (dense.shape, 3, dense.size)
    assert bypass.count({"map": {"kernel": kernel}}) == dense.size
    assert jax.eval_shape(quantised.dequantise, abstract) == dense


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_code_less_zero_point_times_scale(name: str) -> None:
    kernel = _kernel(name)
    codes, scale, zero = (np.asarray(kernel.parts[part]) for part in ("codes", "scale", "zero"))
    if name.startswith("int4"):
        codes = np.array([[half for byte in row for half in (byte // 16, byte % 16)] for row in codes])
    group = (
        np.asarray(kernel.parts["group"][0]) if "group" in kernel.parts else np.arange(INPUTS) * scale.shape[1] // INPUTS
    )
    expected = (codes.astype(np.float32) - zero[:, group]) * scale.astype(np.float32)[:, group]
    np.testing.assert_array_equal(jax.jit(quantised.dequantise)(kernel), expected)
    np.testing.assert_array_equal(quantised.read_rows(kernel, jnp.array([5, 0])), expected[[5, 0]])
    x = np.linspace(-1, 1, INPUTS, dtype=np.float32)
    found = quantised.row_product(jnp.asarray(x), kernel)
    np.testing.assert_allclose(found, expected @ x, rtol=2e-5, atol=2e-5 * np.abs(expected @ x).max())
    assert bits(name, INPUTS) == (4 if name.startswith("int4") else 8) + 24 * scale.shape[1] / INPUTS


def test_blocks_divide_the_inputs() -> None:
    with pytest.raises(UserError, match="up_proj: nf4 has blocks of 64 inputs, which do not divide its 96 inputs"):
        check_inputs("nf4", 96, "up_proj")
    with pytest.raises(UserError, match="up_proj: int4_128 has blocks of 128 inputs, which do not divide its 192 inputs"):
        check_inputs("int4_128", 192, "up_proj")
