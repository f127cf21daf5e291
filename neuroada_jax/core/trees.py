"""Nested dicts of arrays: access by path, iteration over leaves and kernels, conversion from other pytrees."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from neuroada_jax.errors import UserError

Tree = dict[str, Any]
ModulePath = tuple[str, ...]
Targets = Sequence[str] | Callable[[str], bool] | None


def get(tree: Mapping[str, Any], path: ModulePath) -> Any:
    """Return the node at `path`."""
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Mapping[str, Any], path: ModulePath, node: Any) -> Tree:
    """Return a copy of `tree` with `node` at `path`; all nodes off the path are shared with `tree`."""
    if not path:
        return node
    key, *rest = path
    return {**tree, key: put(tree.get(key, {}), tuple(rest), node) if rest else node}


def flatten(tree: Mapping[str, Any], prefix: ModulePath = ()) -> Iterator[tuple[ModulePath, Any]]:
    """Yield the (path, leaf) pairs of a nested dict in its order."""
    for key, node in tree.items():
        if isinstance(node, Mapping):
            yield from flatten(node, (*prefix, key))
        else:
            yield (*prefix, key), node


def unflatten(leaves: Mapping[ModulePath, Any]) -> dict[str, Any]:
    """Return the nested dict with these leaves at these paths, the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def leaves(tree: Mapping[str, Any], leaf: str, prefix: ModulePath = ()) -> Iterator[tuple[ModulePath, Any]]:
    """Yield the (module path, array) of every node that holds the key `leaf`, such as "values" or "columns"."""
    for key, node in tree.items():
        if key == leaf:
            yield prefix, node
        elif isinstance(node, Mapping):
            yield from leaves(node, leaf, (*prefix, key))


def on_host(array: jax.Array) -> np.ndarray:
    """Return an array as NumPy has it; of one that several processes share, all of them have to ask for it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def kernels(params: Mapping[str, Any], prefix: ModulePath = ()) -> Iterator[tuple[ModulePath, Any]]:
    """Yield the (module path, kernel) of every node that holds a `kernel`, in the tree's order."""
    for key, node in params.items():
        if isinstance(node, Mapping):
            if "kernel" in node:
                yield (*prefix, key), node["kernel"]
            yield from kernels(node, (*prefix, key))


def kernel_at(params: Mapping[str, Any], path: ModulePath) -> Any:
    """Return the kernel of the linear map at `path`: the node's `kernel`, or the node itself if it is an array.

    The kernel of a stack whose layers lie apart is a tuple of arrays.

    Raises:
      KeyError: there is none, or it has fewer than two axes.
    """
    node: Any = params
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    kernel = node.get("kernel") if isinstance(node, Mapping) else node
    if kernel is None or (kernel[0] if isinstance(kernel, tuple) and kernel else kernel).ndim < 2:
        raise KeyError(f"{'.'.join(path)} holds no kernel")
    return kernel


def path_of(keys: Sequence[Any]) -> ModulePath:
    """Return JAX's key path as strings: names of attributes and dict entries, indices of lists."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def to_nested(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Tree:
    """Return any pytree as nested dicts: list indices and attribute names become keys, as in layers -> 0 -> weight."""
    return unflatten({path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)})


def from_nested(tree: Any, nested: Mapping[str, Any], is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Return a pytree of the structure of `tree` with the leaves of `nested`, the inverse of `to_nested`."""
    return jax.tree_util.tree_map_with_path(lambda keys, _: get(nested, path_of(keys)), tree, is_leaf=is_leaf)


def matching(modules: Collection[str], targets: Targets, field: str = "bypass.targets") -> list[str]:
    """Return the linear maps that `targets` select, in the order of `modules`.

    Args:
      modules: dotted paths of all linear maps.
      targets: exact paths or, where no module has that path, last components of paths (never substrings); or a predicate
        of the path; or None for all linear maps.
      field: what `targets` were given as, for messages.

    Raises:
      UserError: a target or the predicate selects nothing (lists the linear maps).
    """
    if targets is None:
        return list(modules)
    if callable(targets):
        chosen = set(filter(targets, modules))
        if not chosen:
            raise UserError(f"{field}: the predicate selects no linear map; this model has {', '.join(modules)}")
        return [name for name in modules if name in chosen]
    chosen = set()
    for target in targets:
        matches = [target] if target in modules else [name for name in modules if name.rpartition(".")[2] == target]
        if not matches:
            raise UserError(f"{field}: {target!r} matches no linear map; this model has {', '.join(modules)}")
        chosen.update(matches)
    return [name for name in modules if name in chosen]
