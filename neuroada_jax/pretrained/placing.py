"""From a checkpoint into the buffers of a parameter tree, one tensor at a time: read, quantised on the way, written."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from neuroada_jax import models
from neuroada_jax.core import quantised
from neuroada_jax.core.trees import ModulePath
from neuroada_jax.models import names
from neuroada_jax.pretrained import quantization, tensor_checks

OnKernel = Callable[[ModulePath, int | None, np.ndarray], None]


@functools.partial(jax.jit, donate_argnums=0)
def _write_part(buffer: Any, tensor: Any, place: tuple[jax.Array, ...]) -> Any:
    """Return stacked arrays with one layer, or one expert of a layer, replaced: of a kernel, or of a quantised kernel."""

    def write(stack: jax.Array, new: jax.Array) -> jax.Array:
        start = (*place, *(jnp.zeros_like(place[0]) for _ in new.shape))
        return lax.dynamic_update_slice(stack, jnp.expand_dims(new.astype(stack.dtype), range(len(place))), start)

    return jax.tree.map(write, buffer, tensor)


def read(
    model: models.Model, tensors: Any, name: str, slot: names.Slot, form: str | None, on_kernel: OnKernel | None
) -> tuple[Any, str]:
    """Return a tensor, or the arrays of a quantised one, and its digest."""
    raw = tensors.raw(name)  # read once
    if form is not None and quantization.is_stored(model):
        parts = tensors.packed(name, raw)
        for scales in parts.values():
            if np.issubdtype(scales.dtype, np.floating):
                tensor_checks.check_finite(name, scales)
        return parts, quantization.digest(raw)
    tensor = tensors.read(name, raw)
    tensor_checks.check_finite(name, tensor)
    if form is None:
        return tensor, quantization.digest(raw)
    del raw
    if on_kernel:
        on_kernel(slot.path[:-1], slot.layer, tensor)
    parts = quantization.make(tensor, form)
    return parts, quantization.digest(parts)


def place(filled: dict[tuple[str, ...], Any], slot: names.Slot, held: Any, sharding: Any, tensor: Any) -> None:
    """Put a tensor, or a quantised kernel, into its place of the tree; `held` has the shapes of its leaf."""
    apart = isinstance(held, tuple)
    like = held[slot.layer or 0] if apart else held
    shapes, structure = jax.tree.flatten(like)
    where = jax.tree.leaves(sharding) if quantised.is_quantised(sharding) else [sharding] * len(shapes)
    if apart and slot.expert is not None:
        _place_expert(filled, slot, (structure, shapes, where), tensor)
    elif slot.layer is None or apart:
        parts = zip(jax.tree.leaves(tensor), shapes, where, strict=True)
        placed = [jax.device_put(jnp.asarray(part).astype(shape.dtype), device) for part, shape, device in parts]
        own = jax.tree.unflatten(structure, placed)
        filled[slot.path] = (*filled.get(slot.path, ()), own) if apart else own
    else:
        if slot.path not in filled:
            filled[slot.path] = jax.tree.unflatten(structure, _zeros(shapes, where))
        filled[slot.path] = _written(filled[slot.path], tensor, slot.place)


def _place_expert(
    filled: dict[tuple[str, ...], Any], slot: names.Slot, like: tuple[Any, list[Any], list[Any]], tensor: Any
) -> None:
    """Put the kernel of an expert into its place of a layer that lies apart; `like` is the structure of the layer's leaf.

    Layers come in their order, and so do the experts of each.
    """
    layers = filled.get(slot.path, ())
    if slot.expert == 0:
        structure, shapes, where = like
        layers = (*layers, jax.tree.unflatten(structure, _zeros(shapes, where)))
    assert slot.expert is not None
    filled[slot.path] = (*layers[:-1], _written(layers[-1], tensor, (slot.expert,)))


def _zeros(shapes: list[Any], where: list[Any]) -> list[jax.Array]:
    return [jnp.zeros(shape.shape, shape.dtype, device=device) for shape, device in zip(shapes, where, strict=True)]


def _written(buffer: Any, tensor: Any, place: tuple[int, ...]) -> Any:
    written = _write_part(buffer, jax.tree.map(np.asarray, tensor), tuple(map(np.int32, place)))
    return jax.block_until_ready(written)  # without it tensors queue up in host memory
