"""The bypass of a model: its values, its columns, and the operations on parameter trees.

Trees are plain nested dicts that mirror the parameters (docs/design.md). A linear map is a node that holds a `kernel`, or
the kernel itself. Kernels are (*L, O, I), or (*L, I, O) with `Layout.IO`, where *L are the axes of stacked layers, if any.
At the path of its linear map, each tree of a bypass holds

    values        {"values": (*L, O, k)}        trainable, float32, initialised to zero
    columns       {"columns": (*L, O, k)}       int32, static; (*L, 1, k) where all neurons of a map share them
    base_entries  {"base_entries": (*L, O, k)}  the original entries of the kernel at the columns, in its dtype, kept while
                                                the kernel holds base + values (is "resident")

The kernels of a stack may also lie apart: a tuple of L arrays in the place of (L, O, I). The trees above stay stacked.

A kernel may be quantised (core/quantised.py). It is never resident: its codes cannot hold base + values, so that the op
adds the values itself, and a merged kernel has them beside its codes.

Inputs and neurons may span several axes of a kernel, as in the (D, H, N) of Flax's attention. Columns then index the
flattened inputs, and O is the number of flattened neurons.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neuroada_jax.core import quantised, scores, selection
from neuroada_jax.core.entries import Layout, add_entries, read_entries, round_to, wide_dtype, write_entries
from neuroada_jax.core.quantised import QuantisedKernel
from neuroada_jax.core.trees import ModulePath, Tree, get, kernel_at, leaves, put
from neuroada_jax.errors import UserError


class Bypass(NamedTuple):
    """The trainable `values` and the static `columns` of a bypass: two trees with the same paths."""

    values: Tree
    columns: Tree


def build(
    params: Mapping[str, Any],
    paths: Iterable[ModulePath],
    k: int,
    *,
    score: scores.Score = scores.magnitude,
    statistics: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
    layout: Layout = Layout.OI,
    shared: bool = False,
) -> Bypass:
    """Return the initial bypass of the linear maps at `paths`: zero values at the columns with the k largest scores.

    Args:
      params: parameter tree.
      paths: paths of the linear maps, as `trees.kernels` yields them, or of the kernels themselves.
      k: connections per neuron; a map with fewer inputs gets all of them.
      score: kernel (O, I) -> scores of the same shape, or (kernel, statistic) -> scores; see `selection.select`.
      statistics: tree that has at each of the paths the statistic of its map; None where the score takes none.
      dtype: of the values.
      layout: axis order of the kernels.
      shared: one set of columns for all neurons of a map, for kernels (*L, O, I) and (*L, I, O).

    Returns:
      Values (*L, O, min(k, I)) and int32 columns of the same shape, or (*L, 1, min(k, I)) if `shared`.

    Raises:
      ValueError: k < 1.
      KeyError: a path holds no kernel.
      UserError: scores of a wrong shape, or NaN or infinite ones; names the map.
    """
    values: Tree = {}
    columns: Tree = {}
    for path in paths:
        kernel, statistic = kernel_at(params, path), None if statistics is None else get(statistics, path)
        choose = functools.partial(selection.select, k=k, score=score, layout=layout, shared=shared, name=".".join(path))
        if isinstance(kernel, tuple):
            own = [jax.tree.map(lambda leaf, layer=layer: leaf[layer], statistic) for layer in range(len(kernel))]
            chosen = jnp.stack([choose(each, statistic=mine) for each, mine in zip(kernel, own, strict=True)])
            kernel = kernel[0]
        else:
            chosen = choose(kernel, statistic=statistic)
        columns = put(columns, path, {"columns": chosen})
        neurons = kernel.shape[-2 if Layout(layout) is Layout.OI else -1]
        values = put(values, path, {"values": jnp.zeros((*chosen.shape[:-2], neurons, chosen.shape[-1]), dtype)})
    return Bypass(values, columns)


def count(values: Mapping[str, Any]) -> int:
    """Return the number of entries of a tree of arrays or shapes; for values, k times the neurons of all targets."""
    return quantised.size(values)


def _read(kernel: Any, columns: jax.Array, layout: Layout) -> jax.Array:
    if isinstance(kernel, QuantisedKernel):
        return quantised.read_entries(kernel, columns)
    return read_entries(_as_matrices(kernel, columns, layout), columns, layout)


def _as_matrices(kernel: jax.Array, columns: jax.Array, layout: Layout) -> jax.Array:
    """Return the kernel as (*L, O, I) or (*L, I, O), with several axes of inputs or neurons flattened into one."""
    *leading, outputs, _ = columns.shape
    shape = (outputs, -1) if Layout(layout) is Layout.OI else (-1, outputs)
    return kernel if kernel.ndim == columns.ndim else kernel.reshape(*leading, *shape)


def read(params: Mapping[str, Any], columns: Mapping[str, Any], *, layout: Layout = Layout.OI) -> Tree:
    """Return the base entries: those of the kernels at the columns, in the kernels' dtype."""
    base_entries: Tree = {}
    for path, chosen in leaves(columns, "columns"):
        kernel = kernel_at(params, path)
        if isinstance(kernel, tuple):
            found = jnp.stack([_read(each, chosen[at], layout) for at, each in enumerate(kernel)])
        else:
            found = _read(kernel, chosen, layout)
        base_entries = put(base_entries, path, {"base_entries": found})
    return base_entries


