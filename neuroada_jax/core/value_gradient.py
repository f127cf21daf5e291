"""Algorithms for the gradient of the bypass values, and the choice between them.

Letters: T tokens, O neurons, I input connections, k connections per neuron.

    dvalues[o, j] = sum_t dy[t, o] x[t, columns[o, j]]

This takes 2 T O k FLOP, against 2 T O I for the dense dW = dy^T x, of which dvalues is k of every I entries. Its cost is
the gather of T O k scattered elements of x. The algorithms differ in how they gather them; one avoids the gather and forms
the dense product in chunks.
"""

import enum
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from neuroada_jax.core import platform
from neuroada_jax.core.entries import wide_dtype
from neuroada_jax.errors import NeuroadaWarning

# Both limits are measured (docs/performance.md): the gathered rows of a block should stay in a core's L2 cache, and a small
# dW should be a single chunk.
_ROW_BLOCK_BYTES = 3 << 18  # 768 KiB
_ROW_TOKENS = 256  # transposed at a time
_DENSE_CHUNK_BYTES = 32 << 20
_MOST_CORES = 8  # that the choice on a CPU counts; more were not measured


class GradientAlgorithm(enum.StrEnum):
    """Ways to compute dvalues; their results agree up to rounding."""

    COLUMN_GATHER = "column_gather"  # for each j: gather one column of x per neuron, multiply, sum over tokens
    ROW_BLOCKS = "row_blocks"  # for each block of neurons: gather rows of x^T, one batched matrix-vector product
    DENSE_CHUNKS = "dense_chunks"  # for each chunk of neurons: its dense dW, of which k entries per neuron are kept
    CUDA = "cuda"  # a CUDA kernel of this project that gathers tiles of x in shared memory
    PALLAS = "pallas"  # a GPU kernel that gathers rows of x^T; interpreted on a CPU


# Of those that can be used, the first is chosen. CUDA was never run on a GPU, so it stands behind the kernel that was
# measured.
GPU_KERNELS = (GradientAlgorithm.PALLAS, GradientAlgorithm.CUDA)


def choose_algorithm(
    k: int, inputs: int, backend: str | None = None, *, split: bool | None = None, cores: int | None = None
) -> GradientAlgorithm:
    """Return the algorithm that was measured to be fastest for these sizes, on a CPU and an H100 (docs/performance.md).

    On a CPU the column gather wins for k <= 2, row blocks up to about k = I / 24 on one core and I / 48 on two, and the
    dense product above: it uses all cores, the loop over row blocks only one. On a GPU the column gather wins at k = 1,
    where it fuses with the operation that produces dy, and the GPU kernels above. XLA cannot partition the GPU kernels:
    where it partitions the arrays, the column gather is used up to about k = I / 2048 and the dense product above. So it is
    where neither GPU kernel can be used, with a NeuroadaWarning that says why.

    Args:
      k: connections per neuron.
      inputs: I.
      backend: "cpu" or "gpu"; None for the platform that the program is traced for.
      split: whether XLA partitions the arrays over devices, as `jax.jit` does with sharded ones. None: assume so where
        there are several devices and neither `shard_map` nor `pmap` is being traced.
      cores: of the CPU; None for those that this process may use.
    """
    backend = backend or platform.name()
    if split is None:
        split = jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes
    if backend != "gpu" or k == 1 or split:
        return _without_kernels(k, inputs, backend, cores)
    reasons = []
    for algorithm in GPU_KERNELS:
        reason = _why_not(algorithm, inputs)
        if reason is None:
            return algorithm
        reasons.append(f"{algorithm}: {reason}")
    chosen = _without_kernels(k, inputs, backend)
    _warn(f"no GPU kernel for the gradient of the values ({'; '.join(reasons)}): it falls back to {chosen}")
    return chosen


