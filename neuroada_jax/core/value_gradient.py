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
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from neuroada_jax.core import platform
from neuroada_jax.core.entries import are_shared, wide_dtype
from neuroada_jax.errors import NeuroadaWarning

# These are measured (docs/performance.md): x of a block of tokens should stay in a core's L2 cache, the tokens of a piece
# should fill a vector register, and a small dW should be a single chunk.
_LANES = 8  # tokens of a piece
_PIECES = 16  # of a block
_DENSE_CHUNK_BYTES = 32 << 20


class GradientAlgorithm(enum.StrEnum):
    """Ways to compute dvalues; their results agree up to rounding."""

    COLUMN_GATHER = "column_gather"  # for each j: gather one column of x per neuron, multiply, sum over tokens
    TOKEN_BLOCKS = "token_blocks"  # for each block of tokens: gather pieces of x^T, of 8 tokens each; multiply and add
    DENSE_CHUNKS = "dense_chunks"  # for each chunk of neurons: its dense dW, of which k entries per neuron are kept
    CUDA = "cuda"  # a CUDA kernel of this project that gathers tiles of x in shared memory
    PALLAS = "pallas"  # a GPU kernel that gathers rows of x^T; interpreted on a CPU


# Of those that can be used, the first is chosen. CUDA was never run on a GPU, so it stands behind the kernel that was
# measured.
GPU_KERNELS = (GradientAlgorithm.PALLAS, GradientAlgorithm.CUDA)


def choose_algorithm(k: int, inputs: int, backend: str | None = None, *, split: bool | None = None) -> GradientAlgorithm:
    """Return the algorithm that was measured to be fastest for these sizes, on a CPU and an H100 (docs/performance.md).

    On a CPU the column gather wins for k <= 2, token blocks up to about k = I / 6, or I / 12 of more than 1,024 inputs, and
    the dense product above. On a GPU the column gather wins at k = 1, where it fuses with the operation that produces dy,
    and the GPU kernels above. XLA cannot partition the GPU kernels: where it partitions the arrays, the column gather is
    used up to about k = I / 2048 and the dense product above. So it is where neither GPU kernel can be used, with a
    NeuroadaWarning that says why.

    Args:
      k: connections per neuron.
      inputs: I.
      backend: "cpu" or "gpu"; None for the platform that the program is traced for.
      split: whether XLA partitions the arrays over devices, as `jax.jit` does with sharded ones. None: assume so where
        there are several devices and neither `shard_map` nor `pmap` is being traced.
    """
    backend = backend or platform.name()
    if split is None:
        split = jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes
    if backend != "gpu" or k == 1 or split:
        return _without_kernels(k, inputs, backend)
    reasons = []
    for algorithm in GPU_KERNELS:
        reason = _why_not(algorithm, inputs)
        if reason is None:
            return algorithm
        reasons.append(f"{algorithm}: {reason}")
    chosen = _without_kernels(k, inputs, backend)
    _warn(f"no GPU kernel for the gradient of the values ({'; '.join(reasons)}): it falls back to {chosen}")
    return chosen


def _without_kernels(k: int, inputs: int, backend: str) -> GradientAlgorithm:
    """Return the fastest of the algorithms that are made of XLA's operations."""
    if backend != "cpu":
        return GradientAlgorithm.COLUMN_GATHER if k <= max(1, inputs // 2048) else GradientAlgorithm.DENSE_CHUNKS
    if k <= 2:
        return GradientAlgorithm.COLUMN_GATHER
    most = inputs // (6 if inputs <= 1024 else 12)
    return GradientAlgorithm.TOKEN_BLOCKS if k <= most else GradientAlgorithm.DENSE_CHUNKS


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
    dy: Float[Array, "T O"], x: Float[Array, "T I"], columns: Int[Array, "_ k"], algorithm: GradientAlgorithm
) -> Float[Array, "O k"]:
    """Return dvalues[o, j] = sum_t dy[t, o] x[t, columns[o, j]], multiplied and summed in at least float32.

    Args:
      dy: gradient of the output, float (T, O).
      x: input of the layer, float (T, I).
      columns: int32 (O, k), every entry in [0, I), or (1, k) where all neurons share them.
      algorithm: one of `GradientAlgorithm`; shared columns need none, since their gradient is one dense product.

    Returns:
      (O, k) in float32, or float64 where x is float64.
    """
    if are_shared(columns, dy.shape[1]):
        return _shared_columns(dy, x, columns[0])
    return _ALGORITHMS[algorithm](dy, x, columns)


