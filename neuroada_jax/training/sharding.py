"""Placement of arrays under automatic partitioning: weights, values and moments are split by neuron."""

import fnmatch
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from neuroada_jax.core import quantised
from neuroada_jax.core.trees import Tree

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
EXAMPLE_AXES = (DATA, FSDP)  # the mesh axes that split a batch by example
NEURON_AXES = (TENSOR, FSDP)  # the mesh axes that split weights by neuron; in this order an all-gather over fsdp leaves
# each device of the tensor axis with one contiguous block of neurons

# The first pattern that matches an array's path in the train state gives the spec of its trailing axes. The leading axis of
# stacked layers is never split. Norms are small and stay replicated.
RULES = (
    ("*[nN]orm*", PartitionSpec()),
    ("*/kernel", PartitionSpec(NEURON_AXES, None)),
    ("*/kernel/*parts/*", PartitionSpec(NEURON_AXES, None)),  # codes and scales of a quantised kernel
    ("*/embedding/*parts/*", PartitionSpec(NEURON_AXES, None)),
    ("*/embedding", PartitionSpec(NEURON_AXES, None)),
    ("*/bias", PartitionSpec(NEURON_AXES)),
    ("*/values", PartitionSpec(NEURON_AXES, None)),
    ("*/lora_b", PartitionSpec(NEURON_AXES, None)),
    ("*/columns", PartitionSpec(NEURON_AXES, None)),
    ("*/trained", PartitionSpec(NEURON_AXES, None)),
    ("*/base_entries", PartitionSpec(NEURON_AXES, None)),
    ("*/by_neuron", PartitionSpec(NEURON_AXES, None)),
    ("*/finite", PartitionSpec(NEURON_AXES)),
    ("*", PartitionSpec()),
)


def shardings(tree: Any, mesh: Mesh, axes: tuple[str, ...] = NEURON_AXES) -> Any:
    """Return the sharding of every leaf of a tree of arrays or shapes, with neurons split over `axes`.

    A number of neurons that the axes do not divide is split over one of them, or stays replicated.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: sharding_at(path, leaf, mesh, axes), tree)


def sharding_at(path: Any, leaf: Any, mesh: Mesh, axes: tuple[str, ...] = NEURON_AXES) -> NamedSharding:
    """Return the sharding of one leaf; arguments as in `shardings`, with the leaf's path as JAX gives it."""
    spec = rule(path)
    if NEURON_AXES not in spec or not leaf.ndim:
        return NamedSharding(mesh, PartitionSpec())
    first = leaf.ndim - len(spec)
    neurons = leaf.shape[first + spec.index(NEURON_AXES)]
    for chosen in (axes, *((axis,) for axis in axes), ()):
        if neurons % math.prod(mesh.shape[axis] for axis in chosen) == 0:
            break
    return NamedSharding(mesh, PartitionSpec(*(None,) * first, *(chosen if axis else None for axis in spec)))


def rule(path: Any) -> PartitionSpec:
    """Return the spec that `RULES` gives to the trailing axes of the array at a path."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return next(spec for pattern, spec in RULES if fnmatch.fnmatchcase(f"/{name}", pattern))


def mesh_of_process(mesh: Mesh) -> Mesh:
    """Return the mesh of those devices that belong to this process, all of them along the axis of data."""
    if jax.process_count() == 1:
        return mesh
    here = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return Mesh(np.array(here).reshape(-1, 1, 1), mesh.axis_names, axis_types=(AxisType.Auto,) * 3)


def across_processes(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Return a global array: each process copies its devices' shards from a host array that is right at least there."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf if leaf.sharding.is_equivalent_to(sharding, leaf.ndim) else jax.device_put(leaf, sharding)
    here = np.asarray(leaf)
    return jax.make_array_from_callback(here.shape, sharding, lambda index: here[index])


@functools.cache  # otherwise every call would compile
def complete_on(mesh: Mesh) -> Callable[[Any], Any]:
    """Return the jitted function that gives every device of a mesh all of a tree."""
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


def on_first_process(params: Tree, mesh: Mesh) -> Tree:
    """Return parameters that processes share on the first one's host, with the layers apart; the others get none of them.

    All processes have to call it. No device holds more than a layer of one kernel besides its own part.
    """
    replicated, is_first = NamedSharding(mesh, PartitionSpec()), jax.process_index() == 0
    of_layer = lambda leaf, at: lax.dynamic_index_in_dim(leaf, at, keepdims=False)  # noqa: E731
    one = jax.jit(lambda node, at: jax.tree.map(lambda leaf: of_layer(leaf, at), node), out_shardings=replicated)

    def gather(node: Any) -> Any:
        stacked = node.ndim > 2
        parts = (one(node, np.int32(at)) for at in range(len(node))) if stacked else (complete_on(mesh)(node),)
        here = tuple(jax.tree.map(np.asarray, part) if is_first else None for part in parts)
        return here if stacked else here[0]

    gathered: Tree = jax.tree.map(gather, params, is_leaf=quantised.is_quantised)
    return gathered if is_first else {}


def pad(batch: Any, size: int) -> Any:
    """Return the batch with `size` examples; the new ones have length and label mask 0 and add 0 to every sum."""

    def padded(leaf: np.ndarray) -> np.ndarray:
        missing = size - leaf.shape[0]
        return np.pad(leaf, ((0, missing),) + ((0, 0),) * (leaf.ndim - 1)) if missing else leaf

    return jax.tree.map(padded, batch)
