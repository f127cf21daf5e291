"""Products of tokens with the kernels of the experts that they are routed to, and the bypass of these kernels.

Rows are laid out in blocks, each of rows of one expert and filled up with zeros, so that the products of a block read one
kernel. The blocks are walked one after the other: no product is formed that no token asked for, but for the filling. One
kernel at a time is dequantised and gets its values, and no copy is kept: nothing of the size of all experts is made. The
number of blocks is static, whatever the routing.

Letters: R rows (tokens times the experts of a token), E experts, N blocks of b rows, O outputs, I inputs, k connections.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from neuroada_jax.core import low_rank, ops, platform, quantised
from neuroada_jax.core.entries import add_entries, wide_dtype
from neuroada_jax.core.quantised import QuantisedKernel

_LARGEST_BLOCK = 256
_MOST_AT_ONCE = 16  # blocks, on a GPU
_ENTRIES_AT_ONCE = 2**25  # of their kernels, 64 MiB in bfloat16


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


@jax.custom_vjp
def plain(
    x: Float[Array, "N b I"], kernel: Float[Array, "E O I"] | QuantisedKernel, experts: Int[Array, "N"]
) -> Float[Array, "N b O"]:
    """Return the product of each block with the kernel of its expert, y = x W^T; a quantised kernel is frozen."""
    return _walk(_product, x, (kernel,), experts)


def _plain_fwd(*arguments: Any) -> Any:
    x, kernel, experts = jax.tree.map(lambda primal: primal.value, arguments)
    trains = not quantised.is_quantised(kernel) and arguments[1].perturbed  # for the gradients of scores
    return plain(x, kernel, experts), (kernel, experts, x if trains else None)


def _plain_bwd(residuals: Any, dy: Any) -> Any:
    kernel, experts, x = residuals
    if isinstance(dy, SymbolicZero):
        return None, None, None
    dx = _walk(_input_gradient, dy, (kernel,), experts)
    return dx, None if x is None else _sums(lambda x, dy: dy.T @ x, (x, dy), (), experts, kernel), None


plain.defvjp(_plain_fwd, _plain_bwd, symbolic_zeros=True)


def _sums(
    of_block: Callable[..., Array], rows: tuple[Array, ...], of_experts: tuple[Any, ...], experts: Array, like: Array
) -> Array:
    """Return sums like `like` over the blocks of each expert of of_block(rows of a block, what its expert has)."""
    wide = wide_dtype(like.dtype)

    def one(expert: Array, *own: Array) -> Array:
        return of_block(*own, *_of(of_experts, expert)).astype(wide)

    def add(total: Array, blocks: tuple[Array, ...]) -> tuple[Array, None]:
        *own, some = blocks
        return total.at[some].add(_each(one, some, *own)), None

    at_once = _at_once(experts.shape[0], like[0].size * rows[0].shape[1])
    return lax.scan(add, jnp.zeros(like.shape, wide), _in_turns(at_once, *rows, experts))[0].astype(like.dtype)


def _at_once(blocks: int, entries: int) -> int:
    """Return how many blocks, each with a temporary of so many entries, a step of a loop takes.

    On a GPU a block is a few launches of small kernels, which take longer to start than to run; a CPU starts nothing.
    """
    if platform.name() != "gpu":
        return 1
    fitting = max(min(_ENTRIES_AT_ONCE // entries, _MOST_AT_ONCE), 1)
    return math.gcd(blocks, 1 << (fitting.bit_length() - 1))


def _each(of_block: Callable[..., Any], *blocks: Array) -> Any:
    """Return of_block of every block of a turn."""
    if blocks[0].shape[0] > 1:
        return jax.vmap(of_block)(*blocks)
    alone = of_block(*(block[0] for block in blocks))  # its kernel is then a slice, which a product can read in place
    return jax.tree.map(lambda found: found[None], alone)


def _in_turns(at_once: int, *arrays: Array) -> tuple[Array, ...]:
    """Return arrays over the blocks as arrays over turns of so many."""
    return tuple(array.reshape(-1, at_once, *array.shape[1:]) for array in arrays)


def _filled(rows: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return an array that a loop writes all of; XLA would make zeros for the loops of all layers at once."""
    return jnp.broadcast_to(lax.stop_gradient(rows[0, 0, 0]).astype(dtype), shape)


