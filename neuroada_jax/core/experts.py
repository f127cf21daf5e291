"""Products of tokens with the kernels of the experts that they are routed to, and the bypass of these kernels.

Rows are laid out in blocks, each of rows of one expert and filled up with zeros, so that the products of a block read one
kernel. The blocks are walked one after the other: no product is formed that no token asked for, but for the filling. One
kernel at a time is dequantised and gets its values, and no copy is kept: nothing of the size of all experts is made. The
number of blocks is static, whatever the routing.

Letters: R rows (tokens times the experts of a token), E experts, N blocks of b rows, O outputs, I inputs, k connections.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from neuroada_jax.core import ops, quantised
from neuroada_jax.core.entries import add_entries, wide_dtype
from neuroada_jax.core.quantised import QuantisedKernel

_LARGEST_BLOCK = 256


class Blocks(NamedTuple):
    """A layout of rows in blocks.

    Attributes:
      slots: the slot of each row among the N * b, int32 (R,).
      rows: the row of each slot, R where it has none, int32 (N * b,).
      experts: the expert of each block, int32 (N,).
    """

    slots: Int[Array, "R"]
    rows: Int[Array, "S"]
    experts: Int[Array, "N"]

    @property
    def size(self) -> int:
        """The rows of a block, b."""
        return self.rows.shape[0] // self.experts.shape[0]


def blocks_of(chosen: Int[Array, "R"], count: int, *, dequantised: bool = False) -> Blocks:
    """Return a layout of rows in blocks, by the expert of each.

    Half as many rows in a block as an expert has on average add at most half to the products. Where every block dequantises
    a kernel, which takes longer than its products, there are twice as many in a block, which may double the products.

    Args:
      chosen: the expert of each row, int32 below `count`.
      count: the number of experts, E.
      dequantised: whether the kernels are quantised.
    """
    rows = chosen.shape[0]
    fitting = rows // (count if dequantised else 2 * count)
    size = min(1 << max(fitting.bit_length() - 1, 0), _LARGEST_BLOCK)
    order = jnp.argsort(chosen, stable=True)
    if size == 1:
        slots = jnp.zeros(rows, jnp.int32).at[order].set(jnp.arange(rows, dtype=jnp.int32), unique_indices=True)
        return Blocks(slots, order.astype(jnp.int32), chosen[order])
    counts = jnp.zeros(count, jnp.int32).at[chosen].add(1)
    ends = jnp.cumsum(-(-counts // size), dtype=jnp.int32)  # in blocks
    starts = (ends - -(-counts // size)) * size
    own = jnp.arange(rows, dtype=jnp.int32) - (jnp.cumsum(counts, dtype=jnp.int32) - counts)[chosen[order]]
    slots = jnp.zeros(rows, jnp.int32).at[order].set(starts[chosen[order]] + own, unique_indices=True)
    number = jnp.arange(rows // size + min(count, rows), dtype=jnp.int32)
    experts = jnp.minimum(jnp.searchsorted(ends, number, side="right"), count - 1).astype(jnp.int32)
    own_rows = jnp.full(number.shape[0] * size, rows, jnp.int32)
    own_rows = own_rows.at[slots].set(jnp.arange(rows, dtype=jnp.int32), unique_indices=True)
    return Blocks(slots, own_rows, experts)


# Each of the two is the other's transpose, and a gather: scatters would begin with zeros, which XLA makes for all layers of
# a model at once where these lie apart.


@jax.custom_vjp
def into_blocks(x: Float[Array, "R I"], blocks: Blocks) -> Float[Array, "N b I"]:
    """Return rows in their slots, zeros in the others."""
    filled = x.at[blocks.rows].get(mode="fill", fill_value=0)
    return filled.reshape(-1, blocks.size, x.shape[1])


@jax.custom_vjp
def out_of_blocks(y: Float[Array, "N b O"], blocks: Blocks) -> Float[Array, "R O"]:
    """Return the rows of blocks in the order that `blocks_of` was given."""
    return y.reshape(-1, y.shape[2]).at[blocks.slots].get(unique_indices=True, mode="promise_in_bounds")


into_blocks.defvjp(lambda x, at: (into_blocks(x, at), at), lambda at, dy: (out_of_blocks(dy, at), None))
out_of_blocks.defvjp(lambda y, at: (out_of_blocks(y, at), at), lambda at, dy: (into_blocks(dy, at), None))


def plain(
    x: Float[Array, "N b I"], kernel: Float[Array, "E O I"] | QuantisedKernel, experts: Int[Array, "N"]
) -> Float[Array, "N b O"]:
    """Return the product of each block with the kernel of its expert, y = x W^T."""
    return _walk(_product, x, (kernel,), experts)


def _walk(product: Callable[..., Array], rows: Array, of_experts: tuple[Any, ...], experts: Array) -> Array:
    """Apply product(rows of a block, what its expert has of `of_experts`) to each block."""

    @functools.partial(jax.checkpoint, prevent_cse=False)  # otherwise the kernel of each block would be kept
    def of_block(of_experts: tuple[Any, ...], own: Array, expert: Array) -> Array:
        return product(own, *jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, expert, keepdims=False), of_experts))

    def step(filled: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        number, own, expert = block
        return lax.dynamic_update_index_in_dim(filled, of_block(of_experts, own, expert), number, 0), None

    one = jax.eval_shape(of_block, of_experts, rows[0], experts[0])
    # All of it is written. The loop begins with an entry of the rows, since XLA would make zeros for all layers at once.
    start = jnp.broadcast_to(lax.stop_gradient(rows[0, 0, 0]).astype(one.dtype), (rows.shape[0], *one.shape))
    numbers = jnp.arange(rows.shape[0], dtype=jnp.int32)
    return lax.scan(step, start, (numbers, rows, experts))[0]


def _product(x: Array, kernel: Any, columns: Array | None = None, values: Array | None = None) -> Array:
    """Return x (W + D)^T of one expert."""
    kernel = _with(kernel, columns, values)
    if quantised.is_quantised(kernel):
        return ops.quantised_dense(x, kernel)
    return lax.dot_general(x, kernel, (((1,), (1,)), ((), ())))


def _input_gradient(dy: Array, kernel: Any, columns: Array | None = None, values: Array | None = None) -> Array:
    return ops.input_gradient(dy, _with(kernel, columns, values))


def _with(kernel: Any, columns: Array | None, values: Array | None) -> Any:
    if columns is None or values is None:
        return kernel
    if quantised.is_quantised(kernel):
        return quantised.with_bypass(kernel, columns, values)
    return add_entries(kernel, columns, values)


def observed(
    x: Float[Array, "N b I"],
    kernel: Float[Array, "E O I"] | QuantisedKernel,
    experts: Int[Array, "N"],
    squares: Float[Array, "E I"],
) -> Float[Array, "N b O"]:
    """Return `plain`; the "gradient" of `squares` is as in `ops.observed_dense`, of every expert over its own rows."""
    return _walk(ops.observed_dense, x, (kernel, squares), experts)


def bypass_experts(
    x: Float[Array, "N b I"],
    kernel: Float[Array, "E O I"] | QuantisedKernel,
    experts: Int[Array, "N"],
    columns: Int[Array, "E _ k"],
    values: Float[Array, "E O k"],
    *,
    resident: bool,
) -> Float[Array, "N b O"]:
    """Return y = x (W + D)^T, differentiable in x and `values` alone; forms and rounding as in `ops.bypass_dense`."""
    return _bypassed(x, kernel, experts, columns, values, resident and not quantised.is_quantised(kernel))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _bypassed(x: Array, kernel: Any, experts: Array, columns: Array, values: Array, resident: bool) -> Array:
    return _walk(_product, x, (kernel,) if resident else (kernel, columns, values), experts)


def _bypassed_fwd(x: Array, kernel: Any, experts: Array, columns: Array, values: Array, resident: bool) -> Any:
    return _bypassed(x, kernel, experts, columns, values, resident), (x, kernel, experts, columns, values)


def _bypassed_bwd(resident: bool, residuals: Any, dy: Array) -> Any:
    x, kernel, experts, columns, values = residuals
    dx = _walk(_input_gradient, dy, (kernel,) if resident else (kernel, columns, values), experts)
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
