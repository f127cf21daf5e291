"""Products of tokens with the kernels of the experts that they are routed to, and the bypass of these kernels.

Rows are laid out in blocks, each of rows of one expert and filled up with zeros, so that the products of a block read one
kernel. The blocks are walked one after the other: no product is formed that no token asked for, but for the filling, and no
copy of kernels is kept. The number of blocks is static, whatever the routing.

Letters: R rows (tokens times the experts of a token), E experts, N blocks of b rows, O outputs, I inputs, k connections.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from neuroada_jax.core.entries import add_entries, wide_dtype

_LARGEST_BLOCK = 256


class Blocks(NamedTuple):
    """A layout of rows in blocks.

    Attributes:
      slots: the slot of each row among the N * b, int32 (R,).
      experts: the expert of each block, int32 (N,).
      size: b.
    """

    slots: Int[Array, "R"]
    experts: Int[Array, "N"]
    size: int


def blocks_of(chosen: Int[Array, "R"], count: int) -> Blocks:
    """Return a layout of rows in blocks, by the expert of each.

    Half as many rows in a block as an expert has on average waste at most half of the products.

    Args:
      chosen: the expert of each row, int32 below `count`.
      count: the number of experts, E.
    """
    rows = chosen.shape[0]
    size = min(1 << max((rows // (2 * count)).bit_length() - 1, 0), _LARGEST_BLOCK)
    order = jnp.argsort(chosen, stable=True)
    if size == 1:
        slots = jnp.zeros(rows, jnp.int32).at[order].set(jnp.arange(rows, dtype=jnp.int32), unique_indices=True)
        return Blocks(slots, chosen[order], 1)
    counts = jnp.zeros(count, jnp.int32).at[chosen].add(1)
    ends = jnp.cumsum(-(-counts // size), dtype=jnp.int32)  # in blocks
    starts = (ends - -(-counts // size)) * size
    own = jnp.arange(rows, dtype=jnp.int32) - (jnp.cumsum(counts, dtype=jnp.int32) - counts)[chosen[order]]
    slots = jnp.zeros(rows, jnp.int32).at[order].set(starts[chosen[order]] + own, unique_indices=True)
    number = jnp.arange(rows // size + min(count, rows), dtype=jnp.int32)
    experts = jnp.minimum(jnp.searchsorted(ends, number, side="right"), count - 1).astype(jnp.int32)
    return Blocks(slots, experts, size)


def into_blocks(x: Float[Array, "R I"], blocks: Blocks) -> Float[Array, "N b I"]:
    """Return rows in their slots, zeros in the others."""
    shape = (blocks.experts.shape[0] * blocks.size, x.shape[1])
    filled = jnp.zeros(shape, x.dtype).at[blocks.slots].set(x, unique_indices=True, mode="promise_in_bounds")
    return filled.reshape(-1, blocks.size, x.shape[1])


def out_of_blocks(y: Float[Array, "N b O"], blocks: Blocks) -> Float[Array, "R O"]:
    """Return the rows of blocks in the order that `blocks_of` was given."""
    return y.reshape(-1, y.shape[2]).at[blocks.slots].get(unique_indices=True, mode="promise_in_bounds")


def plain(x: Float[Array, "N b I"], kernel: Float[Array, "E O I"], experts: Int[Array, "N"]) -> Float[Array, "N b O"]:
    """Return the product of each block with the kernel of its expert, y = x W^T."""
    return _walk(lambda x, own: lax.dot_general(x, own, (((1,), (1,)), ((), ()))), (x,), kernel, experts)


def _walk(product: Callable[..., Array], rows: tuple[Array, ...], kernel: Array, experts: Array) -> Array:
    """Apply product(rows of a block, kernel of its expert) to each block."""

    @functools.partial(jax.checkpoint, prevent_cse=False)  # otherwise the kernel of each block would be kept
    def step(kernel: Array, block: tuple[Array, ...]) -> Array:
        *own, expert = block
        return product(*own, lax.dynamic_index_in_dim(kernel, expert, keepdims=False))

    return lax.map(lambda block: step(kernel, block), (*rows, experts))


def bypass_experts(
    x: Float[Array, "N b I"],
    kernel: Float[Array, "E O I"],
    experts: Int[Array, "N"],
    columns: Int[Array, "E _ k"],
    values: Float[Array, "E O k"],
    *,
    resident: bool,
) -> Float[Array, "N b O"]:
    """Return y = x (W + D)^T, differentiable in x and `values` alone; forms and rounding as in `ops.bypass_dense`."""
    return _bypassed(x, kernel, experts, columns, values, resident)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _bypassed(x: Array, kernel: Array, experts: Array, columns: Array, values: Array, resident: bool) -> Array:
    return plain(x, kernel if resident else add_entries(kernel, columns, values), experts)


def _bypassed_fwd(x: Array, kernel: Array, experts: Array, columns: Array, values: Array, resident: bool) -> Any:
    return _bypassed(x, kernel, experts, columns, values, resident), (x, kernel, experts, columns, values)


def _bypassed_bwd(resident: bool, residuals: Any, dy: Array) -> Any:
    x, kernel, experts, columns, values = residuals
    merged = kernel if resident else add_entries(kernel, columns, values)
    dx = _walk(lambda dy, own: lax.dot_general(dy, own, (((1,), (0,)), ((), ()))), (dy,), merged, experts)
    wide = wide_dtype(values.dtype)

    def add(total: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        x, dy, expert = block
        own = lax.dynamic_index_in_dim(columns, expert, keepdims=False)
        inputs = jnp.take(x.T, own, axis=0, mode="clip").astype(wide)  # (O, k, b)
        found = jnp.sum(inputs * dy.T[:, None, :].astype(wide), axis=2)
        return total.at[expert].add(found), None

    dvalues, _ = lax.scan(add, jnp.zeros(values.shape, wide), (x, dy, experts))
    return dx, None, None, None, dvalues.astype(values.dtype)


_bypassed.defvjp(_bypassed_fwd, _bypassed_bwd)