def _without_kernels(k: int, inputs: int, backend: str, cores: int | None = None) -> GradientAlgorithm:
    """Return the fastest of the algorithms that are made of XLA's operations."""
    if backend != "cpu":
        return GradientAlgorithm.COLUMN_GATHER if k <= max(1, inputs // 2048) else GradientAlgorithm.DENSE_CHUNKS
    if k <= 2:
        return GradientAlgorithm.COLUMN_GATHER
    most = inputs // (24 * min(cores or _cores(), _MOST_CORES))
    return GradientAlgorithm.ROW_BLOCKS if k <= most else GradientAlgorithm.DENSE_CHUNKS


def _cores() -> int:
    """Return how many cores XLA's CPU backend computes on: those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _why_not(kernel: GradientAlgorithm, inputs: int) -> str | None:
    """Return why a GPU kernel cannot be used for the device that is traced for, or None where it can."""
    if kernel is GradientAlgorithm.CUDA:
        from neuroada_jax.core import cuda_kernels

        return cuda_kernels.why_not(inputs)
    return None if _has_pallas() else "this JAX has no Pallas for Triton"


@functools.cache
def _has_pallas() -> bool:
    """Return whether this JAX has Pallas for Triton, which is deprecated from JAX 0.11 on."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


@functools.cache
def _warn(message: str) -> None:
    """Issue a NeuroadaWarning, once: every map of every layer asks."""
    warnings.warn(message, NeuroadaWarning, stacklevel=3)


def value_gradient(
    dy: Float[Array, "T O"], x: Float[Array, "T I"], columns: Int[Array, "O k"], algorithm: GradientAlgorithm
) -> Float[Array, "O k"]:
    """Return dvalues[o, j] = sum_t dy[t, o] x[t, columns[o, j]], multiplied and summed in at least float32.

    Args:
      dy: gradient of the output, float (T, O).
      x: input of the layer, float (T, I).
      columns: int32 (O, k), every entry in [0, I).
      algorithm: one of `GradientAlgorithm`.

    Returns:
      (O, k) in float32, or float64 where x is float64.
    """
    return _ALGORITHMS[algorithm](dy, x, columns)


def _column_gather(dy: Array, x: Array, columns: Array) -> Array:
    wide = wide_dtype(x.dtype)

    def one_column(column: Array) -> Array:
        gathered = jnp.take(x, column, axis=1, mode="clip")
        return jnp.sum(dy.astype(wide) * gathered.astype(wide), axis=0)

    # One fused reduction per j. With all k in one gather, XLA transposes dy to float32.
    return lax.map(one_column, columns.T).T


def _row_blocks(dy: Array, x: Array, columns: Array) -> Array:
    # The scan makes XLA materialise dy. Without a loop its CPU backend recomputes dy, element by element and in the order
    # of its transpose, which takes longer than everything else here; hence at least two parts.
    parts = max(-(-x.shape[0] // _ROW_TOKENS), 2)
    tokens = -(-x.shape[0] // parts)

    def add_part(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _row_blocks_of_part(*part, columns), None

    zeros = jnp.zeros(columns.shape, wide_dtype(x.dtype))
    return lax.scan(add_part, zeros, (_in_blocks(dy, tokens), _in_blocks(x, tokens)))[0]


def _row_blocks_of_part(dy: Array, x: Array, columns: Array) -> Array:
    """Return dvalues of some tokens: for one block of neurons after another, k rows of x^T times the neuron's dy."""
    (outputs, k), (tokens, _) = columns.shape, x.shape
    block = _block_size(outputs, k * tokens * x.dtype.itemsize, _ROW_BLOCK_BYTES)
    x_rows = x.T

    def one_block(args: tuple[Array, Array]) -> Array:
        block_columns, block_dy = args
        gathered = jnp.take(x_rows, block_columns.reshape(-1), axis=0, mode="clip").reshape(block, k, tokens)
        dimensions = (((2,), (1,)), ((0,), (0,)))
        return lax.dot_general(gathered, block_dy, dimensions, preferred_element_type=wide_dtype(x.dtype))

    return lax.map(one_block, (_in_blocks(columns, block), _in_blocks(dy.T, block))).reshape(-1, k)[:outputs]


def _dense_chunks(dy: Array, x: Array, columns: Array) -> Array:
    outputs, wide = columns.shape[0], wide_dtype(x.dtype)
    tokens_axis = 0
    if x.dtype == jnp.bfloat16 and platform.name() == "cpu":
        # XLA's CPU backend has no bfloat16 dot with a float32 result for a transposed operand: the barrier keeps the
        # transpose out of the dot.
        dy, tokens_axis = lax.optimization_barrier(dy.T), 1
    chunk = _block_size(outputs, x.shape[1] * jnp.dtype(wide).itemsize, _DENSE_CHUNK_BYTES)
    chosen = []
    # Unrolled over static slices, so that XLA makes no transposed copy of dy and no copies of its chunks.
    for first in range(0, outputs, chunk):
        last = min(first + chunk, outputs)
        chunk_dy = lax.slice_in_dim(dy, first, last, axis=1 - tokens_axis)
        dense = lax.dot_general(chunk_dy, x, (((tokens_axis,), (0,)), ((), ())), preferred_element_type=wide)
        chosen.append(jnp.take_along_axis(dense, columns[first:last], axis=1, mode="clip"))
    return jnp.concatenate(chosen)


def _cuda(dy: Array, x: Array, columns: Array) -> Array:
    (_, k), inputs = columns.shape, x.shape[1]
    from neuroada_jax.core import cuda_kernels

    reason, card = cuda_kernels.why_not(inputs, x.dtype), cuda_kernels.card_of(platform.device())
    if reason is not None or card is None:
        usable = platform.name() == "gpu" and _has_pallas() and k > 1
        other = GradientAlgorithm.PALLAS if usable else _without_kernels(k, inputs, platform.name())
        _warn(f"the CUDA kernel for the gradient of the values cannot be used ({reason}): it falls back to {other}")
        return value_gradient(dy, x, columns, other)
    # A new function for each trace: JAX keeps traces by function, and the card is part of this one.
    on_card = functools.partial(cuda_kernels.cuda_gradient, card=card)
    elsewhere = functools.partial(value_gradient, algorithm=_without_kernels(k, inputs, "cpu"))
    return lax.platform_dependent(dy, x, columns, cuda=on_card, default=elsewhere)


def _pallas(dy: Array, x: Array, columns: Array) -> Array:
    # Imported here, so that the other algorithms work in a JAX without Pallas for Triton.
    from neuroada_jax.core.pallas_kernels import gathered_rows_gradient

    return gathered_rows_gradient(dy, x, columns, wide_dtype(x.dtype))


_ALGORITHMS: dict[GradientAlgorithm, Callable[[Array, Array, Array], Array]] = {
    GradientAlgorithm.COLUMN_GATHER: _column_gather,
    GradientAlgorithm.ROW_BLOCKS: _row_blocks,
    GradientAlgorithm.DENSE_CHUNKS: _dense_chunks,
    GradientAlgorithm.CUDA: _cuda,
    GradientAlgorithm.PALLAS: _pallas,
}


def _block_size(rows: int, row_bytes: int, limit: int) -> int:
    """Return the largest power of two of rows that fits into `limit` bytes, or all rows where they fit."""
    fitting = max(limit // max(row_bytes, 1), 1)
    return rows if fitting >= rows else 1 << (fitting.bit_length() - 1)


def _in_blocks(rows: Array, block: int) -> Array:
    """Return (R, n) as (ceil(R / block), block, n), with zeros in the rest of the last block."""
    padding = -rows.shape[0] % block
    padded = jnp.pad(rows, ((0, padding), (0, 0))) if padding else rows
    return padded.reshape(-1, block, rows.shape[1])