def _map_kernels(
    params: Mapping[str, Any],
    columns: Mapping[str, Any],
    entries: Callable[[ModulePath], jax.Array],
    update: Callable[[jax.Array, jax.Array, jax.Array, Layout], jax.Array],
    update_quantised: Callable[[QuantisedKernel, jax.Array, jax.Array], QuantisedKernel],
    layout: Layout,
) -> Tree:
    """Return the parameters with every kernel that has columns updated.

    Args:
      params: parameter tree.
      columns: columns of the kernels to update.
      entries: path -> what is written or added at its columns, in the shape of these.
      update: as `write_entries` and `add_entries`.
      update_quantised: the same for a quantised kernel.
      layout: axis order of the kernels.
    """

    def updated_of(kernel: Any, chosen: jax.Array, new: jax.Array) -> Any:
        if isinstance(kernel, QuantisedKernel):
            return update_quantised(kernel, chosen, new)
        return update(_as_matrices(kernel, chosen, layout), chosen, new, layout).reshape(kernel.shape)

    merged = dict(params)
    for path, chosen in leaves(columns, "columns"):
        kernel, node, new = kernel_at(params, path), get(merged, path), entries(path)
        updated: Any
        if isinstance(kernel, tuple):
            updated = tuple(updated_of(each, chosen[at], new[at]) for at, each in enumerate(kernel))
        else:
            updated = updated_of(kernel, chosen, new)
        merged = put(merged, path, {**node, "kernel": updated} if isinstance(node, Mapping) else updated)
    return merged


def merge(params: Mapping[str, Any], bypass: Bypass, *, layout: Layout = Layout.OI) -> Tree:
    """Return the parameters with every target kernel W replaced by W + D, summed in the values' dtype and rounded once.

    A quantised kernel gets the values beside its codes.

    Raises:
      UserError: a quantised kernel has values of another bypass already; an adapter of low rank.
    """
    _check_has_columns(bypass)

    def add_to_quantised(kernel: QuantisedKernel, chosen: jax.Array, new: jax.Array) -> QuantisedKernel:
        if kernel.values is not None:
            raise UserError("a quantised kernel has the values of a bypass already; unmerge them first")
        return quantised.with_bypass(kernel, chosen, new)

    entries = lambda path: get(bypass.values, path)["values"]  # noqa: E731
    return _map_kernels(params, bypass.columns, entries, add_entries, add_to_quantised, layout)


def with_values(params: Mapping[str, Any], bypass: Bypass) -> Tree:
    """Return resident parameters with the values put beside the codes of quantised kernels; the others have them."""
    keep = lambda kernel, *_: kernel  # noqa: E731
    if not quantised.holds(params):
        return dict(params)
    entries = lambda path: get(bypass.values, path)["values"]  # noqa: E731
    return _map_kernels(params, bypass.columns, entries, keep, quantised.with_bypass, Layout.OI)


def make_resident(
    params: Mapping[str, Any], bypass: Bypass, base_entries: Mapping[str, Any], *, layout: Layout = Layout.OI
) -> Tree:
    """Return the parameters with base + values written over the chosen entries; in place under jit with donation.

    Unlike in `merge`, the previous content of these entries does not matter: the training step calls this after every
    update, and it can replace one adapter with another of equal columns. Quantised kernels are returned as they are.
    """

    def entries(path: ModulePath) -> jax.Array:
        values: jax.Array = get(bypass.values, path)["values"]
        return get(base_entries, path)["base_entries"].astype(values.dtype) + values

    return _map_kernels(params, bypass.columns, entries, write_entries, lambda kernel, *_: kernel, layout)


def unmerge(
    params: Mapping[str, Any], columns: Mapping[str, Any], base_entries: Mapping[str, Any], *, layout: Layout = Layout.OI
) -> Tree:
    """Return the original parameters, bit for bit, from merged or resident ones and the base entries of `read`."""
    entries = lambda path: get(base_entries, path)["base_entries"]  # noqa: E731
    return _map_kernels(
        params, columns, entries, write_entries, lambda kernel, *_: quantised.without_bypass(kernel), layout
    )


def rounded_to_nothing(values: Mapping[str, Any], base_entries: Mapping[str, Any]) -> float:
    """Return the share of the values, from 0 to 1, that leave their weight as it was: base + value rounds to base."""
    pairs = [(leaf, get(base_entries, path)["base_entries"]) for path, leaf in leaves(values, "values")]
    return sum(map(int, _unchanged(pairs))) / count(values)


