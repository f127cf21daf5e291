"""Products with the kernels of experts against dense ones, their bypass, and the products that are not formed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from neuroada_jax.core import experts, selection
from neuroada_jax.core.entries import add_entries
from neuroada_jax.planning import roofline

I, O = 12, 10


def problem(rows, count, k=2, seed=0, dtype=np.float64):
    """(x, kernel, chosen, columns, values); half of the rows have one expert, and some experts have no row."""
    rng = np.random.default_rng(seed)
    chosen = np.where(rng.random(rows) < 0.5, count // 2, rng.integers(0, count, rows)).astype(np.int32)
    kernel = jnp.asarray(rng.normal(size=(count, O, I)).astype(dtype))
    values = jnp.asarray(0.3 * rng.normal(size=(count, O, k)).astype(dtype))
    return jnp.asarray(rng.normal(size=(rows, I)).astype(dtype)), kernel, chosen, selection.select(kernel, k), values


def dense(x, kernel, chosen):
    return jnp.einsum("ri,roi->ro", x, kernel[chosen])


def product(x, kernel, chosen, columns=None, values=None, resident=False):
    blocks = experts.blocks_of(jnp.asarray(chosen), kernel.shape[0])
    rows = experts.into_blocks(x, blocks)
    if values is None:
        return experts.out_of_blocks(experts.plain(rows, kernel, blocks.experts), blocks)
    y = experts.bypass_experts(rows, kernel, blocks.experts, columns, values, resident=resident)
    return experts.out_of_blocks(y, blocks)


@pytest.mark.parametrize(("rows", "count"), [(1, 5), (7, 3), (64, 8), (200, 3), (100, 40)])
def test_products_equal_dense_ones_in_few_blocks(rows, count):
    x, kernel, chosen, *_ = problem(rows, count, dtype=np.float32)
    np.testing.assert_allclose(jit(product)(x, kernel, chosen), dense(x, kernel, chosen), rtol=0, atol=1e-5)
    blocks = experts.blocks_of(jnp.asarray(chosen), count)
    assert blocks.experts.shape[0] * blocks.size <= max(1.5 * rows, rows)
    assert np.unique(blocks.slots).size == rows


@pytest.mark.parametrize("resident", [False, True])
def test_the_bypass_has_the_gradient_of_merging(resident):
    with jax.enable_x64(True):
        x, kernel, chosen, columns, values = problem(60, 4)
        held = add_entries(kernel, columns, values) if resident else kernel

        def ours(x, values):
            return jnp.sum(jnp.sin(product(x, held, chosen, columns, values, resident)))

        def theirs(x, values):
            return jnp.sum(jnp.sin(dense(x, add_entries(kernel, columns, values), chosen)))

        found, wanted = (jit(jax.value_and_grad(each, argnums=(0, 1)))(x, values) for each in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), found, wanted)
    assert not np.asarray(found[1][1])[np.setdiff1d(np.arange(4), chosen)].any()


@pytest.mark.parametrize("rows", [8, 4096])
def test_no_product_is_formed_over_all_experts(rows):
    count = 32
    x, kernel, chosen, columns, values = problem(rows, count, dtype=np.float32)

    def loss(x, values):
        return jnp.sum(product(x, kernel, chosen, columns, values, resident=True))

    forward = 2 * rows * O * I
    for function, times in ((loss, 1), (jax.grad(loss, argnums=(0, 1)), 2)):
        jaxpr = jax.make_jaxpr(function)(x, values).jaxpr
        done = roofline.work(jaxpr, [False] * len(jaxpr.invars)).flops
        assert times * forward <= done <= 1.5 * times * forward < count * forward
