"""The bypass op: a frozen linear map plus k trainable connections per neuron, after NeuroAda (arXiv 2510.18940).

Letters (docs/design.md): T tokens, O neurons, I input connections, k connections per neuron.

    y[t, o]       = sum_i W[o, i] x[t, i] + sum_j values[o, j] x[t, columns[o, j]]
    dvalues[o, j] = sum_t dy[t, o] x[t, columns[o, j]]
    dx            = dy @ (W + D),    D = values scattered to the columns, (O, I)

Autodiff through ``W.at[rows, columns].add(values)`` is correct, but keeps the merged copy of W as a residual and forms the
dense dW, (O, I): the cost of full fine-tuning at any k. The custom VJP here has x, the kernel it was given and the columns
as residuals, and computes dvalues, (O, k), alone.

A kernel may be quantised (core/quantised.py): it is dequantised for the product, W + D is formed in that temporary, and
both are done again in the backward pass, so that the codes and scales are all that is kept.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from neuroada_jax.core import platform, quantised
from neuroada_jax.core.batching import share_examples
from neuroada_jax.core.entries import Layout, add_entries, are_shared, check_layout, wide_dtype
from neuroada_jax.core.quantised import QuantisedKernel
from neuroada_jax.core.value_gradient import GradientAlgorithm, choose_algorithm, value_gradient

_FEW_ROWS = 4  # for which a quantised kernel is not dequantised as a whole, on a GPU
_FEW_VALUES = 20  # of a neuron, merged into such a kernel
_CHUNK = 1 << 22  # entries of a vocabulary's kernel that are dequantised at a time


def _product(x: Array, kernel: Array, layout: Layout) -> Array:
    """Return x @ kernel^T, (*B, O), in the dtype of x; XLA accumulates bfloat16 products in float32."""
    inputs = 1 if Layout(layout) is Layout.OI else 0
    return lax.dot_general(x, kernel.astype(x.dtype), (((x.ndim - 1,), (inputs,)), ((), ())))


def _backward(
    dy: Array, x: Array, kernel: Array, columns: Array, values_dtype: Any, algorithm: GradientAlgorithm, layout: Layout
) -> tuple[Array, Array]:
    """Return dx, (*B, I), and dvalues, (O, k), for a kernel that holds W + D."""
    neurons = 0 if Layout(layout) is Layout.OI else 1
    dx = lax.dot_general(dy, kernel.astype(dy.dtype), (((dy.ndim - 1,), (neurons,)), ((), ())))
    flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    return dx, value_gradient(flat_dy, flat_x, columns, algorithm).astype(values_dtype)


# In both forms the residual is x in its original shape, so that projections which share an input (q, k, v) share one saved
# array.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _resident(
    x: Array, kernel: Array, columns: Array, values: Array, algorithm: GradientAlgorithm, layout: Layout
) -> Array:
    return _product(x, kernel, layout)


def _resident_fwd(x, kernel, columns, values, algorithm, layout):
    # The backward pass needs the dtype of the values only: an empty array carries it.
    return _product(x, kernel, layout), (x, kernel, columns, values[:0])


def _resident_bwd(algorithm, layout, residuals, dy):
    x, kernel, columns, values = residuals
    dx, dvalues = _backward(dy, x, kernel, columns, values.dtype, algorithm, layout)
    return dx, None, None, dvalues


_resident.defvjp(_resident_fwd, _resident_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _on_the_fly(
    x: Array, kernel: Any, columns: Array, values: Array, algorithm: GradientAlgorithm, layout: Layout
) -> Array:
    kernel, x = quantised.when(kernel, x)
    return _product(x, add_entries(quantised.dense(kernel), columns, values, layout), layout)


def _on_the_fly_fwd(x, kernel, columns, values, algorithm, layout):
    return _on_the_fly(x, kernel, columns, values, algorithm, layout), (x, kernel, columns, values)


def _on_the_fly_bwd(algorithm, layout, residuals, dy):
    x, kernel, columns, values = residuals
    # Merged again: as a residual it would be a copy of every target kernel, alive from the forward to the backward pass.
    kernel, dy = quantised.when(kernel, dy)
    merged = add_entries(quantised.dense(kernel), columns, values, layout)
    dx, dvalues = _backward(dy, x, merged, columns, values.dtype, algorithm, layout)
    return dx, None, None, dvalues


_on_the_fly.defvjp(_on_the_fly_fwd, _on_the_fly_bwd)
_on_the_fly_shared = share_examples("bypass_dense", _on_the_fly)


def _of_leaves(x: Array, columns: Array, values: Array, *leaves: Array, structure: Any, algorithm: Any) -> Array:
    """Return `_on_the_fly` for a quantised kernel that is given as its flattened arrays."""
    return _on_the_fly(x, jax.tree.unflatten(structure, leaves), columns, values, algorithm, Layout.OI)


_quantised_shared = share_examples("bypass_dense_quantised", _of_leaves)


def bypass_dense(
    x: Float[Array, "*B I"],
    kernel: Float[Array, "_ _"] | QuantisedKernel,
    columns: Int[Array, "_ k"],
    values: Float[Array, "O k"],
    *,
    resident: bool = False,
    algorithm: GradientAlgorithm | None = None,
    layout: Layout = Layout.OI,
) -> Float[Array, "*B O"]:
    """Apply y = x @ (W + D)^T, differentiable in x and `values` alone; the frozen kernel's cotangent is zero.

    W + D is summed in the dtype of the values and rounded once to the kernel's, as `merge` does: the weight that is trained
    is the weight that is merged, bit for bit.

    By default the kernel holds W, and W + D is formed in the forward and again in the backward pass. This form is
    stateless: `vmap` over values and columns serves several adapters, `vmap` over x alone remains one call.

    A *resident* kernel holds W + D already, as ``add_entries(kernel, columns, values)`` returns it. The forward pass and dx
    are then plain matrix products, and `values` is an argument so that it receives its gradient. The codes of a quantised
    kernel cannot hold it: such a kernel has the first form always.

    Args:
      x: float (*B, I).
      kernel: float (O, I), or (I, O) for `Layout.IO`; or quantised (O, I). Where x has another dtype, W + D is cast to it
        for the product.
      columns: int32 (O, k), distinct within a neuron, in [0, I); or (1, k), shared by all neurons: then dvalues is one
        dense product with k gathered inputs.
      values: float (O, k).
      resident: whether the kernel holds W + D.
      algorithm: how dvalues is computed; None: as `choose_algorithm` decides. Without effect for shared columns.
      layout: axis order of the kernel.

    Returns:
      (*B, O) in the dtype of x.

    Raises:
      ValueError: the kernel does not fit the columns in this layout.
    """
    check_layout(kernel, columns, layout)
    if are_shared(columns, values.shape[0]):
        algorithm = GradientAlgorithm.DENSE_CHUNKS  # not used
    algorithm = algorithm or choose_algorithm(columns.shape[1], x.shape[-1])
    if isinstance(kernel, QuantisedKernel):
        leaves, structure = jax.tree.flatten(kernel)
        return _quantised_shared(x, columns, values, *leaves, structure=structure, algorithm=algorithm)
    if resident:
        return _resident(x, kernel, columns, values, algorithm, layout)
    return _on_the_fly_shared(x, kernel, columns, values, algorithm=algorithm, layout=layout)


@jax.custom_vjp
def observed_dense(
    x: Float[Array, "*B I"], kernel: Float[Array, "O I"] | QuantisedKernel, squares: Float[Array, "I"]
) -> Float[Array, "*B O"]:
    """Return x @ kernel^T; the "gradient" of `squares` is the sum over tokens of x squared, by input.

    So a backward pass through a model sums the squares of every linear map's inputs. Tokens on which the result does not
    depend (dy is 0), such as padding, are not counted. The kernel is frozen.
    """
    kernel, x = quantised.when(kernel, x)
    return _product(x, quantised.dense(kernel), Layout.OI)


def _observed_fwd(x, kernel, squares):
    return observed_dense(x, kernel, squares), (x, kernel, squares[:0])


def _observed_bwd(residuals, dy):
    x, kernel, squares = residuals
    dx = input_gradient(dy, kernel)
    counts = jnp.any(dy != 0, axis=-1, keepdims=True)
    observed = jnp.where(counts, jnp.square(x.astype(squares.dtype)), 0)
    return dx, None, jnp.sum(observed.reshape(-1, x.shape[-1]), axis=0)


observed_dense.defvjp(_observed_fwd, _observed_bwd)


def input_gradient(dy: Array, kernel: Any) -> Array:
    """Return dx, (*B, I), for a kernel (O, I) that may be quantised."""
    kernel, dy = quantised.when(kernel, dy)
    return lax.dot_general(dy, quantised.dense(kernel).astype(dy.dtype), (((dy.ndim - 1,), (0,)), ((), ())))


def _are_few(x: Array, kernel: QuantisedKernel) -> bool:
    """Return whether it takes fewer bytes to read the codes for every row of x than to write a dense kernel and read it.

    By the compiled programs, in which that is so for a sum in place of a product (`quantised.row_product`). XLA's CPU
    backend does not vectorise such a sum.
    """
    merged = 0 if kernel.values is None else kernel.values.shape[-1]
    return platform.name() == "gpu" and math.prod(x.shape[:-1]) <= _FEW_ROWS and merged <= _FEW_VALUES


def _by_row(x: Array, kernel: QuantisedKernel) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) == 1:  # a loop of one round is a loop to XLA, too
        return quantised.row_product(rows[0], kernel).reshape(*x.shape[:-1], -1)
    return lax.map(lambda row: quantised.row_product(row, kernel), rows).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def quantised_dense(x: Float[Array, "*B I"], kernel: QuantisedKernel) -> Float[Array, "*B O"]:
    """Return x @ W^T for a frozen quantised kernel, of which the backward pass keeps codes and scales alone."""
    kernel, x = quantised.when(kernel, x)
    if _are_few(x, kernel):
        return _by_row(x, kernel)
    return _product(x, quantised.dense(kernel), Layout.OI)


quantised_dense.defvjp(
    lambda x, kernel: (quantised_dense(x, kernel), kernel), lambda kernel, dy: (input_gradient(dy, kernel), None)
)


def _chunks(outputs: int, inputs: int) -> int:
    """Return into how many equal parts a kernel is taken, each of at most `_CHUNK` entries; 1 where none divides it."""
    least = -(-outputs * inputs // _CHUNK)
    return next((parts for parts in range(least, min(64 * least, outputs) + 1) if outputs % parts == 0), 1)


@jax.custom_vjp
def vocabulary_dense(x: Float[Array, "*B I"], kernel: QuantisedKernel) -> Float[Array, "*B O"]:
    """Return `quantised_dense` of a kernel with many neurons, of which a part is dequantised at a time."""
    kernel, x = quantised.when(kernel, x)
    if _are_few(x, kernel):
        return _by_row(x, kernel)
    parts, whole = quantised.in_chunks(kernel, _chunks(*kernel.shape))
    each = lax.map(lambda part: _product(x, quantised.dequantise(whole(part)), Layout.OI), parts)
    return jnp.moveaxis(each, 0, -2).reshape(*x.shape[:-1], kernel.shape[0])


def _vocabulary_bwd(kernel, dy):
    kernel, dy = quantised.when(kernel, dy)
    chunks = _chunks(*kernel.shape)
    parts, whole = quantised.in_chunks(kernel, chunks)
    split = jnp.moveaxis(dy.reshape(*dy.shape[:-1], chunks, -1), -2, 0)

    def add(total: Array, part: tuple[dict[str, Array], Array]) -> tuple[Array, None]:
        dense = quantised.dequantise(whole(part[0])).astype(dy.dtype)
        product = lax.dot_general(
            part[1], dense, (((dy.ndim - 1,), (0,)), ((), ())), preferred_element_type=wide_dtype(dy.dtype)
        )
        return total + product, None

    zeros = jnp.zeros((*dy.shape[:-1], kernel.shape[1]), wide_dtype(dy.dtype))
    return lax.scan(add, zeros, (parts, split))[0].astype(dy.dtype), None


vocabulary_dense.defvjp(lambda x, kernel: (vocabulary_dense(x, kernel), kernel), _vocabulary_bwd)
