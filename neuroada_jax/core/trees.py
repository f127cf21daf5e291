"""Nested dicts of arrays: paths into them, and the leaves and kernels that they hold."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax

from neuroada_jax.errors import UserError

Tree = dict[str, Any]
ModulePath = tuple[str, ...]
Targets = Sequence[str] | Callable[[str], bool] | None


def get(tree: Mapping[str, Any], path: ModulePath) -> Any:
    """The node at `path`."""
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Mapping[str, Any], path: ModulePath, node: Any) -> Tree:
    """A copy of `tree` (shared but for the nodes on the way) with `node` at `path`."""
    if not path:
        return node
    key, *rest = path
    return {**tree, key: put(tree.get(key, {}), tuple(rest), node) if rest else node}


def flatten(tree: Mapping[str, Any], prefix: ModulePath = ()) -> Iterator[tuple[ModulePath, Any]]:
    """The (path, leaf) pairs of a nested dict in its order."""
    for key, node in tree.items():
        if isinstance(node, Mapping):
            yield from flatten(node, (*prefix, key))
        else:
            yield (*prefix, key), node


def unflatten(leaves: Mapping[ModulePath, Any]) -> dict[str, Any]:
    """The nested dict of the leaves at their paths; what `flatten` takes apart."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def leaves(tree: Mapping[str, Any], leaf: str, prefix: ModulePath = ()) -> Iterator[tuple[ModulePath, Any]]:
    """The (module path, array) of every node that holds `leaf` ("values", "columns" or "base")."""
    for key, node in tree.items():
        if key == leaf:
            yield prefix, node
        elif isinstance(node, Mapping):
            yield from leaves(node, leaf, (*prefix, key))


def kernels(params: Mapping[str, Any], prefix: ModulePath = ()) -> Iterator[tuple[ModulePath, Any]]:
    """The (path, kernel) of every node that holds a `kernel`, in the tree's order."""
    for key, node in params.items():
        if isinstance(node, Mapping):
            if "kernel" in node:
                yield (*prefix, key), node["kernel"]
            yield from kernels(node, (*prefix, key))


def kernel_at(params: Mapping[str, Any], path: ModulePath) -> Any:
    """The kernel of the linear map at `path`.

    Raises:
      KeyError: there is none.
    """
    node: Any = params
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    kernel = node.get("kernel") if isinstance(node, Mapping) else node
    if kernel is None or kernel.ndim < 2:
        raise KeyError(f"{'.'.join(path)} holds no kernel")
    return kernel


def path_of(keys: Sequence[Any]) -> ModulePath:
    """The path that JAX gives as keys: names of attributes and of entries, indices of lists."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def to_nested(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Tree:
    """Any pytree as nested dicts: a list's entries and a module's attributes become keys, as in layers -> 0 -> weight."""
    return unflatten({path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)})


def from_nested(tree: Any, nested: Mapping[str, Any], is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """The pytree with the leaves of nested dicts that `to_nested` made of it, or of one like it."""
    return jax.tree_util.tree_map_with_path(lambda keys, _: get(nested, path_of(keys)), tree, is_leaf=is_leaf)


def matching(modules: Collection[str], targets: Targets) -> list[str]:
    """The linear maps that `targets` select, in the order of `modules`.

    Args:
      modules: the dotted paths of all linear maps.
      targets: exact paths or, where no module has that path, the last component of one, never a substring; or a predicate
        of the path, or None for all of them.

    Raises:
      UserError: a target, or the predicate, that selects nothing (lists what exists).
    """
    if targets is None:
        return list(modules)
    if callable(targets):
        chosen = set(filter(targets, modules))
        if not chosen:
            raise UserError(f"bypass.targets: the predicate selects no linear map; this model has {', '.join(modules)}")
        return [name for name in modules if name in chosen]
    chosen = set()
    for target in targets:
        matches = [target] if target in modules else [name for name in modules if name.rpartition(".")[2] == target]
        if not matches:
            raise UserError(f"bypass.targets: {target!r} matches no linear map; this model has {', '.join(modules)}")
        chosen.update(matches)
    return [name for name in modules if name in chosen]
