"""Dense modules, such as a classifier, that train with all their parameters: splitting, joining, Hugging Face names."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from neuroada_jax.core import trees
from neuroada_jax.core.trees import ModulePath, Tree
from neuroada_jax.models import names


def split(params: Mapping[str, Any], modules: Iterable[ModulePath]) -> tuple[Tree, Tree]:
    """Split the parameters into (those outside the modules, those of the modules), two disjoint nested dicts.

    Raises:
      KeyError: a module that does not exist.
    """
    rest, dense = dict(params), dict[str, Any]()
    for path in modules:
        dense = trees.put(dense, path, trees.get(params, path))
        rest = _without(rest, path)
    return rest, dense


def _without(tree: Mapping[str, Any], path: ModulePath) -> Tree:
    kept = {key: node for key, node in tree.items() if key != path[0]}
    return kept if len(path) == 1 else {**kept, path[0]: _without(tree[path[0]], path[1:])}


def join(params: Mapping[str, Any], dense: Mapping[str, Any]) -> Tree:
    """Return the parameters with the leaves of the dense modules put in, in the dtype of the parameters."""
    if not dense:
        return dict(params)
    dtype = jax.tree.leaves(params)[0].dtype
    return trees.unflatten(
        {**dict(trees.flatten(params)), **{path: leaf.astype(dtype) for path, leaf in trees.flatten(dense)}}
    )


def to_names(dense: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of the dense modules by Hugging Face parameter name."""
    leaves = dict(trees.flatten(dense))
    return {name: leaves[slot.path] for name, slot in names.checkpoint_names(dense, names.NO_LAYERS).items()}
