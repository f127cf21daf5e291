"""The chosen entries of a kernel: reading, replacing and adding to k entries of every neuron.

Shapes: kernels are (*L, O, I) or (*L, I, O), where *L are the axes of stacked layers, if any; columns, values and base
entries are (*L, O, k) for both. Columns are int32, distinct within a neuron and in [0, I). Columns that all neurons of a
map share are (*L, 1, k): then whole columns of k inputs are read and written.
"""

import enum
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


class Layout(enum.StrEnum):
    """Axis order of a kernel."""

    OI = "OI"  # (*L, O, I), neurons first: PyTorch, Hugging Face checkpoints, the models of this package
    IO = "IO"  # (*L, I, O), inputs first: Flax's nn.Dense and most code that writes x @ kernel


def wide_dtype(dtype: Any) -> Any:
    """Return the dtype in which numbers of `dtype` are accumulated: float64 for float64, else float32."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def round_to(numbers: Float[Array, "*S"], dtype: Any) -> Float[Array, "*S"]:
    """Return the numbers rounded to `dtype`, in `dtype`, also where the compiler could go on with the unrounded ones.

    A cast alone does not have to round under jit: where a wider dtype follows, a compiler may drop both conversions, and
    XLA does so on a GPU (`xla_allow_excess_precision`). `lax.reduce_precision` is always carried out.
    """
    wide, narrow = jnp.finfo(numbers.dtype), jnp.finfo(dtype)
    if narrow.nmant >= wide.nmant:
        return numbers.astype(dtype)
    rounded = lax.reduce_precision(numbers, narrow.nexp, narrow.nmant)
    if narrow.nexp < wide.nexp:  # reduce_precision has no subnormal numbers: they are multiples of the smallest
        smallest = jnp.asarray(narrow.smallest_subnormal, numbers.dtype)
        steps = lax.round(numbers / smallest, lax.RoundingMethod.TO_NEAREST_EVEN)
        rounded = jnp.where(jnp.abs(numbers) < jnp.asarray(narrow.tiny, numbers.dtype), steps * smallest, rounded)
    return rounded.astype(dtype)


def check_layout(kernel: Any, columns: Array, layout: Layout) -> None:
    """Check that a kernel in this layout has the leading axes and the neurons of the columns.

    The scatters below promise XLA that indices are in bounds, so a kernel in the other layout must not reach them.

    Raises:
      ValueError: it does not.
    """
    neurons = kernel.shape[-2] if Layout(layout) is Layout.OI else kernel.shape[-1]
    *leading, found, _ = columns.shape
    if kernel.shape[:-2] != tuple(leading) or found not in (neurons, 1):
        raise ValueError(f"a kernel {kernel.shape} in layout {layout} does not fit columns {columns.shape} (*L, O, k)")


def are_shared(columns: Int[Array, "*L _ k"], neurons: int) -> bool:
    """Return whether one set of columns is that of all neurons; of a map with one neuron, it is that neuron's own."""
    return columns.shape[-2] == 1 < neurons


def entry_indices(columns: Int[Array, "*L O k"], layout: Layout = Layout.OI) -> tuple[Array, ...]:
    """Return the index arrays with which ``kernel[entry_indices(columns, layout)]`` is the chosen entries, (*L, O, k)."""
    *leading, neurons = [
        jnp.arange(size, dtype=columns.dtype).reshape((-1,) + (1,) * (columns.ndim - 1 - axis))
        for axis, size in enumerate(columns.shape[:-1])
    ]
    return (*leading, neurons, columns) if Layout(layout) is Layout.OI else (*leading, columns, neurons)


def read_entries(
    kernel: Float[Array, "*L _ _"], columns: Int[Array, "*L _ k"], layout: Layout = Layout.OI
) -> Float[Array, "*L O k"]:
    """Return the kernel's entries at the columns, in the kernel's dtype.

    Raises:
      ValueError: the kernel does not fit the columns in this layout (`write_entries` and `add_entries` likewise).
    """
    check_layout(kernel, columns, layout)
    if Layout(layout) is Layout.OI:
        return jnp.take_along_axis(kernel, columns, axis=-1, mode="clip")
    entries = jnp.take_along_axis(kernel, columns.swapaxes(-1, -2), axis=-2, mode="clip")
    return entries.swapaxes(-1, -2)


def write_entries(
    kernel: Float[Array, "*L _ _"],
    columns: Int[Array, "*L _ k"],
    entries: Float[Array, "*L O k"],
    layout: Layout = Layout.OI,
) -> Float[Array, "*L _ _"]:
    """Return the kernel with the entries at the columns replaced, rounded to its dtype; in place under jit if donated."""
    check_layout(kernel, columns, layout)
    entries = round_to(entries, kernel.dtype)
    if are_shared(columns, entries.shape[-2]):
        return _write_columns(kernel, columns, entries, layout)
    return kernel.at[entry_indices(columns, layout)].set(entries, unique_indices=True, mode="promise_in_bounds")


def _write_columns(kernel: Array, columns: Array, entries: Array, layout: Layout) -> Array:
    """Return the kernel with whole columns replaced: a scatter of k slices for each layer, not of O times k numbers."""
    (outputs, k), stack = entries.shape[-2:], math.prod(kernel.shape[:-2])
    layers, chosen = jnp.arange(stack, dtype=columns.dtype)[:, None], columns.reshape(stack, k)
    index = (layers, slice(None), chosen) if Layout(layout) is Layout.OI else (layers, chosen)
    slices = entries.reshape(stack, outputs, k).swapaxes(1, 2)  # indexing puts the layers and the columns in front
    stacked = kernel.reshape(stack, *kernel.shape[-2:])
    return stacked.at[index].set(slices, unique_indices=True, mode="promise_in_bounds").reshape(kernel.shape)


def add_entries(
    kernel: Float[Array, "*L _ _"],
    columns: Int[Array, "*L _ k"],
    values: Float[Array, "*L O k"],
    layout: Layout = Layout.OI,
) -> Float[Array, "*L _ _"]:
    """Return W + D in the kernel's dtype, where D holds `values` at the columns and zeros elsewhere.

    The sum is taken in the dtype of `values` and rounded once. Where both dtypes agree it is one scatter-add.
    """
    if values.dtype == kernel.dtype and not are_shared(columns, values.shape[-2]):
        check_layout(kernel, columns, layout)
        return kernel.at[entry_indices(columns, layout)].add(values, unique_indices=True, mode="promise_in_bounds")
    base_entries = read_entries(kernel, columns, layout).astype(values.dtype)
    return write_entries(kernel, columns, base_entries + values, layout)
