"""The bypass op: a frozen linear map plus k trainable connections per neuron, after NeuroAda (arXiv 2510.18940).

Notation (docs/design.md): T tokens, O neurons (rows of the kernel), I input connections, k connections per neuron.

    y[t, o]       = sum_i W[o, i] x[t, i] + sum_j values[o, j] x[t, columns[o, j]]
    dvalues[o, j] = sum_t dy[t, o] x[t, columns[o, j]]
    dx            = dy @ (W + D),    D = values scattered to columns

Plain autodiff through ``W.at[rows, columns].add(values)`` is right but keeps a merged copy of W for the backward pass and
forms the dense dW, which is the price of full fine-tuning at any k. The custom VJP here keeps x, the kernel it was given
and the columns, and computes dvalues alone.
"""

import enum
import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from neuroada_jax.core import platform
from neuroada_jax.core.batching import share_examples

# Both limits are measured, see docs/performance.md: the gathered rows of a block should stay in a core's L2 cache, and a
# chunk of a dense dW is all of it where that is small.
_ROW_BLOCK_BYTES = 3 << 18  # 768 KiB
_ROW_TOKENS = 256  # transposed at a time
_DENSE_CHUNK_BYTES = 32 << 20
_COLUMNS_AT_ONCE = 16  # of the remainder, in one pass of a GPU over y


class Layout(enum.StrEnum):
    """Where a kernel has its neurons. Columns, values and base entries are (*L, O, k) under both."""

    OI = "OI"  # (*L, O, I), a row each: PyTorch, Hugging Face checkpoints, this package's models
    IO = "IO"  # (*L, I, O), a column each: Flax's nn.Dense, and most code that writes x @ kernel


class GradientAlgorithm(enum.StrEnum):
    """How dvalues is computed. All of them give the same numbers up to rounding."""

    COLUMN_GATHER = "column_gather"  # for each j: gather one column of x per neuron, multiply, sum over tokens
    ROW_BLOCKS = "row_blocks"  # for each block of neurons: gather rows of x^T, one batched matvec
    DENSE_CHUNKS = "dense_chunks"  # for each chunk of neurons: its dense dW, of which k entries a row are kept
    PALLAS = "pallas"  # one GPU kernel that gathers rows of x^T, and another for the remainder; interpreted on a CPU


