"""Mapping between Hugging Face tensor names and the stacked parameter tree.

A module keeps its Hugging Face path without the layer's number, and a leaf gets Flax's name:

    model.layers.7.self_attn.q_proj.weight   <->   ("model", "layers", "self_attn", "q_proj", "kernel"), layer 7
    model.layers.7.mlp.experts.3.up_proj.weight   <->   ("model", "layers", "mlp", "experts", "up_proj", "kernel"), 7 and 3
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from neuroada_jax.core.trees import ModulePath, flatten

_LEAVES_OF_WEIGHT = ("kernel", "scale", "embedding")


EXPERTS = "experts"  # the module whose maps are stacked by expert, too: (L, E, O, I)


class Slot(NamedTuple):
    """Place of a checkpoint tensor in the tree.

    Attributes:
      path: of its (stacked) leaf.
      layer: its place among the layers of the leaf, which is the layer's number where all layers have one; None if it is
        not stacked.
      expert: its expert, None if it is not stacked by them.
    """

    path: ModulePath
    layer: int | None
    expert: int | None = None

    @property
    def place(self) -> tuple[int, ...]:
        """The index of the tensor in its leaf."""
        return tuple(each for each in (self.layer, self.expert) if each is not None)

    def of(self, leaf: Any) -> Any:
        """Return the tensor's own part of its leaf, whose layers may lie apart."""
        return functools.reduce(lambda part, at: part[at], self.place, leaf)


def module_name(path: ModulePath, layer: int | None, layers_path: ModulePath, expert: int | None = None) -> str:
    """Return a module's Hugging Face path, such as "model.layers.3.mlp.up_proj" for layer 3 of (..., "mlp", "up_proj")."""
    own = path if layer is None else (*layers_path, str(layer), *path[len(layers_path) :])
    if expert is not None:
        at = own.index(EXPERTS) + 1
        own = (*own[:at], str(expert), *own[at:])
    return ".".join(own)


NO_LAYERS: ModulePath = ("",)  # the layers path of trees without a layer scan


def is_stacked(path: ModulePath, layers_path: ModulePath) -> bool:
    """Return whether a module or leaf belongs to the layer scan at `layers_path`."""
    return path[: len(layers_path)] == layers_path


def is_router(params: Mapping[str, Any], path: ModulePath) -> bool:
    """Return whether a linear map chooses the experts that lie beside it."""
    return EXPERTS not in path and EXPERTS in functools.reduce(lambda node, key: node[key], path[:-1], params)


def within_layer(path: ModulePath, layers_path: ModulePath) -> str:
    """Return a module's path below its layer, such as "self_attn.q_proj"; outside the layers, its complete path."""
    return ".".join(path[len(layers_path) :] if is_stacked(path, layers_path) else path)


def checkpoint_names(params: Mapping[str, Any], layers_path: ModulePath) -> dict[str, Slot]:
    """Return the slot of every tensor that a checkpoint of this (possibly abstract) tree holds, by Hugging Face name.

    Args:
      params: nested dict of arrays or shapes; leaves below `layers_path` have a leading layer axis, or are
        tuples with an array for each layer. A leaf with fewer entries than the others belongs to the last layers.
      layers_path: path of the layer scan, such as ("model", "layers").
    """
    names = {}
    depth = max((len(leaf) for path, leaf in flatten(params) if is_stacked(path, layers_path)), default=0)
    for path, leaf in flatten(params):
        *module, name = path
        suffix = "weight" if name in _LEAVES_OF_WEIGHT else name
        for layer, expert in _places(path, leaf, layers_path):
            number = None if layer is None else layer + depth - len(leaf)
            own = module_name(tuple(module), number, layers_path, expert)
            names[f"{own}.{suffix}"] = Slot(path, layer, expert)
    return names


def _places(path: ModulePath, leaf: Any, layers_path: ModulePath) -> Iterator[tuple[int | None, int | None]]:
    """Yield the (layer, expert) of every part of a leaf, in their order; None where it is not stacked by them."""
    stacked = is_stacked(path, layers_path)
    layers = range(len(leaf)) if stacked else [None]
    experts: Iterable[int | None] = [None]
    if stacked and EXPERTS in path[len(layers_path) :]:
        experts = range(leaf[0].shape[0] if isinstance(leaf, tuple) else leaf.shape[1])
    yield from itertools.product(layers, experts)


def module_names(path: ModulePath, leaf: Any, layers_path: ModulePath) -> list[str]:
    """Return the Hugging Face module names of a (stacked) leaf of the module at `path`, by layer and expert."""
    return [module_name(path, layer, layers_path, expert) for layer, expert in _places(path, leaf, layers_path)]


def unstacked(tree: Mapping[str, Any], layers_path: ModulePath) -> Iterator[tuple[str, Any]]:
    """Yield the (Hugging Face module name, array) pairs of a bypass tree, one per layer, in the tree's order."""
    for path, leaf in flatten(tree):
        module = path[:-1]
        for layer, expert in _places(module, leaf, layers_path):
            yield module_name(module, layer, layers_path, expert), Slot(module, layer, expert).of(leaf)