def _of(of_experts: tuple[Any, ...], expert: Array) -> tuple[Any, ...]:
    """Return what one expert has."""
    found: tuple[Any, ...] = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, expert, keepdims=False), of_experts)
    return found


def _walk(product: Callable[..., Array], rows: Array, of_experts: tuple[Any, ...], experts: Array) -> Array:
    """Apply product(rows of a block, what its expert has of `of_experts`) to each block."""

    @functools.partial(jax.checkpoint, prevent_cse=False)  # otherwise the kernel of each block would be kept
    def of_block(of_experts: tuple[Any, ...], own: Array, expert: Array) -> Array:
        return product(own, *_of(of_experts, expert))

    def step(filled: Array, blocks: tuple[Array, ...]) -> tuple[Array, None]:
        number, *turn = blocks
        found = _each(functools.partial(of_block, of_experts), *turn)
        return lax.dynamic_update_slice_in_dim(filled, found, number, 0), None

    count, one = rows.shape[0], jax.eval_shape(of_block, of_experts, rows[0], experts[0])
    at_once = _at_once(count, one.shape[-1] * rows.shape[-1])
    numbers = jnp.arange(0, count, at_once, dtype=jnp.int32)
    turns = _in_turns(at_once, rows, experts)
    return lax.scan(step, _filled(rows, (count, *one.shape), one.dtype), (numbers, *turns))[0]


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

    def of_block(x: Array, dy: Array, columns: Array) -> Array:
        inputs = jnp.take(x.T, columns, axis=0, mode="clip").astype(wide)  # (O, k, b)
        return jnp.sum(inputs * dy.T[:, None, :].astype(wide), axis=2)

    return dx, None, None, None, _sums(of_block, (x, dy), (columns,), experts, values)


_bypassed.defvjp(_bypassed_fwd, _bypassed_bwd)


@jax.custom_vjp
def low_rank_experts(
    x: Float[Array, "N b I"],
    experts: Int[Array, "N"],
    a: Float[Array, "E r I"],
    b: Float[Array, "E O r"],
    scale: Float[Array, "E"],
) -> Float[Array, "N b O"]:
    """Return `low_rank.low_rank_dense` of each block with the factors of its expert, differentiable in x, A and B."""
    return _walk(low_rank.low_rank_dense, x, (a, b, scale), experts)


def _low_rank_fwd(x: Array, experts: Array, a: Array, b: Array, scale: Array) -> Any:
    return low_rank_experts(x, experts, a, b, scale), (x, experts, a, b, scale)


def _low_rank_bwd(residuals: Any, dy: Array) -> Any:
    x, experts, *factors = residuals

    def of_block(x: Array, dy: Array, expert: Array) -> tuple[Array, ...]:
        a, b, scale = _of(tuple(factors), expert)
        gradients: tuple[Array, ...] = jax.vjp(lambda *own: low_rank.low_rank_dense(*own, scale), x, a, b)[1](dy)
        return gradients

    def step(carry: tuple[Array, ...], blocks: tuple[Array, ...]) -> tuple[tuple[Array, ...], None]:
        number, *turn = blocks
        dx, *totals = carry
        found, *gradients = _each(of_block, *turn)
        totals = [total.at[turn[-1]].add(each) for total, each in zip(totals, gradients, strict=True)]
        return (lax.dynamic_update_slice_in_dim(dx, found, number, 0), *totals), None

    at_once = _at_once(x.shape[0], sum(leaf[0].size for leaf in factors[:2]))
    numbers = jnp.arange(0, x.shape[0], at_once, dtype=jnp.int32)
    start = (_filled(dy, x.shape, x.dtype), *(jnp.zeros_like(leaf) for leaf in factors[:2]))
    (dx, da, db), _ = lax.scan(step, start, (numbers, *_in_turns(at_once, x, dy, experts)))
    return dx, None, da, db, None


low_rank_experts.defvjp(_low_rank_fwd, _low_rank_bwd)