def choose_algorithm(k: int, inputs: int, backend: str | None = None, *, split: bool | None = None) -> GradientAlgorithm:
    """Picks the algorithm from static facts, by what was measured on a CPU and on an H100 (docs/performance.md).

    On a CPU the column gather wins for k <= 2, row blocks up to about k = I / 48 and the dense product above. On a GPU the
    column gather wins at k = 1, since it is fused with what makes dy, and the kernels above. XLA cannot split the kernels
    over devices: where it splits the arrays, it is the column gather up to about k = I / 2048, and the dense product above.

    Args:
      k: connections per neuron.
      inputs: I.
      backend: "cpu" or "gpu"; None for the one that is traced for.
      split: whether XLA splits the arrays over devices, as `jax.jit` does with sharded ones. None: it may, where there are
        several devices and neither `shard_map` nor `pmap` is being traced.
    """
    backend = backend or platform.platform()
    if backend == "cpu":
        if k <= 2:
            return GradientAlgorithm.COLUMN_GATHER
        return GradientAlgorithm.ROW_BLOCKS if k <= inputs // 48 else GradientAlgorithm.DENSE_CHUNKS
    if split is None:
        split = jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes
    if backend == "gpu" and k > 1 and not split and _has_kernels():
        return GradientAlgorithm.PALLAS
    return GradientAlgorithm.COLUMN_GATHER if k <= max(1, inputs // 2048) else GradientAlgorithm.DENSE_CHUNKS


@functools.cache
def _has_kernels() -> bool:
    """Whether this JAX has Pallas for Triton, which it calls deprecated from 0.11 on."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def wide_dtype(dtype: Any) -> Any:
    """What sums over many numbers of `dtype` are taken in: float32, or float64 for float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def value_gradient(
    dy: Float[Array, "T O"], x: Float[Array, "T I"], columns: Int[Array, "O k"], algorithm: GradientAlgorithm
) -> Float[Array, "O k"]:
    """dvalues[o, j] = sum_t dy[t, o] x[t, columns[o, j]], summed in at least float32.

    Args:
      dy: gradient of the output, float (T, O).
      x: input of the layer, float (T, I).
      columns: int32 (O, k), every entry in [0, I).
      algorithm: see GradientAlgorithm.

    Returns: (O, k) in float32, or float64 where x is float64.
    """
    wide = wide_dtype(x.dtype)
    outputs, k = columns.shape

    if algorithm is GradientAlgorithm.PALLAS:
        # Imported where it is chosen: a JAX without Pallas for Triton does without.
        from neuroada_jax.core.pallas_kernels import gathered_rows_gradient

        return gathered_rows_gradient(dy, x, columns, wide)

    if algorithm is GradientAlgorithm.COLUMN_GATHER:

        def one_column(column: Array) -> Array:
            gathered = jnp.take(x, column, axis=1, mode="clip")
            return jnp.sum(dy.astype(wide) * gathered.astype(wide), axis=0)

        # One fused reduction per j. All k in one gather makes XLA transpose dy to float32.
        return lax.map(one_column, columns.T).T

    if algorithm is GradientAlgorithm.ROW_BLOCKS:
        # What a loop reads is in memory first. Outside of one, XLA's CPU backend computes dy again, element by element, in
        # the order of its transpose, which takes longer than all else here.
        parts = max(-(-x.shape[0] // _ROW_TOKENS), 2)
        tokens = -(-x.shape[0] // parts)

        def add_part(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
            return total + _row_blocks(*part, columns, wide), None

        zeros = jnp.zeros((outputs, k), wide)
        return lax.scan(add_part, zeros, (_in_blocks(dy, tokens), _in_blocks(x, tokens)))[0]

    # A loop over slices that XLA sees: no transposed copy of dy, none of its chunks.
    rows, tokens_axis = dy, 0
    if x.dtype == jnp.bfloat16 and platform.platform() == "cpu":
        # XLA's CPU backend has no bfloat16 dot with a float32 result for a transposed operand: the barrier keeps the
        # transpose out of the dot.
        rows, tokens_axis = lax.optimization_barrier(dy.T), 1
    chunk = _block_size(outputs, x.shape[1] * jnp.dtype(wide).itemsize, _DENSE_CHUNK_BYTES)
    chosen = []
    for first in range(0, outputs, chunk):
        last = min(first + chunk, outputs)
        chunk_dy = lax.slice_in_dim(rows, first, last, axis=1 - tokens_axis)
        dense = lax.dot_general(chunk_dy, x, (((tokens_axis,), (0,)), ((), ())), preferred_element_type=wide)
        chosen.append(jnp.take_along_axis(dense, columns[first:last], axis=1, mode="clip"))
    return jnp.concatenate(chosen)


def _row_blocks(dy: Array, x: Array, columns: Array, wide: Any) -> Array:
    """The value gradient of some tokens: rows of x^T gathered for one block of neurons after another."""
    (outputs, k), (tokens, _) = columns.shape, x.shape
    block = _block_size(outputs, k * tokens * x.dtype.itemsize, _ROW_BLOCK_BYTES)
    x_rows = x.T

    def one_block(args: tuple[Array, Array]) -> Array:
        block_columns, block_dy = args
        gathered = jnp.take(x_rows, block_columns.reshape(-1), axis=0, mode="clip").reshape(block, k, tokens)
        return lax.dot_general(gathered, block_dy, (((2,), (1,)), ((0,), (0,))), preferred_element_type=wide)

    return lax.map(one_block, (_in_blocks(columns, block), _in_blocks(dy.T, block))).reshape(-1, k)[:outputs]


def _block_size(rows: int, row_bytes: int, limit: int) -> int:
    """The largest power of two of rows that fits into `limit` bytes, or all of them."""
    fitting = max(limit // max(row_bytes, 1), 1)
    return rows if fitting >= rows else 1 << (fitting.bit_length() - 1)


def _in_blocks(rows: Array, block: int) -> Array:
    """(O, n) as (ceil(O / block), block, n); zeros fill the last block."""
    padding = -rows.shape[0] % block
    padded = jnp.pad(rows, ((0, padding), (0, 0))) if padding else rows
    return padded.reshape(-1, block, rows.shape[1])


def entry_indices(columns: Int[Array, "*L O k"], layout: Layout = Layout.OI) -> tuple[Array, ...]:
    """The index arrays that address a kernel's chosen entries: ``kernel[entry_indices(columns, layout)]`` is (*L, O, k)."""
    *leading, neurons = [
        jnp.arange(size, dtype=columns.dtype).reshape((-1,) + (1,) * (columns.ndim - 1 - axis))
        for axis, size in enumerate(columns.shape[:-1])
    ]
    return (*leading, neurons, columns) if layout is Layout.OI else (*leading, columns, neurons)


def _check_layout(kernel: Array, columns: Array, layout: Layout) -> None:
    # Scatters promise to stay in bounds: a kernel in the other layout must not get as far as that.
    neurons = kernel.shape[-2] if layout is Layout.OI else kernel.shape[-1]
    if (*kernel.shape[:-2], neurons) != columns.shape[:-1]:
        raise ValueError(f"a kernel {kernel.shape} in layout {layout} does not go with columns {columns.shape} (*L, O, k)")


def read_entries(
    kernel: Float[Array, "*L _ _"], columns: Int[Array, "*L O k"], layout: Layout = Layout.OI
) -> Float[Array, "*L O k"]:
    """The kernel's entries at the chosen connections, in the kernel's dtype.

    Raises:
      ValueError: kernel and columns do not belong together in this layout; so do the functions below.
    """
    _check_layout(kernel, columns, layout)
    if layout is Layout.OI:
        return jnp.take_along_axis(kernel, columns, axis=-1, mode="clip")
    entries = jnp.take_along_axis(kernel, columns.swapaxes(-1, -2), axis=-2, mode="clip")
    return entries.swapaxes(-1, -2)


def write_entries(
    kernel: Float[Array, "*L _ _"],
    columns: Int[Array, "*L O k"],
    entries: Float[Array, "*L O k"],
    layout: Layout = Layout.OI,
) -> Float[Array, "*L _ _"]:
    """The kernel with its chosen entries replaced (cast to the kernel's dtype); in place where the kernel is donated."""
    _check_layout(kernel, columns, layout)
    return kernel.at[entry_indices(columns, layout)].set(
        entries.astype(kernel.dtype), unique_indices=True, mode="promise_in_bounds"
    )


def add_entries(
    kernel: Float[Array, "*L _ _"],
    columns: Int[Array, "*L O k"],
    values: Float[Array, "*L O k"],
    layout: Layout = Layout.OI,
) -> Float[Array, "*L _ _"]:
    """W + D in the kernel's dtype. The sum is taken in the dtype of `values` and rounded once.

    Where both dtypes agree this is one `lax` scatter-add.
    """
    if values.dtype == kernel.dtype:
        _check_layout(kernel, columns, layout)
        return kernel.at[entry_indices(columns, layout)].add(values, unique_indices=True, mode="promise_in_bounds")
    base_entries = read_entries(kernel, columns, layout).astype(values.dtype)
    return write_entries(kernel, columns, base_entries + values, layout)


def rounding_remainder(base_entries: Float[Array, "*L O k"], values: Float[Array, "*L O k"]) -> Float[Array, "*L O k"]:
    """What is lost when base + values is rounded to the dtype of `base_entries`; (O, k) in the dtype of `values`."""
    exact = base_entries.astype(values.dtype) + values
    return exact - exact.astype(base_entries.dtype).astype(values.dtype)


def _matmul(x: Array, kernel: Array, layout: Layout, wide: Any = None) -> Array:
    # A plain dot in the dtype of x. Differentiating through preferred_element_type and a cast would make the transposed
    # matmuls float32; XLA accumulates bfloat16 dots in float32 anyway.
    inputs = 1 if layout is Layout.OI else 0
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (inputs,)), ((), ())), preferred_element_type=wide)


def _forward(
    x: Array,
    kernel: Array,
    columns: Array,
    values: Array,
    base_entries: Array,
    algorithm: GradientAlgorithm,
    layout: Layout,
) -> Array:
    """y for a kernel that holds round(base + values) at the chosen entries."""
    if values.dtype == kernel.dtype:
        return _matmul(x, kernel, layout)
    remainder = rounding_remainder(base_entries, values)
    wide = values.dtype
    y = _matmul(x, kernel, layout, wide)
    if algorithm is GradientAlgorithm.PALLAS and columns.shape[1] > 1:  # a single pass is as fast without
        from neuroada_jax.core.pallas_kernels import with_remainder

        flat_y, flat_x = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        return with_remainder(flat_y, flat_x, columns, remainder).reshape(y.shape)

    def add_column(y: Array, column: tuple[Array, Array]) -> tuple[Array, None]:
        indices, remainders = column
        gathered = jnp.take(x, indices, axis=-1, mode="clip").astype(wide)
        return y + gathered * jnp.broadcast_to(remainders, gathered.shape), None

    # A GPU adds a few columns in one pass over y; a CPU takes longer so.
    unroll = 1 if platform.platform() == "cpu" else _COLUMNS_AT_ONCE
    return lax.scan(add_column, y, (columns.T, remainder.T), unroll=unroll)[0].astype(x.dtype)


def _backward(
    dy: Array, x: Array, kernel: Array, columns: Array, values_dtype: Any, algorithm: GradientAlgorithm, layout: Layout
) -> tuple[Array, Array]:
    """dx and dvalues; the kernel holds W + D."""
    neurons = 0 if layout is Layout.OI else 1
    dx = lax.dot_general(dy, kernel, (((dy.ndim - 1,), (neurons,)), ((), ())))
    flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    return dx, value_gradient(flat_dy, flat_x, columns, algorithm).astype(values_dtype)


# Both forms take x of any rank and keep it as it came: maps that read the same x then keep one array between them.
@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _resident(
    x: Array,
    kernel: Array,
    columns: Array,
    values: Array,
    base_entries: Array,
    algorithm: GradientAlgorithm,
    layout: Layout,
) -> Array:
    return _forward(x, kernel, columns, values, base_entries, algorithm, layout)


def _resident_fwd(x, kernel, columns, values, base_entries, algorithm, layout):
    # Only the dtype of values is needed in the backward pass: an empty array carries it.
    return _forward(x, kernel, columns, values, base_entries, algorithm, layout), (x, kernel, columns, values[:0])


def _resident_bwd(algorithm, layout, residuals, dy):
    x, kernel, columns, values = residuals
    dx, dvalues = _backward(dy, x, kernel, columns, values.dtype, algorithm, layout)
    return dx, None, None, dvalues, None


_resident.defvjp(_resident_fwd, _resident_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _on_the_fly(
    x: Array, kernel: Array, columns: Array, values: Array, algorithm: GradientAlgorithm, layout: Layout
) -> Array:
    merged, base_entries = add_entries(kernel, columns, values, layout), read_entries(kernel, columns, layout)
    return _forward(x, merged, columns, values, base_entries, algorithm, layout)


def _on_the_fly_fwd(x, kernel, columns, values, algorithm, layout):
    return _on_the_fly(x, kernel, columns, values, algorithm, layout), (x, kernel, columns, values)


def _on_the_fly_bwd(algorithm, layout, residuals, dy):
    x, kernel, columns, values = residuals
    # The merged kernel is formed again: keeping it would store a copy of every target weight until here.
    merged = add_entries(kernel, columns, values, layout)
    dx, dvalues = _backward(dy, x, merged, columns, values.dtype, algorithm, layout)
    return dx, None, None, dvalues


_on_the_fly.defvjp(_on_the_fly_fwd, _on_the_fly_bwd)
_on_the_fly_shared = share_examples("bypass_dense", _on_the_fly)


def bypass_dense(
    x: Float[Array, "*B I"],
    kernel: Float[Array, "_ _"],
    columns: Int[Array, "O k"],
    values: Float[Array, "O k"],
    base_entries: Float[Array, "O k"] | None = None,
    *,
    algorithm: GradientAlgorithm | None = None,
    layout: Layout = Layout.OI,
) -> Float[Array, "*B O"]:
    """y = x @ (W + D)^T with a gradient for x and `values` only; the kernel is frozen and its cotangent is zero.

    Without `base_entries` the kernel holds W and the values are added on the fly, in the forward and again in the
    backward pass: stateless, so it can be vmapped over adapters; a vmap over x alone is one call for all examples. With
    `base_entries` (the entries of W at `columns`) the kernel is *resident*: it already holds round(W + D), as
    `write_entries(kernel, columns, base_entries + values)` leaves it, forward and dx are plain matmuls, and `values` is the
    tap of its gradient.

    Where `values` is wider than the kernel (float32 values over a bfloat16 base), the part of the sum that the kernel's
    dtype cannot hold is added to the activations; dx leaves it out, being below half a unit in the last place of W.

    Args:
      x: float (..., I), in the kernel's dtype.
      kernel: float (O, I), or (I, O) as `layout` says.
      columns: int32 (O, k), distinct within a row, in [0, I).
      values: float (O, k).
      base_entries: float (O, k) in the kernel's dtype, or None.
      algorithm: how dvalues is computed; None lets `choose_algorithm` decide.
      layout: where the kernel has its neurons.

    Returns: (..., O) in the dtype of x.

    Raises:
      ValueError: kernel and columns do not belong together in this layout.
    """
    _check_layout(kernel, columns, layout)
    algorithm = algorithm or choose_algorithm(columns.shape[1], x.shape[-1])
    if base_entries is None:
        return _on_the_fly_shared(x, kernel, columns, values, algorithm=algorithm, layout=layout)
    return _resident(x, kernel, columns, values, base_entries, algorithm, layout)
