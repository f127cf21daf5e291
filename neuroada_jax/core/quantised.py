"""Quantised kernels: a node of arrays in the place of a kernel, and the dense kernel that it stands for.

A QuantisedKernel has the shape and the dtype of the kernel that `dequantise` returns, so that code which asks for these
needs no change. It is a pytree: it can be scanned over its leading axis, mapped, donated and split by neuron. Its codes
cannot hold W + D; it carries the values of a merged bypass beside them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from neuroada_jax.core import entries
from neuroada_jax.core.entries import add_entries, round_to
from neuroada_jax.core.quantised_formats import FORMATS, shape_of


# The fields are typed Any: JAX puts placeholders into them during transformations.
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["parts", "columns", "values"],
    meta_fields=["format", "dtype"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class QuantisedKernel:
    """A kernel (*L, O, I) as codes and scales.

    Attributes:
      parts: the arrays of the format by name, each (*L, O, width).
      format: a name of `quantised_formats.FORMATS`.
      dtype: NumPy's, of the dense kernel.
      columns: of a bypass that is merged into the kernel, int32 (*L, O, k) or (*L, 1, k); None for none.
      values: of that bypass, (*L, O, k); added to the dense kernel, which is rounded once.
    """

    parts: Any
    format: str
    dtype: Any
    columns: Any = None
    values: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense kernel."""
        return shape_of(self.parts, self.format)

    @property
    def ndim(self) -> int:
        """The number of axes of the dense kernel."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries of the dense kernel."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator["QuantisedKernel"]:
        return (self[layer] for layer in range(len(self)))  # an index beyond the last one is no error in JAX

    def __getitem__(self, layer: Any) -> "QuantisedKernel":
        """Return the kernel of one layer of stacked ones."""
        return jax.tree.map(lambda leaf: leaf[layer], self)


def is_quantised(node: Any) -> bool:
    """Return whether a node of a tree is a quantised kernel."""
    return isinstance(node, QuantisedKernel)


def holds(tree: Any) -> bool:
    """Return whether a tree of parameters has a quantised kernel."""
    return any(map(is_quantised, jax.tree.leaves(tree, is_leaf=is_quantised)))


def map_quantised(function: Callable[[QuantisedKernel], Any], tree: Any) -> Any:
    """Return the tree with `function` applied to every quantised kernel."""
    return jax.tree.map(lambda node: function(node) if is_quantised(node) else node, tree, is_leaf=is_quantised)


def dequantise(kernel: QuantisedKernel, dtype: Any = None) -> Float[Array, "*L O I"]:
    """Return the dense kernel, with a bypass that is merged into it, in its own dtype or in another."""
    dense = round_to(FORMATS[kernel.format].decode(kernel.parts), kernel.dtype)
    if kernel.values is not None:
        dense = add_entries(dense, kernel.columns, kernel.values)
    return dense if dtype is None else dense.astype(dtype)


def row_product(x: Float[Array, "I"], kernel: QuantisedKernel) -> Float[Array, "O"]:
    """Return x W^T in the dtype of x as elementwise work and one sum, which XLA's GPU compiler makes one kernel.

    It reads the codes and writes the result. A product would read a dense kernel, which has to be written first: for nf4
    nine times the bytes in all. A merged bypass is put in by comparisons, since a scatter would write a dense kernel, too.
    """
    dense = round_to(FORMATS[kernel.format].decode(kernel.parts), kernel.dtype).astype(jnp.float32)
    if kernel.values is not None:
        own = lax.broadcasted_iota(jnp.int32, dense.shape, dense.ndim - 1)
        columns = jnp.broadcast_to(kernel.columns, kernel.values.shape)
        each = (
            jnp.where(own == columns[:, at, None], kernel.values[:, at, None], 0) for at in range(kernel.values.shape[-1])
        )
        dense = round_to(dense + functools.reduce(jnp.add, each).astype(jnp.float32), kernel.dtype).astype(jnp.float32)
    return jnp.sum(x.astype(jnp.float32)[None] * dense, axis=-1).astype(x.dtype)


def shape(kernel: Any) -> tuple[int, ...]:
    """Return the shape (*L, O, I) of a kernel, quantised or not, whose layers may lie apart."""
    if isinstance(kernel, tuple):
        return (len(kernel), *kernel[0].shape)
    return tuple(kernel.shape)


def dense(kernel: Any) -> Array:
    """Return a kernel as an array, dequantised if it is quantised."""
    return dequantise(kernel) if is_quantised(kernel) else kernel


@jax.jit
def dense_stack(kernel: Any) -> Array:
    """Return a kernel (*L, O, I), whose layers may lie apart and be quantised, as one array."""
    if isinstance(kernel, tuple):
        return jnp.stack([dense(layer) for layer in kernel])
    return by_layer(dequantise, kernel) if is_quantised(kernel) else kernel


def by_layer(function: Callable[..., Any], kernel: QuantisedKernel, *others: Any) -> Any:
    """Return function(kernel (O, I), *others) of every layer and expert, of which one is dequantised at a time."""
    if kernel.ndim == 2:
        return function(kernel, *others)
    return lax.map(lambda own: by_layer(function, *own), (kernel, *others))


@jax.jit
def read_entries(kernel: QuantisedKernel, columns: Int[Array, "*L _ k"]) -> Float[Array, "*L O k"]:
    """Return the dense kernel's entries at the columns, in its dtype."""
    return by_layer(lambda own, chosen: entries.read_entries(dequantise(own), chosen), kernel, columns)


