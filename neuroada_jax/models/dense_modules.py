"""Heads: the modules that train whole, out of the parameter tree and back in, and their Hugging Face names."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from neuroada_jax.core import trees
from neuroada_jax.core.trees import ModulePath, Tree
from neuroada_jax.models import names


def split(params: Mapping[str, Any], modules: Iterable[ModulePath]) -> tuple[Tree, Tree]:
    """(the parameters without the modules, the modules alone); both are nested dicts, and nothing is in both.

    Raises:
      KeyError: a module that is not there.
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
    """The parameters with the head's leaves put in, in the dtype of the parameters."""
    if not dense:
        return dict(params)
    dtype = jax.tree.leaves(params)[0].dtype
    return trees.unflatten(
        {**dict(trees.flatten(params)), **{path: leaf.astype(dtype) for path, leaf in trees.flatten(dense)}}
    )


def to_names(dense: Mapping[str, Any]) -> dict[str, Any]:
    """The head's leaves by Hugging Face parameter name."""
    leaves = dict(trees.flatten(dense))
    return {name: leaves[slot.path] for name, slot in names.checkpoint_names(dense, names.NO_LAYERS).items()}