def _column_gather(dy: Array, x: Array, columns: Array) -> Array:
    wide = wide_dtype(x.dtype)

    def one_column(column: Array) -> Array:
        gathered = jnp.take(x, column, axis=1, mode="clip")
        return jnp.sum(dy.astype(wide) * gathered.astype(wide), axis=0)

    # One fused reduction per j. With all k in one gather, XLA transposes dy to float32.
    return lax.map(one_column, columns.T).T


def _token_blocks(dy: Array, x: Array, columns: Array) -> Array:
    wide, tokens = wide_dtype(x.dtype), _PIECES * _LANES

    def add_block(sums: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        dy_pieces, x_pieces = (_in_pieces(each.astype(wide)) for each in block)
        # XLA fuses all of this into one loop over the sums, which it splits over the cores: nothing gathered is stored.
        for dy_piece, x_piece in zip(dy_pieces, x_pieces, strict=True):
            sums = sums + jnp.take(x_piece, columns, axis=0, mode="clip") * dy_piece[:, None, :]
        return sums, None

    zeros, parts = jnp.zeros((*columns.shape, _LANES), wide), (_in_blocks(dy, tokens, 2), _in_blocks(x, tokens, 2))
    sums: Array = lax.scan(add_block, zeros, parts)[0]
    return jnp.sum(sums, axis=-1)


def _in_pieces(block: Array) -> Array:
    """Return the tokens (T, n) of a block as (pieces, n, lanes): in a piece the tokens of one connection are neighbours."""
    # In a loop, since XLA's CPU backend otherwise fuses the transpose into every read of it, and what produces dy into the
    # transpose, element by element. Loops of one step are unrolled, hence two here, and at least two blocks.
    halves = block.reshape(2, _PIECES // 2, _LANES, -1)
    return lax.map(lambda half: jnp.swapaxes(half, 1, 2), halves).reshape(_PIECES, -1, _LANES)


def _shared_columns(dy: Array, x: Array, columns: Array) -> Array:
    """Return dy^T x[:, columns], (O, k), for columns (k,) of all neurons."""
    gathered = jnp.take(x, columns, axis=1, mode="clip")
    dy, tokens_axis = _for_transposed_product(dy)
    return lax.dot_general(dy, gathered, (((tokens_axis,), (0,)), ((), ())), preferred_element_type=wide_dtype(x.dtype))


def _for_transposed_product(dy: Array) -> tuple[Array, int]:
    """Return dy and its axis of tokens, as a product dy^T x can have it.

    XLA's CPU backend has no bfloat16 dot with a float32 result for a transposed operand: the barrier keeps the transpose
    out of the dot.
    """
    if dy.dtype == jnp.bfloat16 and platform.name() == "cpu":
        return lax.optimization_barrier(dy.T), 1
    return dy, 0


def _dense_chunks(dy: Array, x: Array, columns: Array) -> Array:
    outputs, wide = columns.shape[0], wide_dtype(x.dtype)
    dy, tokens_axis = _for_transposed_product(dy)
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
    GradientAlgorithm.TOKEN_BLOCKS: _token_blocks,
    GradientAlgorithm.DENSE_CHUNKS: _dense_chunks,
    GradientAlgorithm.CUDA: _cuda,
    GradientAlgorithm.PALLAS: _pallas,
}


def _block_size(rows: int, row_bytes: int, limit: int) -> int:
    """Return the largest power of two of rows that fits into `limit` bytes, or all rows where they fit."""
    fitting = max(limit // max(row_bytes, 1), 1)
    return rows if fitting >= rows else 1 << (fitting.bit_length() - 1)


def _in_blocks(rows: Array, block: int, least: int) -> Array:
    """Return (R, n) as (blocks, block, n), in at least so many blocks, with zeros in the rest of the last ones."""
    padding = max(least * block - rows.shape[0], -rows.shape[0] % block)
    padded = jnp.pad(rows, ((0, padding), (0, 0))) if padding else rows
    return padded.reshape(-1, block, rows.shape[1])
