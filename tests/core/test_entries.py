"""Reading, writing and adding the chosen entries of kernels, in both layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit
from test_ops import LAYOUTS, laid_out, problem, random_columns

from neuroada_jax.core.entries import Layout, add_entries, entry_indices, read_entries, round_to, write_entries
from neuroada_jax.core.ops import bypass_dense


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rounding_is_that_of_numpy(dtype):
    """Ties, subnormal numbers, zeros of both signs, overflow and NaN included; within a compiled program as without."""
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
    random = np.random.default_rng(4).integers(0, 1 << 32, 20000, dtype=np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        numbers = np.concatenate([every, (every[1:] + every[:-1]) / 2, np.nextafter(every, np.float32(0)), random])
        numbers = np.where(np.abs(numbers) < np.finfo(np.float32).tiny, 0, numbers)  # XLA flushes what is subnormal itself
        want = numbers.astype(dtype).astype(np.float32)
    for function in round_to, jit(round_to, static_argnums=1):
        np.testing.assert_array_equal(np.asarray(function(jnp.asarray(numbers), dtype), np.float32), want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_read_write_and_add_entries_of_stacked_kernels(dtype, leading, layout):
    rng = np.random.default_rng(5)
    rows = jnp.asarray(rng.normal(size=(*leading, 7, 9)), dtype)
    kernel = laid_out(rows, layout)
    columns = np.stack([random_columns(rng, 7, 9, 4) for _ in range(int(np.prod(leading)))]).reshape(*leading, 7, 4)
    values = jnp.asarray(rng.normal(size=columns.shape), jnp.float32)
    entries = np.take_along_axis(np.asarray(rows), columns, axis=-1)
    np.testing.assert_array_equal(read_entries(kernel, jnp.asarray(columns), layout), entries)
    np.testing.assert_array_equal(kernel[entry_indices(jnp.asarray(columns), layout)], entries)

    for got, new in [
        (write_entries(kernel, jnp.asarray(columns), values, layout), values),
        (add_entries(kernel, jnp.asarray(columns), values, layout), entries.astype(np.float32) + np.asarray(values)),
    ]:
        expected = np.array(rows)
        np.put_along_axis(expected, columns, np.asarray(jnp.asarray(new).astype(dtype)), axis=-1)
        np.testing.assert_array_equal(got, laid_out(expected, layout))
        assert got.dtype == dtype


def test_a_kernel_in_the_other_layout_is_refused():
    """Scatters promise to stay in bounds: nothing may reach them that does not."""
    _, kernel, columns, values, _ = problem(8, (2,), 12, 5, 3)
    calls = [
        lambda kernel, layout: read_entries(kernel, columns, layout),
        lambda kernel, layout: write_entries(kernel, columns, values, layout),
        lambda kernel, layout: add_entries(kernel, columns, values, layout),
        lambda kernel, layout: add_entries(kernel, columns, values.astype(jnp.bfloat16), layout),
        lambda kernel, layout: bypass_dense(jnp.ones((2, 5)), kernel, columns, values, resident=True, layout=layout),
    ]
    kernel, columns, values = jnp.asarray(kernel, jnp.float32), jnp.asarray(columns), jnp.asarray(values, jnp.float32)
    for call in calls:
        for right, wrong in (Layout.OI, Layout.IO), (Layout.IO, Layout.OI):
            with pytest.raises(ValueError, match=rf"in layout {wrong} does not fit columns \(12, 3\)"):
                call(laid_out(kernel, right), wrong)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_resident_write_is_in_place(dtype, layout):
    kernel = jax.ShapeDtypeStruct((4, 256, 192) if layout is Layout.OI else (4, 192, 256), dtype)
    entries, columns = jax.ShapeDtypeStruct((4, 256, 2), jnp.float32), jax.ShapeDtypeStruct((4, 256, 2), jnp.int32)
    write = lambda kernel, columns, base_entries, values: write_entries(kernel, columns, base_entries + values, layout)  # noqa: E731
    compiled = jax.jit(write, donate_argnums=0).lower(kernel, columns, entries, entries).compile()
    memory = compiled.memory_analysis()
    size = 4 * 256 * 192 * dtype.dtype.itemsize
    assert memory.alias_size_in_bytes >= size
    if dtype == jnp.float32 or jax.default_backend() != "cpu":  # XLA's CPU backend scatters bfloat16 in float32
        assert memory.temp_size_in_bytes < size / 2