@jax.jit
def _unchanged(pairs: Sequence[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
    """Return how many values of each (values, base entries) leave their weight as it was."""
    return [jnp.sum(round_to(base.astype(values.dtype) + values, base.dtype) == base) for values, base in pairs]


def swap(
    params: Mapping[str, Any],
    columns: Mapping[str, Any],
    base_entries: Mapping[str, Any],
    new: Bypass,
    *,
    layout: Layout = Layout.OI,
) -> tuple[Tree, Tree]:
    """Replace the adapter in a live parameter tree with another one.

    The entries of the old adapter are restored first, so the two may differ in k, targets and columns. No other entry is
    touched: under ``jax.jit(swap, donate_argnums=0)`` this happens in place. To remove the last adapter, use `unmerge`.

    Args:
      params: parameters with an adapter in them (merged or resident), or without one.
      columns: columns of that adapter; {} for none.
      base_entries: base entries of that adapter, as `read` or the previous swap returned them; {} for none.
      new: the adapter to insert, selected on the same base model.
      layout: axis order of the kernels.

    Returns:
      The parameters, resident with `new`, and the base entries of `new`.

    Raises:
      KeyError: `new` has a path at which the parameters hold no kernel.
      UserError: `new` is of low rank: its product changes all of a kernel.
    """
    _check_has_columns(new)
    original = unmerge(params, columns, base_entries, layout=layout)
    new_entries = read(original, new.columns, layout=layout)
    return with_values(make_resident(original, new, new_entries, layout=layout), new), new_entries


def average(adapters: Sequence[Bypass], weights: Sequence[float] | None = None) -> Bypass:
    """Return the weighted mean of adapters with equal columns: values = sum_i w_i values_i / sum_i w_i.

    Columns selected by magnitude depend on the base model alone: adapters with the same k and targets have equal columns.
    Those of a smaller k are a subset of those of a larger k, not equal to them. The columns are compared by value, so this
    function cannot be traced by jit.

    Args:
      adapters: one or more.
      weights: one number for each, of any scale; None for the plain mean.

    Raises:
      UserError: columns differ (names the module), there are no adapters, or the weights do not match them or sum to 0; an
        adapter of low rank, since the mean of factors is not that of their products.
    """
    weights = [1.0] * len(adapters) if weights is None else weights
    if not adapters or len(weights) != len(adapters):
        raise UserError(
            f"average: expected adapters with a weight each, found {len(adapters)} adapters and {len(weights)} weights"
        )
    total = sum(weights)
    if not total:
        raise UserError("average: the weights sum to 0")
    return _weighted_sum(adapters, [weight / total for weight in weights])


def interpolate(a: Bypass, b: Bypass, t: float) -> Bypass:
    """Return (1 - t) a + t b for adapters with equal columns; t outside of [0, 1] extrapolates.

    Raises:
      UserError: columns differ (names the module).
    """
    return _weighted_sum([a, b], [1 - t, t])


def _weighted_sum(adapters: Sequence[Bypass], weights: Sequence[float]) -> Bypass:
    first = adapters[0]
    for each in adapters:
        _check_has_columns(each)
    for other in adapters[1:]:
        _check_equal_columns(first.columns, other.columns)

    def add(*values: jax.Array) -> jax.Array:
        wide = wide_dtype(values[0].dtype)
        total = sum(leaf.astype(wide) * weight for leaf, weight in zip(values, weights, strict=True))
        return jnp.asarray(total, values[0].dtype)

    return first._replace(values=jax.tree.map(add, *(adapter.values for adapter in adapters)))


def _check_has_columns(bypass: Bypass) -> None:
    """Raise UserError for low-rank factors, which are `core.low_rank`'s."""
    for path, _ in leaves(bypass.values, "lora_a"):
        raise UserError(f"{'.'.join(path)}: has low-rank factors (LoRA) in the place of columns; core.low_rank merges them")


def _check_equal_columns(first: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    a, b = dict(leaves(first, "columns")), dict(leaves(other, "columns"))
    if missing := sorted(a.keys() ^ b.keys()):
        raise UserError(f"{'.'.join(missing[0])}: only one of two adapters has a bypass there; mixing needs equal columns")
    for path in a:
        name = ".".join(path)
        if (a[path].shape[-2] == 1) != (b[path].shape[-2] == 1):
            raise UserError(
                f"{name}: the neurons of one adapter share their columns, those of another have their own ({a[path].shape} "
                f"and {b[path].shape}); mixing needs equal columns"
            )
        if a[path].shape != b[path].shape:
            raise UserError(
                f"{name}: one adapter has columns {a[path].shape}, another {b[path].shape} (*L, O, k); mixing needs equal "
                "columns, and those of a smaller k are only a subset"
            )
        different = np.any(np.asarray(a[path]) != np.asarray(b[path]), axis=-1)
        if different.any():
            neuron = tuple(int(index) for index in np.argwhere(different)[0])
            raise UserError(
                f"{name}: two adapters have different columns, first at neuron {neuron}: {a[path][neuron].tolist()} and "
                f"{b[path][neuron].tolist()}; mixing needs equal columns, selected on the same base model by the same score"
            )
