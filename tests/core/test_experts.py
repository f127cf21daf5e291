"""Products with the kernels of experts, quantised or not, against dense ones, and what is not formed for them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equations
from quick import jit

from neuroada_jax.core import experts, low_rank, platform, quantise, quantised, selection
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.core.entries import add_entries
from neuroada_jax.core.quantised import QuantisedKernel
from neuroada_jax.planning import roofline

I, O = 12, 10


def problem(rows, count, k=2, seed=0, dtype=np.float64, inputs=I):
    """(x, kernel, chosen, columns, values); half of the rows have one expert, and some experts have no row."""
    rng = np.random.default_rng(seed)
    chosen = np.where(rng.random(rows) < 0.5, count // 2, rng.integers(0, count, rows)).astype(np.int32)
    kernel = jnp.asarray(rng.normal(size=(count, O, inputs)).astype(dtype))
    values = jnp.asarray(0.3 * rng.normal(size=(count, O, k)).astype(dtype))
    return jnp.asarray(rng.normal(size=(rows, inputs)).astype(dtype)), kernel, chosen, selection.select(kernel, k), values


def dense(x, kernel, chosen):
    return jnp.einsum("ri,roi->ro", x, kernel[chosen])


def product(x, kernel, chosen, columns=None, values=None, resident=False):
    blocks = experts.blocks_of(jnp.asarray(chosen), kernel.shape[0], dequantised=quantised.is_quantised(kernel))
    rows = experts.into_blocks(x, blocks)
    if values is None:
        return experts.out_of_blocks(experts.plain(rows, kernel, blocks.experts), blocks)
    y = experts.bypass_experts(rows, kernel, blocks.experts, columns, values, resident=resident)
    return experts.out_of_blocks(y, blocks)


@pytest.mark.parametrize(("rows", "count"), [(1, 5), (200, 3), (100, 40)])
def test_products_equal_dense_ones_in_few_blocks(rows, count):
    x, kernel, chosen, *_ = problem(rows, count, dtype=np.float32)
    np.testing.assert_allclose(jit(product)(x, kernel, chosen), dense(x, kernel, chosen), rtol=0, atol=1e-5)
    for dequantised, most in ((False, 1.5), (True, 2)):
        blocks = experts.blocks_of(jnp.asarray(chosen), count, dequantised=dequantised)
        assert blocks.experts.shape[0] * blocks.size <= most * rows
        assert np.unique(blocks.slots).size == rows


@pytest.fixture(params=[1, 2], ids=["one by one", "two at once"])
def at_once(request, monkeypatch):
    """The blocks of a step, of which a GPU takes several."""
    monkeypatch.setattr(experts, "_at_once", lambda blocks, entries: math.gcd(blocks, request.param))


@pytest.mark.parametrize(("resident", "shared"), [(False, True), (True, False)])
def test_the_bypass_has_the_gradient_of_merging(resident, shared, at_once):
    with jax.enable_x64(True):
        x, kernel, chosen, columns, values = problem(64, 4)
        columns = selection.select(kernel, 2, shared=shared)
        held = add_entries(kernel, columns, values) if resident else kernel

        def ours(x, values):
            return jnp.sum(jnp.sin(product(x, held, chosen, columns, values, resident)))

        def theirs(x, values):
            return jnp.sum(jnp.sin(dense(x, add_entries(kernel, columns, values), chosen)))

        found, wanted = (jit(jax.value_and_grad(each, argnums=(0, 1)))(x, values) for each in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), found, wanted)
    assert not np.asarray(found[1][1])[np.setdiff1d(np.arange(4), chosen)].any()


def test_factors_and_kernels_of_experts_have_the_gradients_of_dense_products(at_once):
    with jax.enable_x64(True):
        x, kernel, chosen, *_ = problem(64, 4)
        rng = np.random.default_rng(1)
        factors = [jnp.asarray(rng.normal(size=shape)) for shape in ((4, 3, I), (4, O, 3), (4,))]

        def ours(x, kernel, a, b):
            blocks = experts.blocks_of(jnp.asarray(chosen), 4)
            rows = experts.into_blocks(x, blocks)
            y = experts.plain(rows, kernel, blocks.experts)
            y = y + experts.low_rank_experts(rows, blocks.experts, a, b, factors[2])
            return jnp.sum(jnp.sin(experts.out_of_blocks(y, blocks)))

        def theirs(x, kernel, a, b):
            change = factors[2][:, None, None] * jnp.einsum("eor,eri->eoi", b, a)
            return jnp.sum(jnp.sin(dense(x, kernel + change, chosen)))

        given = (x, kernel, *factors[:2])
        found, wanted = (jit(jax.value_and_grad(each, argnums=(0, 1, 2, 3)))(*given) for each in (ours, theirs))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), found, wanted)
        for of, is_formed in (((0, 2, 3), False), ((0, 1), True)):  # no gradient of a kernel that is frozen
            jaxpr = jax.make_jaxpr(jax.grad(ours, argnums=of))(*given).jaxpr
            assert any(out.aval.shape == kernel.shape for each in equations(jaxpr) for out in each.outvars) == is_formed
        adapter = low_rank.build({"map": {"kernel": kernel[None]}}, [("map",)], 3, 0.5, jax.random.key(0), jnp.float64)
        assert jax.tree.map(jnp.shape, adapter.values["map"]) == {"lora_a": (1, 4, 3, I), "lora_b": (1, 4, O, 3)}
        node = {"lora_a": factors[0][None], "lora_b": factors[1][None]}
        trained = Bypass({"map": node}, {"map": {"scale": factors[2][None]}})
        merged = low_rank.merge({"map": {"kernel": kernel[None]}}, trained)["map"]["kernel"]
        change = factors[2][:, None, None] * jnp.einsum("eor,eri->eoi", factors[1], factors[0])
        np.testing.assert_allclose(merged[0], kernel + change, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [8, 4096])
def test_no_product_is_formed_over_all_experts(rows):
    count = 32
    x, kernel, chosen, columns, values = problem(rows, count, dtype=np.float32)

    def loss(x, values, kernel):
        return jnp.sum(product(x, kernel, chosen, columns, values, resident=True))

    forward = 2 * rows * O * I
    read = experts.blocks_of(jnp.asarray(chosen), count).experts.size * kernel[0].nbytes
    for function, times in ((loss, 1), (jax.grad(loss, argnums=(0, 1)), 2)):
        done = roofline.work(jax.make_jaxpr(function)(x, values, kernel), [False, False, True])
        assert times * forward <= done.flops <= 1.5 * times * forward < count * forward
        assert done.weight_bytes == times * read


def floats(jaxpr):
    """The number of entries of every floating-point array that a jaxpr forms."""
    formed = [out.aval for each in equations(jaxpr) for out in each.outvars]
    return [aval.size for aval in formed if jnp.issubdtype(aval.dtype, jnp.floating)]


@pytest.mark.parametrize("form", [None, "nf4_nested", "int8"])
def test_few_experts_at_a_time_are_dequantised_and_get_their_values(form, at_once):
    count, rows = 16, 40
    x, dense_kernel, chosen, columns, values = problem(rows, count, dtype=np.float32, inputs=64)
    kernel = dense_kernel
    if form is not None:
        kernel = QuantisedKernel(jax.vmap(lambda own: quantise.quantise(own, form))(kernel), form, jnp.dtype("float32"))
        dense_kernel = quantised.dense_stack(kernel)
    columns = selection.select(kernel, 2)
    np.testing.assert_array_equal(columns, selection.select(dense_kernel, 2))
    merged = add_entries(dense_kernel, columns, values)

    def trained(x, values):
        return product(x, kernel, chosen, columns, values, resident=form is not None)

    def frozen(x):
        return product(x, kernel, chosen)

    def all_at_once(x, values):
        return dense(x, add_entries(quantised.dense(kernel), columns, values), chosen)

    dy = jax.random.normal(jax.random.key(0), (rows, O))

    def with_gradients(function):
        def both(*given):
            y, pullback = jax.vjp(function, *given)
            return y, *pullback(dy)

        return both

    for ours, theirs, given in (
        (trained, all_at_once, (x, values)),
        (frozen, lambda x: dense(x, dense_kernel, chosen), (x,)),
    ):
        for own, other in zip(*(jit(with_gradients(each))(*given) for each in (ours, theirs)), strict=True):
            np.testing.assert_allclose(own, other, rtol=0, atol=2e-5 * np.abs(other).max())
        assert max(floats(jax.make_jaxpr(with_gradients(ours))(*given).jaxpr)) < dense_kernel.size / 2
    assert max(floats(jax.make_jaxpr(all_at_once)(x, values).jaxpr)) >= dense_kernel.size  # the check sees such a copy
    if form is not None:  # a merged kernel is what is trained, bit for bit
        held = quantised.with_bypass(kernel, columns, values)
        np.testing.assert_array_equal(quantised.dense_stack(held), merged)
        np.testing.assert_array_equal(jit(product)(x, held, chosen), jit(trained)(x, values))


def test_a_gpu_takes_several_small_blocks_at_once():
    assert experts._at_once(256, 768 * 2048) == 1  # each launch costs nothing on a CPU
    with platform.tracing_for("gpu", flash_attention=False):
        assert [experts._at_once(blocks, 768 * 2048) for blocks in (256, 24, 9, 1)] == [16, 8, 1, 1]
        assert experts._at_once(256, 14336 * 4096) == 1  # of 117 MB each
        assert experts._at_once(256, 2**23) == 4
        jaxpr = jax.make_jaxpr(product)(*problem(4096, 32, dtype=np.float32)[:3]).jaxpr
    assert {each.params["length"] for each in equations(jaxpr) if each.primitive.name == "scan"} == {96 // 16}
