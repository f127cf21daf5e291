"""Low-rank adapters (LoRA, arXiv 2106.09685) in the trees of a bypass: y = x W^T + scale (x A^T) B^T.

At the path of a linear map, in the place of values and columns or beside them,

    values   {"lora_a": (*L, r, I), "lora_b": (*L, O, r)}   trainable; B is zero at the start
    columns  {"scale": (*L,)}                               float32, static: alpha / r

The kernel is never resident: B A is formed to merge alone. An adapter that is only used has its factors `beside` the
kernels, in the tree of the parameters. Kernels of layers that lie apart are tuples, as in bypass.py, and quantised ones are
added to as they are.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from neuroada_jax.core import quantised
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.core.entries import wide_dtype
from neuroada_jax.core.trees import ModulePath, Tree, flatten, get, kernel_at, leaves, put, unflatten

LEAVES = ("lora_a", "lora_b")


def build(
    params: Mapping[str, Any], paths: Iterable[ModulePath], rank: int, scale: float, key: Array, dtype: Any = jnp.float32
) -> Bypass:
    """Return the initial adapter of the linear maps at `paths`, as PEFT initialises it: A uniform, B zero.

    A is drawn from +-1 / sqrt(I), which is PyTorch's kaiming_uniform_ with a = sqrt(5).

    Args:
      params: parameter tree with kernels (*L, O, I), arrays or shapes; or with tuples of kernels (O, I).
      paths: paths of the linear maps.
      rank: the r of every map.
      scale: of the product B A: alpha / r.
      key: of the random numbers.
      dtype: of A and B.
    """
    values: Tree = {}
    static: Tree = {}
    for number, path in enumerate(paths):
        kernel: Any = kernel_at(params, path)
        apart = isinstance(kernel, tuple)
        *stack, outputs, inputs = (len(kernel), *kernel[0].shape) if apart else kernel.shape
        bound = 1 / math.sqrt(inputs)
        a = jax.random.uniform(jax.random.fold_in(key, number), (*stack, rank, inputs), dtype, -bound, bound)
        values = put(values, path, {"lora_a": a, "lora_b": jnp.zeros((*stack, outputs, rank), dtype)})
        static = put(static, path, {"scale": jnp.full(tuple(stack), scale, jnp.float32)})
    return Bypass(values, static)


@jax.custom_vjp
def low_rank_dense(
    x: Float[Array, "*B I"], a: Float[Array, "r I"], b: Float[Array, "O r"], scale: Float[Array, ""]
) -> Float[Array, "*B O"]:
    """Return scale (x A^T) B^T in the dtype of x, differentiable in x, A and B.

    Products have operands in the dtype of x and are summed in float32; so are the gradients of A and B. The residual is x
    in its original shape, as in `ops.bypass_dense`, and the r numbers of every token.
    """
    return _low_rank_dense_fwd(x, a, b, scale)[0]


def _product(left: Array, right: Array, axis: int, result: Any) -> Array:
    """Return left (*B, n) times right, (m, n) for axis 1 and (n, m) for axis 0, in the dtype `result`."""
    dimensions = (((left.ndim - 1,), (axis,)), ((), ()))
    product = lax.dot_general(left, right.astype(left.dtype), dimensions, preferred_element_type=wide_dtype(left.dtype))
    return product.astype(result)


def _low_rank_dense_fwd(x, a, b, scale):
    inner = _product(x, a, 1, x.dtype)
    wide = wide_dtype(x.dtype)
    y = _product(inner, b, 1, wide) * scale.astype(wide)
    return y.astype(x.dtype), (x, a, b, scale, inner)


def _low_rank_dense_bwd(residuals, dy):
    x, a, b, scale, inner = residuals
    wide = wide_dtype(x.dtype)
    dinner = (_product(dy, b, 0, wide) * scale.astype(wide)).astype(x.dtype)
    flat = lambda leaf: leaf.reshape(-1, leaf.shape[-1]).T  # noqa: E731
    da = _product(flat(dinner), flat(x).T, 0, a.dtype)
    db = (_product(flat(dy), flat(inner).T, 0, wide) * scale.astype(wide)).astype(b.dtype)
    return _product(dinner, a, 0, x.dtype), da, db, None


low_rank_dense.defvjp(_low_rank_dense_fwd, _low_rank_dense_bwd)


@jax.jit
def merge_kernel(kernel: Any, a: Array, b: Array, scale: Array) -> Array:
    """Return W + scale B A, summed in float32 and rounded once; of stacked kernels one at a time."""

    def one(parts: tuple[Any, Array, Array, Array]) -> Array:
        kernel, a, b, scale = quantised.dense(parts[0]), *parts[1:]
        wide = wide_dtype(kernel.dtype)
        product = jnp.matmul(b.astype(wide), a.astype(wide), precision=lax.Precision.HIGHEST)
        return (kernel.astype(wide) + scale.astype(wide) * product).astype(kernel.dtype)

    parts = (kernel, a, b, scale)
    return one(parts) if kernel.ndim == 2 else lax.map(lambda own: merge_kernel(*own), parts)


def is_in(adapter: Bypass) -> bool:
    """Return whether an adapter has low-rank factors."""
    return next(leaves(adapter.values, "lora_a"), None) is not None


def beside(params: Mapping[str, Any], adapter: Bypass) -> Tree:
    """Return the parameters with the factors and scales beside their kernels, of which none is copied.

    A linear map adds their product to its output, as in training. An adapter without factors leaves the parameters as they
    are.
    """
    joined = dict(params)
    for path, _ in leaves(adapter.values, "lora_a"):
        joined = put(joined, path, {**get(joined, path), **get(adapter.values, path), **get(adapter.columns, path)})
    return joined


def split(params: Mapping[str, Any]) -> tuple[Tree, dict[ModulePath, tuple[Any, Any, Any]]]:
    """Return parameters without the factors that lie beside their kernels, and A, B and scale by the map's path."""
    flat = dict(flatten(params))
    maps = [path[:-1] for path in flat if path[-1] == "lora_a"]
    factors = {own: (flat.pop((*own, "lora_a")), flat.pop((*own, "lora_b")), flat.pop((*own, "scale"))) for own in maps}
    return unflatten(flat), factors


def merge(params: Mapping[str, Any], adapter: Bypass) -> Tree:
    """Return the parameters with every kernel W that has factors replaced by W + scale B A; the others are not copied.

    Unlike a merged bypass, it is not bit for bit what was trained: there the two products are rounded apart.
    """
    merged = dict(params)
    for path, a in leaves(adapter.values, "lora_a"):
        kernel, b, scale = kernel_at(params, path), get(adapter.values, path)["lora_b"], get(adapter.columns, path)["scale"]
        updated: Any
        if isinstance(kernel, tuple):
            updated = tuple(merge_kernel(each, a[at], b[at], scale[at]) for at, each in enumerate(kernel))
        else:
            updated = merge_kernel(kernel, a, b, scale)
        merged = put(merged, path, {**get(merged, path), "kernel": updated})
    return merged
