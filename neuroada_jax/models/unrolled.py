"""Layers one by one: the form of a model whose layers do not share stacked arrays.

A scan over stacked layers slices every kernel out of its stack before the product reads it, forward and backward: on a GPU
a copy of all weights in each pass. A slice at a fixed place is a copy too wherever XLA calls cuBLAS. So on a GPU the layers
of a model that trains lie apart: in the place of a stacked leaf (L, ...) its tree holds a tuple of L arrays, and the model
applies one layer after the other. Everything else (values, columns, moments, files) stays stacked.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from jax import lax

from neuroada_jax.core import platform, quantised, trees
from neuroada_jax.core.trees import ModulePath, Tree
from neuroada_jax.models.remat import BYPASS_COLLECTIONS

# Compile time grows with the layers that are unrolled (docs/performance.md); a deeper model keeps the scan.
DEEPEST = 48


def preferred(depth: int) -> bool:
    """Return whether a model of so many layers should run without the scan on the platform that is traced for.

    A CPU keeps the scan: XLA's CPU backend merges a recomputation outside of a loop with the forward pass, whatever the
    remat policy says, and compile time is most of a short run there.
    """
    return platform.name() == "gpu" and depth <= DEEPEST


def apart(params: Mapping[str, Any], layers_path: ModulePath) -> Tree:
    """Return the parameters with the layers apart where that is preferred; the stacked arrays are deleted one by one.

    Args:
      params: with stacked layers, arrays or shapes.
      layers_path: the path of the layers.
    """
    stack = trees.get(params, layers_path)
    if is_apart(stack) or not preferred(max(map(len, jax.tree.leaves(stack)))):
        return dict(params)

    def take(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return tuple(jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for _ in range(leaf.shape[0]))
        layers = jax.block_until_ready(_split(leaf))
        leaf.delete()
        return layers

    def take_all(node: Any) -> Any:
        if not quantised.is_quantised(node):
            return take(node)
        return tuple(layers_of(jax.tree.map(take, node), len(node)))

    return trees.put(params, layers_path, jax.tree.map(take_all, stack, is_leaf=quantised.is_quantised))


def stacked(params: Mapping[str, Any]) -> Tree:
    """Return the parameters with stacked layers, the inverse of `apart`; arrays that lie apart are deleted."""

    def join(node: Any) -> Any:
        if not isinstance(node, tuple):
            return node
        stack = jax.block_until_ready(_stack(node))
        for leaf in jax.tree.leaves(node):
            leaf.delete()
        return stack

    return jax.tree.map(join, dict(params), is_leaf=_is_tuple)


def layers_of(tree: Any, depth: int) -> list[Any]:
    """Return the tree of each layer of a tree whose leaves are stacked or, as tuples, apart.

    Of a leaf that only the last layers have, the others get that of the first one that has it.
    """
    nodes, structure = jax.tree.flatten(tree, is_leaf=_is_tuple)
    each = [node if isinstance(node, tuple) else _split(node) for node in nodes]
    return [
        jax.tree.unflatten(structure, [layers[max(at - depth + len(layers), 0)] for layers in each]) for at in range(depth)
    ]


def variables_of_layers(module: nn.Module, name: str, depth: int) -> list[dict[str, Any]] | None:
    """Return the variables of each layer of a bound module's layers `name`; None where they are stacked, for a scan."""
    own: dict[str, Any] = {
        kind: module.get_variable(kind, name) for kind in ("params", *BYPASS_COLLECTIONS) if module.has_variable(kind, name)
    }
    return layers_of(own, depth) if is_apart(own) else None


def is_apart(params: Any) -> bool:
    """Return whether a tree of parameters holds layers that lie apart."""
    return any(map(_is_tuple, jax.tree.leaves(params, is_leaf=_is_tuple)))


def _is_tuple(node: Any) -> bool:
    return isinstance(node, tuple)


@jax.jit
def _split(stack: jax.Array) -> tuple[jax.Array, ...]:
    # By `split`, whose gradient is one concatenation; that of L slices would be L padded arrays and their sum.
    return tuple(layer[0] for layer in lax.split(stack, (1,) * stack.shape[0]))


@jax.jit
def _stack(layers: tuple[Any, ...]) -> Any:
    return jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *layers)
