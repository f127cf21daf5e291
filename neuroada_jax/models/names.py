"""Mapping between Hugging Face tensor names and the stacked parameter tree.

A module keeps its Hugging Face path without the layer's number, and a leaf gets Flax's name:

    model.layers.7.self_attn.q_proj.weight   <->   ("model", "layers", "self_attn", "q_proj", "kernel"), layer 7
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from neuroada_jax.core.trees import ModulePath, flatten

_LEAVES_OF_WEIGHT = ("kernel", "scale", "embedding")


class Slot(NamedTuple):
    """Place of a checkpoint tensor in the tree: the path of its (stacked) leaf and its layer, None if it is not stacked."""

    path: ModulePath
    layer: int | None


def module_name(path: ModulePath, layer: int | None, layers_path: ModulePath) -> str:
    """Return a module's Hugging Face path, such as "model.layers.3.mlp.up_proj" for layer 3 of (..., "mlp", "up_proj")."""
    if layer is None:
        return ".".join(path)
    return ".".join((*layers_path, str(layer), *path[len(layers_path) :]))


NO_LAYERS: ModulePath = ("",)  # the layers path of trees without a layer scan


def is_stacked(path: ModulePath, layers_path: ModulePath) -> bool:
    """Return whether a module or leaf belongs to the layer scan at `layers_path`."""
    return path[: len(layers_path)] == layers_path


def within_layer(path: ModulePath, layers_path: ModulePath) -> str:
    """Return a module's path below its layer, such as "self_attn.q_proj"; outside the layers, its complete path."""
    return ".".join(path[len(layers_path) :] if is_stacked(path, layers_path) else path)


def checkpoint_names(params: Mapping[str, Any], layers_path: ModulePath) -> dict[str, Slot]:
    """Return the slot of every tensor that a checkpoint of this (possibly abstract) tree holds, by Hugging Face name.

    Args:
      params: nested dict of arrays or shapes; leaves below `layers_path` have a leading layer axis, or are
        tuples with an array for each layer.
      layers_path: path of the layer scan, such as ("model", "layers").
    """
    names = {}
    for path, leaf in flatten(params):
        *module, name = path
        suffix = "weight" if name in _LEAVES_OF_WEIGHT else name
        layers = range(len(leaf)) if is_stacked(path, layers_path) else [None]
        for layer in layers:
            names[f"{module_name(tuple(module), layer, layers_path)}.{suffix}"] = Slot(path, layer)
    return names


def module_names(path: ModulePath, leaf: Any, layers_path: ModulePath) -> list[str]:
    """Return the Hugging Face module names, in layer order, that a (stacked) leaf of the module at `path` belongs to."""
    layers = range(len(leaf)) if is_stacked(path, layers_path) else [None]
    return [module_name(path, layer, layers_path) for layer in layers]


def unstacked(tree: Mapping[str, Any], layers_path: ModulePath) -> Iterator[tuple[str, Any]]:
    """Yield the (Hugging Face module name, array) pairs of a bypass tree, one per layer, in the tree's order."""
    for path, leaf in flatten(tree):
        module = path[:-1]
        yield from zip(
            module_names(module, leaf, layers_path), leaf if is_stacked(module, layers_path) else [leaf], strict=True
        )
