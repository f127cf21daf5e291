"""A GPU kernel in Pallas for Triton: the gradient of the values.

Letters: T tokens, O neurons, I input connections, k connections per neuron.

    dvalues[o, j] = sum_t dy[t, o] x[t, columns[o, j]]

Its cost is the gather, not the arithmetic. Gathering one element from a row of x loads a memory sector of 32 bytes, 16
times the element's own size in bfloat16. So XLA first transposes x, once for all linear maps that read it. A connection is
then a row of x^T, and consecutive tokens load as vectors of 16 bytes. Bytes moved, at b bytes per element:

    x^T             2 b T I                read and written; shared by the linear maps that read the same x
    gathers         b T O k                from the L2 cache: all programs go through the tokens in the same order, so that
                                           a few MB of x^T are in use at a time
    dy              b T O ceil(k / 4)      once for every four connections; mostly from the cache after the first time
    partial sums    8 S O k                for S <= T / 64 ranges of tokens, written and summed in float32

A 4096 x 4096 map of LLaMA with 8,192 tokens in bfloat16 at k = 20: 134 MB, 1.3 GB, 336 MB and 1.3 MB. Gathering from the
rows of x would move up to 21 GB through the cache. The cost is x^T, a temporary of the size of x. On an H100 an
11008 x 4096 map takes 0.19 ms at k = 1 and 0.91 ms at k = 20 (8,192 tokens, bfloat16); the dense product takes 1.07 ms.

Tensor cores do not help: for 16 neurons they would form 16 x 16 products, of which only the diagonal is needed.
"""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

# JAX 0.11 and later warn whenever such a kernel is lowered; that is for this project, not for its users.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)

# Compiled for sm_90a in bfloat16 with four connections, a thread takes 126 of its 255 registers and spills none: four
# programs fit on a multiprocessor, with 80 KB of loads in flight.
NEURONS, TOKENS = 32, 64  # tile of one program
CONNECTIONS = 4  # the most connections that share a tile of dy, each with a tile of sums in registers
WARPS = 4
PROGRAMS = 1024  # about two waves on the 132 multiprocessors of an H100; with fewer neurons, tokens are split further


def _gradient_kernel(dy_ref, x_rows_ref, columns_ref, sums_ref, *, connections: int, tiles: int):
    """Run one program: NEURONS neurons, `connections` of their connections, `tiles` tiles of tokens."""
    (tokens, outputs), (_, _, k) = dy_ref.shape, sums_ref.shape
    wide = sums_ref.dtype
    groups = pl.cdiv(k, connections)
    block, part = pl.program_id(0), pl.program_id(1)
    neurons = (block // groups) * NEURONS + jnp.arange(NEURONS, dtype=jnp.int32)
    chosen = [(block % groups) * connections + i for i in range(connections)]
    stored = [(neurons < outputs) & (j < k) for j in chosen]
    columns = [triton.load(columns_ref.at[neurons, j], mask=mask, other=0) for j, mask in zip(chosen, stored, strict=True)]

    def add_tile(tile: Array, sums: list[Array]) -> list[Array]:
        index = (part * tiles + lax.convert_element_type(tile, jnp.int32)) * TOKENS + jnp.arange(TOKENS, dtype=jnp.int32)
        in_range = index < tokens
        dy = triton.load(
            dy_ref.at[index[:, None], neurons[None, :]],
            mask=in_range[:, None] & (neurons < outputs)[None, :],
            other=0,
        )
        dy = dy.astype(wide).T
        rows = [
            triton.load(x_rows_ref.at[row[:, None], index[None, :]], mask=in_range[None, :], other=0) for row in columns
        ]
        return [total + dy * row.astype(wide) for total, row in zip(sums, rows, strict=True)]

    sums = lax.fori_loop(0, tiles, add_tile, [jnp.zeros((NEURONS, TOKENS), wide) for _ in chosen])
    for j, total, mask in zip(chosen, sums, stored, strict=True):
        triton.store(sums_ref.at[part, neurons, j], jnp.sum(total, axis=1), mask=mask)


def gathered_rows_gradient(
    dy: Float[Array, "T O"], x: Float[Array, "T I"], columns: Int[Array, "O k"], wide: Any
) -> Float[Array, "O k"]:
    """Return dvalues[o, j] = sum_t dy[t, o] x[t, columns[o, j]] for any T, O, k >= 1.

    It runs on CUDA and ROCm GPUs. On a CPU the same GPU kernel is interpreted, which is slow and meant for tests. Lowering
    for another platform raises NotImplementedError.

    Args:
      dy: gradient of the output, float (T, O).
      x: input of the layer, float (T, I).
      columns: int32 (O, k), every entry in [0, I): nothing checks the bounds of the loads.
      wide: dtype in which products are formed and summed.

    Returns:
      (O, k) in `wide`.
    """
    tokens, outputs = dy.shape
    k = columns.shape[1]
    connections = pl.cdiv(k, pl.cdiv(k, CONNECTIONS))  # k = 5 as 3 + 2 rather than 4 + 1
    blocks = pl.cdiv(outputs, NEURONS) * pl.cdiv(k, connections)
    all_tiles = pl.cdiv(tokens, TOKENS)
    tiles = pl.cdiv(all_tiles, min(all_tiles, pl.cdiv(PROGRAMS, blocks)))
    parts = pl.cdiv(all_tiles, tiles)

    sums = _call(
        functools.partial(_gradient_kernel, connections=connections, tiles=tiles),
        # dy derives from x and the columns, and so varies over every mesh axis over which they vary.
        jax.ShapeDtypeStruct((parts, outputs, k), wide, manual_axis_type=jax.typeof(dy).manual_axis_type),
        (blocks, parts),
        "value_gradient",
        *(dy, x.T, columns),
    )
    return jnp.sum(sums, axis=0)


def _call(kernel: Any, out_shape: jax.ShapeDtypeStruct, grid: tuple[int, int], name: str, *operands: Array) -> Array:
    """Call a GPU kernel, or interpret it where the lowering is for a CPU.

    The lowering platform decides, not the default backend, so that a host without a GPU can compile for one.

    Raises:
      ValueError: an operand has 2^31 entries or more, beyond the GPU kernels' 32-bit offsets.
    """
    largest = max(operands, key=lambda operand: operand.size)
    if largest.size >= 1 << 31:
        raise ValueError(
            f"GPU kernel {name!r}: an array {largest.shape} has {largest.size} entries, expected fewer than 2^31; use "
            "fewer tokens per call or another GradientAlgorithm"
        )

    def on_platform(interpret: bool) -> Any:
        parameters = triton.CompilerParams(num_warps=WARPS)
        return pl.pallas_call(
            kernel, out_shape=out_shape, grid=grid, compiler_params=parameters, interpret=interpret, name=name
        )

    gpu = on_platform(interpret=False)
    return lax.platform_dependent(*operands, cpu=on_platform(interpret=True), cuda=gpu, rocm=gpu)