def read_rows(kernel: QuantisedKernel, rows: Int[Array, "*B"]) -> Float[Array, "*B I"]:
    """Return rows of the dense kernel (O, I); no others are dequantised."""
    own, with_shared = _apart(kernel)
    chosen = {name: jnp.take(part, rows.reshape(-1), axis=0, mode="clip") for name, part in own.items()}
    return dequantise(with_shared(chosen)).reshape(*rows.shape, kernel.shape[-1])


def in_chunks(kernel: QuantisedKernel, chunks: int) -> tuple[dict[str, Array], Callable[..., QuantisedKernel]]:
    """Return the arrays of a kernel (O, I) as (chunks, O / chunks, width), and what makes a kernel of one chunk of each."""
    own, with_shared = _apart(kernel)
    return {name: part.reshape(chunks, -1, part.shape[-1]) for name, part in own.items()}, with_shared


def _apart(kernel: QuantisedKernel) -> tuple[dict[str, Any], Callable[..., QuantisedKernel]]:
    """Return the arrays that neurons do not share, and what makes a kernel of some neurons' part of these."""
    specs = FORMATS[kernel.format].parts
    shared = {name: part for name, part in kernel.parts.items() if specs[name].shared}
    own = {name: part for name, part in kernel.parts.items() if name not in shared}
    return own, lambda parts: QuantisedKernel({**parts, **shared}, kernel.format, kernel.dtype)


def with_bypass(kernel: QuantisedKernel, columns: Any, values: Any) -> QuantisedKernel:
    """Return the kernel with a bypass merged into it, in the place of one that is."""
    return dataclasses.replace(kernel, columns=columns, values=values)


def without_bypass(kernel: QuantisedKernel) -> QuantisedKernel:
    """Return the kernel without a bypass."""
    return dataclasses.replace(kernel, columns=None, values=None)


def when(kernel: Any, array: Array) -> tuple[Any, Array]:
    """Return kernel and array such that a quantised kernel is dequantised only once the array has been computed.

    Otherwise XLA moves the dequantisation out of a loop, or merges that of the backward pass with that of the forward pass,
    and all dequantised kernels of a model are in memory at once.
    """
    if not is_quantised(kernel):
        return kernel, array
    return lax.optimization_barrier((kernel, array))


def abstract(kernel: Any, name: str) -> QuantisedKernel:
    """Return the shapes of a kernel's arrays in a format, from the shape and dtype of the dense kernel."""
    *leading, outputs, inputs = kernel.shape
    parts = {
        part: jax.ShapeDtypeStruct((*leading, 1 if shared else outputs, width(inputs)), dtype)
        for part, (dtype, width, shared) in FORMATS[name].parts.items()
    }
    return QuantisedKernel(parts, name, jnp.dtype(kernel.dtype))


def size(tree: Mapping[str, Any]) -> int:
    """Return the number of entries of a tree of arrays, shapes and quantised kernels."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree, is_leaf=is_quantised))
