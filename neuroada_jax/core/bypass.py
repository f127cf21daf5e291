"""The Bypass tree: which linear maps carry a bypass, its values, its columns, merging and exact unmerging.

Trees are plain nested dicts that mirror the parameters (docs/design.md). A linear map is a node that holds a
`kernel`, or the kernel itself where a tree has another name for it. Kernels are (*L, O, I), or (*L, I, O) where the
functions are told so, L being the stacked layers if there are any. At the same path the bypass trees hold

    values        {"values": (*L, O, k)}        trainable, float32, zero at the start
    columns       {"columns": (*L, O, k)}       int32, static
    base_entries  {"base_entries": (*L, O, k)}  the kernel's own entries at the columns, kept while the kernel is resident

Inputs and neurons may each take several axes of a kernel, as in the (D, H, N) of Flax's attention: columns then count the
flattened inputs, and O the flattened neurons.

Arrays in, arrays out: nothing here knows Flax, files or models.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neuroada_jax.core import ops, selection
from neuroada_jax.core.ops import Layout
from neuroada_jax.core.trees import ModulePath, Tree, get, kernel_at, leaves, put
from neuroada_jax.errors import UserError


class Bypass(NamedTuple):
    """The two trees of a bypass: trainable `values` and static `columns`, at the same paths."""

    values: Tree
    columns: Tree


def build(
    params: Mapping[str, Any],
    paths: Iterable[ModulePath],
    k: int,
    *,
    score: Callable[[jax.Array], jax.Array] = selection.magnitude,
    dtype: Any = jnp.float32,
    layout: Layout = Layout.OI,
) -> Bypass:
    """Zero values and selected columns for the linear maps at `paths`.

    Args:
      params: parameter tree with kernels (*L, O, I), or (*L, I, O) as `layout` says.
      paths: where the linear maps are, as `kernels` yields them, or where a kernel itself is.
      k: connections per neuron; a map with fewer inputs gets all of them.
      score: elementwise, kernel -> scores of the same shape.
      dtype: of the values.
      layout: where the kernels have their neurons.

    Returns: values (*L, O, min(k, I)) and int32 columns of the same shape.

    Raises:
      ValueError: k < 1.
      KeyError: a path that holds no kernel.
    """
    values: Tree = {}
    columns: Tree = {}
    for path in paths:
        chosen = selection.select(kernel_at(params, path), k, score, layout=layout)
        columns = put(columns, path, {"columns": chosen})
        values = put(values, path, {"values": jnp.zeros(chosen.shape, dtype)})
    return Bypass(values, columns)


def count(values: Mapping[str, Any]) -> int:
    """The entries of a tree; for values, k times the neurons of the targets. Abstract arrays will do."""
    return sum(leaf.size for leaf in jax.tree.leaves(values))


def _as_matrices(kernel: jax.Array, columns: jax.Array, layout: Layout) -> jax.Array:
    """The kernel as (*L, O, I) or (*L, I, O), whatever number of axes its inputs and neurons take."""
    *leading, outputs, _ = columns.shape
    shape = (outputs, -1) if layout is Layout.OI else (-1, outputs)
    return kernel if kernel.ndim == columns.ndim else kernel.reshape(*leading, *shape)


def read(params: Mapping[str, Any], columns: Mapping[str, Any], *, layout: Layout = Layout.OI) -> Tree:
    """The base tree: the kernels' entries at the columns, in the kernels' dtype."""
    base_entries: Tree = {}
    for path, chosen in leaves(columns, "columns"):
        kernel = _as_matrices(kernel_at(params, path), chosen, layout)
        base_entries = put(base_entries, path, {"base_entries": ops.read_entries(kernel, chosen, layout)})
    return base_entries


def _map_kernels(
    params: Mapping[str, Any],
    columns: Mapping[str, Any],
    update: Callable[[ModulePath, jax.Array, jax.Array], jax.Array],
    layout: Layout,
) -> Tree:
    merged = dict(params)
    for path, chosen in leaves(columns, "columns"):
        kernel, node = kernel_at(params, path), get(merged, path)
        updated = update(path, _as_matrices(kernel, chosen, layout), chosen).reshape(kernel.shape)
        merged = put(merged, path, {**node, "kernel": updated} if isinstance(node, Mapping) else updated)
    return merged


def merge(params: Mapping[str, Any], bypass: Bypass, *, layout: Layout = Layout.OI) -> Tree:
    """The parameters with every target kernel replaced by W + D, summed in the values' dtype and rounded once to W's."""

    def update(path: ModulePath, kernel: jax.Array, chosen: jax.Array) -> jax.Array:
        return ops.add_entries(kernel, chosen, get(bypass.values, path)["values"], layout)

    return _map_kernels(params, bypass.columns, update, layout)


def make_resident(
    params: Mapping[str, Any], bypass: Bypass, base_entries: Mapping[str, Any], *, layout: Layout = Layout.OI
) -> Tree:
    """The parameters with base + values written over the chosen entries; in place under jit where `params` is donated.

    Unlike `merge` it does not matter what the entries hold at the time: after every optimiser step it overwrites them, and
    so it puts in another adapter with equal columns.
    """

    def update(path: ModulePath, kernel: jax.Array, chosen: jax.Array) -> jax.Array:
        values = get(bypass.values, path)["values"]
        entries = get(base_entries, path)["base_entries"].astype(values.dtype) + values
        return ops.write_entries(kernel, chosen, entries, layout)

    return _map_kernels(params, bypass.columns, update, layout)


def unmerge(
    params: Mapping[str, Any], columns: Mapping[str, Any], base_entries: Mapping[str, Any], *, layout: Layout = Layout.OI
) -> Tree:
    """The original parameters, bit for bit, from merged or resident ones and the base entries that `read` kept."""

    def update(path: ModulePath, kernel: jax.Array, chosen: jax.Array) -> jax.Array:
        return ops.write_entries(kernel, chosen, get(base_entries, path)["base_entries"], layout)

    return _map_kernels(params, columns, update, layout)


def swap(
    params: Mapping[str, Any],
    columns: Mapping[str, Any],
    base_entries: Mapping[str, Any],
    new: Bypass,
    *,
    layout: Layout = Layout.OI,
) -> tuple[Tree, Tree]:
    """Puts an adapter into a live parameter tree, in the place of the one that is in it.

    The entries of the old one are restored first, so that the two may differ in k, targets and columns. Nothing else of the
    kernels is touched: under ``jax.jit(swap, donate_argnums=0)`` it happens in place. `unmerge` takes the last one out.

    Args:
      params: parameters that hold an adapter, merged or resident, or none.
      columns: the columns of the adapter that they hold; {} for none.
      base_entries: the base entries of the adapter that they hold, as `read` or the last swap gave them; {} for none.
      new: the adapter to put in, chosen on the same base.
      layout: where the kernels have their neurons.

    Returns: the parameters, resident with `new`, and the base entries of `new`.

    Raises:
      KeyError: `new` has a path at which the parameters hold no kernel.
    """
    original = unmerge(params, columns, base_entries, layout=layout)
    new_entries = read(original, new.columns, layout=layout)
    return make_resident(original, new, new_entries, layout=layout), new_entries


def average(adapters: Sequence[Bypass], weights: Sequence[float] | None = None) -> Bypass:
    """The weighted mean of adapters with equal columns: values sum_i w_i values_i / sum_i w_i.

    Columns depend on the base alone, so adapters trained with the same k, targets and rule have equal ones. Those of a
    smaller k are among those of a larger one but not equal to them. Columns are compared, so this works outside of jit.

    Args:
      adapters: one or more.
      weights: a number for each, of any scale; None for the plain mean.

    Raises:
      UserError: columns differ (names the module), no adapters, or weights that do not fit them or add up to 0.
    """
    weights = [1.0] * len(adapters) if weights is None else weights
    if not adapters or len(weights) != len(adapters):
        raise UserError(f"average: {len(adapters)} adapters and {len(weights)} weights, expected as many, and at least one")
    total = sum(weights)
    if not total:
        raise UserError("average: the weights add up to 0")
    return _weighted_sum(adapters, [weight / total for weight in weights])


def interpolate(a: Bypass, b: Bypass, t: float) -> Bypass:
    """(1 - t) a + t b, for adapters with equal columns: a at t = 0, b at t = 1, beyond them for other t.

    Raises:
      UserError: columns differ (names the module).
    """
    return _weighted_sum([a, b], [1 - t, t])


def _weighted_sum(adapters: Sequence[Bypass], weights: Sequence[float]) -> Bypass:
    first = adapters[0]
    for other in adapters[1:]:
        _check_equal_columns(first.columns, other.columns)

    def add(*values: jax.Array) -> jax.Array:
        wide = ops.wide_dtype(values[0].dtype)
        total = sum(leaf.astype(wide) * weight for leaf, weight in zip(values, weights, strict=True))
        return jnp.asarray(total, values[0].dtype)

    return first._replace(values=jax.tree.map(add, *(adapter.values for adapter in adapters)))


def _check_equal_columns(first: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    a, b = dict(leaves(first, "columns")), dict(leaves(other, "columns"))
    if missing := sorted(a.keys() ^ b.keys()):
        raise UserError(f"only one of two adapters has columns at {'.'.join(missing[0])}; mixing needs equal columns")
    for path in a:
        name = ".".join(path)
        if a[path].shape != b[path].shape:
            raise UserError(
                f"{name}: one adapter has columns {a[path].shape}, another {b[path].shape} (*L, O, k); mixing needs equal "
                "columns, and those of a smaller k are at best among those of a larger one"
            )
        different = np.any(np.asarray(a[path]) != np.asarray(b[path]), axis=-1)
        if different.any():
            neuron = tuple(int(index) for index in np.argwhere(different)[0])
            raise UserError(
                f"{name}: two adapters have different columns, first at neuron {neuron}: {a[path][neuron].tolist()} and "
                f"{b[path][neuron].tolist()}; mixing needs equal columns, from the same base by the same rule"
            )
