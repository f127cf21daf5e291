"""The Bypass tree: which linear maps carry a bypass, its values, its columns, merging and exact unmerging.

Trees are plain nested dicts that mirror the parameters (docs/design.md). A linear map is a node that holds a
`kernel` (*L, O, I), L being the stacked layers if there are any. At the same path the bypass trees hold

    values   {"values":  (*L, O, k)}   trainable, float32, zero at the start
    columns  {"columns": (*L, O, k)}   int32, static
    base     {"base":    (*L, O, k)}   the kernel's own entries at the columns, kept while the kernel is resident

Arrays in, arrays out: nothing here knows Flax, files or models.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from neuroada_jax import ops, selection

Tree = dict[str, Any]
Path = tuple[str, ...]


class Bypass(NamedTuple):
    """The two trees of a bypass: trainable `values` and static `columns`, at the same paths."""

    values: Tree
    columns: Tree


def kernels(params: Mapping[str, Any], prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The (path, kernel) of every linear map of a parameter tree, in the tree's order."""
    for key, node in params.items():
        if isinstance(node, Mapping):
            if "kernel" in node:
                yield (*prefix, key), node["kernel"]
            yield from kernels(node, (*prefix, key))


def get(tree: Mapping[str, Any], path: Path) -> Any:
    """The node at `path`."""
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Mapping[str, Any], path: Path, node: Any) -> Tree:
    """A copy of `tree` (shared but for the nodes on the way) with `node` at `path`."""
    if not path:
        return node
    return {**tree, path[0]: put(tree.get(path[0], {}), path[1:], node)}


def leaves(tree: Mapping[str, Any], leaf: str, prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The (module path, array) of every node that holds `leaf` ("values", "columns" or "base")."""
    for key, node in tree.items():
        if key == leaf:
            yield prefix, node
        elif isinstance(node, Mapping):
            yield from leaves(node, leaf, (*prefix, key))


def build(
    params: Mapping[str, Any],
    paths: Iterable[Path],
    k: int,
    *,
    score: Callable[[jax.Array], jax.Array] = selection.magnitude,
    dtype: Any = jnp.float32,
) -> Bypass:
    """Zero values and selected columns for the linear maps at `paths`.

    Args:
      params: parameter tree with kernels (*L, O, I).
      paths: module paths, as `kernels` yields them.
      k: connections per neuron; a map with fewer inputs gets all of them.
      score: elementwise, kernel -> scores of the same shape.
      dtype: of the values.

    Returns: values (*L, O, min(k, I)) and int32 columns of the same shape.

    Raises:
      ValueError: k < 1.
      KeyError: a path that holds no kernel.
    """
    values: Tree = {}
    columns: Tree = {}
    for path in paths:
        chosen = selection.select(get(params, path)["kernel"], k, score)
        columns = put(columns, path, {"columns": chosen})
        values = put(values, path, {"values": jnp.zeros(chosen.shape, dtype)})
    return Bypass(values, columns)


def count(values: Mapping[str, Any]) -> int:
    """The entries of a tree; for values, k times the neurons of the targets. Abstract arrays will do."""
    return sum(leaf.size for leaf in jax.tree.leaves(values))


def read(params: Mapping[str, Any], columns: Mapping[str, Any]) -> Tree:
    """The base tree: the kernels' entries at the columns, in the kernels' dtype."""
    base: Tree = {}
    for path, chosen in leaves(columns, "columns"):
        base = put(base, path, {"base": ops.read_entries(get(params, path)["kernel"], chosen)})
    return base


def _map_kernels(
    params: Mapping[str, Any], columns: Mapping[str, Any], update: Callable[[Path, jax.Array, jax.Array], jax.Array]
) -> Tree:
    merged = dict(params)
    for path, chosen in leaves(columns, "columns"):
        node = get(params, path)
        merged = put(merged, path, {**node, "kernel": update(path, node["kernel"], chosen)})
    return merged


def merge(params: Mapping[str, Any], bypass: Bypass) -> Tree:
    """The parameters with every target kernel replaced by W + D, summed in the values' dtype and rounded once to W's."""
    return _map_kernels(
        params,
        bypass.columns,
        lambda path, kernel, chosen: ops.add_entries(kernel, chosen, get(bypass.values, path)["values"]),
    )


def make_resident(params: Mapping[str, Any], bypass: Bypass, base: Mapping[str, Any]) -> Tree:
    """The parameters with base + values written over the chosen entries; in place under jit where `params` is donated.

    Unlike `merge` it does not matter what the entries hold at the time: after every optimiser step it overwrites them.
    """

    def update(path: Path, kernel: jax.Array, chosen: jax.Array) -> jax.Array:
        values = get(bypass.values, path)["values"]
        entries = get(base, path)["base"].astype(values.dtype) + values
        return ops.write_entries(kernel, chosen, entries)

    return _map_kernels(params, bypass.columns, update)


def unmerge(params: Mapping[str, Any], columns: Mapping[str, Any], base: Mapping[str, Any]) -> Tree:
    """The original parameters, bit for bit, from merged or resident ones and the base entries that `read` kept."""
    return _map_kernels(
        params,
        columns,
        lambda path, kernel, chosen: ops.write_entries(kernel, chosen, get(base, path)["base"]),
    )
