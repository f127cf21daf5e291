"""Bypass layers in any Flax NNX model that uses `nnx.Linear` or `nnx.LinearGeneral`, with no change to the model.

    model = na.nnx.attach(model, na.nnx.build(model, targets=["query", "value"], k=1))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=na.nnx.BypassValue)
    value, gradient = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, na.nnx.BypassValue))(model, x)
    plain, trained = na.nnx.detach(model)
    merged = na.nnx.merge(plain, trained)

Kernels stay as Flax has them, inputs first: (I, O) in `nnx.Linear`, (D, H, N) and (H, N, D) in `nnx.MultiHeadAttention`,
the axis of layers that `nnx.vmap` stacked in front. Values and columns are (*L, O, k), several axes of inputs or neurons
flattened. Both have Variable types of their own, so `nnx.Param` means the same parameters as before.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from neuroada_jax import linen
from neuroada_jax.core import bypass as core
from neuroada_jax.core import trees
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.core.entries import Layout
from neuroada_jax.core.scores import Score, magnitude
from neuroada_jax.core.trees import ModulePath, Targets, Tree
from neuroada_jax.errors import UserError


class BypassValue(nnx.Variable):
    """The trainable values of a layer, (*L, O, k)."""


class BypassColumns(nnx.Variable):
    """The columns of a layer, int32 (*L, O, k)."""


class BypassDotGeneral(nnx.Module):
    """Replacement of `lax.dot_general` in a layer with a bypass; bias, dtypes and axes stay the layer's own."""

    def __init__(self, name: str, columns: jax.Array, values: jax.Array):
        self.name = name
        self.columns = BypassColumns(columns)
        self.values = BypassValue(values)

    def __call__(
        self, x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any = None, out_sharding: Any = None
    ) -> jax.Array:
        """Compute x (W + D), differentiable in x and the values only."""
        if out_sharding is not None:
            raise UserError(f"{self.name}: a layer with a bypass cannot take out_sharding, found {out_sharding}")
        columns, values = self.columns.get_value(), self.values.get_value()
        return linen.bypass_dot_general(x, kernel, dimension_numbers, precision, columns=columns, values=values)


@dataclasses.dataclass(frozen=True)
class _PromoteAllButTheKernel:
    """Casts the arrays of a layer as it does, except the kernel: W + D is rounded to its own dtype first, as in `merge`."""

    promote: Callable[..., Any]

    def __call__(self, arrays: Any, **options: Any) -> Any:
        x, _, bias = self.promote(arrays, **options)
        return x, arrays[1], bias


def build(
    model: nnx.Module,
    *,
    targets: Targets = None,
    k: int,
    score: Score = magnitude,
    dtype: Any = jnp.float32,
) -> Bypass:
    """Return zero values and selected columns for linear layers of a model.

    Args:
      model: any NNX module.
      targets: exact paths of layers ("blocks.0.attention.query") or the last components of paths ("query"), a predicate of
        the path, or None for every linear layer.
      k: connections per neuron; a layer with fewer inputs gets all of them.
      score: kernel (O, I) -> finite scores of the same shape; see `selection.select`.
      dtype: of the values.

    Returns: values (*L, O, min(k, I)) and int32 columns of the same shape, at the layers' paths.

    Raises:
      UserError: the model has no linear layer, a target matches none (lists them), or a selected one cannot carry a bypass.
      ValueError: k < 1.
    """
    layers = _linear_layers(model)
    paths = {".".join(path): path for path in layers}
    chosen = [paths[name] for name in trees.matching(paths, targets)]
    matrices: Tree = {}
    for path in chosen:
        if reason := _obstacle(layers[path]):
            raise UserError(f"{'.'.join(path)}: {reason}")
        matrices = trees.put(matrices, path, {"kernel": _matrix(path, layers[path])})
    return core.build(matrices, chosen, k, score=score, dtype=dtype, layout=Layout.IO)


def attach(model: nnx.Module, bypass: Bypass) -> Any:
    """Return a copy of the model with bypass layers; the Variables are its own, the arrays in them are shared.

    Raises:
      UserError: a path holds no linear layer, a layer cannot carry a bypass, or columns do not fit its kernel.
    """
    model = nnx.clone(model)
    for path, layer, columns in _layers_of(model, bypass):
        kernel, name = _matrix(path, layer), ".".join(path)
        if (*kernel.shape[:-2], kernel.shape[-1]) != columns.shape[:-1]:
            raise UserError(f"{name}: a kernel {layer.kernel.shape} does not fit columns {columns.shape} (*L, O, k)")
        values = trees.get(bypass.values, path)["values"]
        layer.dot_general = nnx.data(BypassDotGeneral(name, columns, values))
        layer.promote_dtype = _PromoteAllButTheKernel(layer.promote_dtype)
    return model


def detach(model: nnx.Module) -> tuple[Any, Bypass]:
    """Return a copy of the model without its bypass layers, and the bypass that they hold."""
    model = nnx.clone(model)
    values: Tree = {}
    columns: Tree = {}
    for path, layer in _linear_layers(model).items():
        held = layer.dot_general
        if isinstance(held, BypassDotGeneral):
            columns = trees.put(columns, path, {"columns": held.columns.get_value()})
            values = trees.put(values, path, {"values": held.values.get_value()})
            layer.dot_general = nnx.static(lax.dot_general if isinstance(layer, nnx.Linear) else None)
            layer.promote_dtype = layer.promote_dtype.promote
    return model, Bypass(values, columns)


def merge(model: nnx.Module, trained: Bypass) -> Any:
    """Return a copy of the model with W + D as the kernels of its layers, which remain plain layers.

    Args:
      model: without a bypass attached.
      trained: see `build`, `detach`.

    Raises:
      UserError: as `attach`.
    """
    model = nnx.clone(model)
    merged = core.merge(parameters(model), trained, layout=Layout.IO)
    for path, layer, _ in _layers_of(model, trained):
        layer.kernel = layer.kernel.copy(trees.kernel_at(merged, path))
    return model


def parameters(model: nnx.Module) -> Tree:
    """Return the kernels of a model's linear layers as nested dicts, for `adapters.own` and the functions of the core."""
    params: Tree = {}
    for path, layer in _linear_layers(model).items():
        params = trees.put(params, path, {"kernel": layer.kernel.get_value()})
    return params


def _linear_layers(model: nnx.Module) -> dict[ModulePath, Any]:
    """Return the linear layers by path; a layer that the model uses in several places is listed once."""
    layers = {
        tuple(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear | nnx.LinearGeneral)
    }
    if not layers:
        raise UserError(f"a {type(model).__name__} without nnx.Linear layers: nothing in it can carry a bypass")
    return layers


def _layers_of(model: nnx.Module, bypass: Bypass) -> list[tuple[ModulePath, Any, Any]]:
    """Return the (path, layer, columns) of every layer that the bypass is for."""
    layers = _linear_layers(model)
    found = []
    for path, columns in trees.leaves(bypass.columns, "columns"):
        if path not in layers:
            raise UserError(f"{'.'.join(path)} is no linear layer; this model has {', '.join(map('.'.join, layers))}")
        if reason := _obstacle(layers[path]):
            raise UserError(f"{'.'.join(path)}: {reason}")
        found.append((path, layers[path], columns))
    return found


def _obstacle(layer: Any) -> str | None:
    """Return the reason why a linear layer cannot carry a bypass, None if it can."""
    if isinstance(layer.dot_general, BypassDotGeneral):
        return "this layer carries a bypass already"
    if type(layer).__call__ not in (nnx.Linear.__call__, nnx.LinearGeneral.__call__, nnx.LoRALinear.__call__):
        return f"a {type(layer).__name__} with a __call__ of its own cannot carry a bypass"
    if layer.dot_general not in (None, lax.dot_general) or getattr(layer, "dot_general_cls", None) is not None:
        return "a linear layer with a dot_general of its own cannot carry a bypass"
    if layer.precision is not None or layer.preferred_element_type is not None:
        found = f"precision {layer.precision} and preferred_element_type {layer.preferred_element_type}"
        return f"{found} cannot be kept; set jax.default_matmul_precision instead"
    if getattr(layer, "batch_axis", {}):
        return "a LinearGeneral with batch_axis cannot carry a bypass"
    return None


def _matrix(path: ModulePath, layer: Any) -> jax.Array:
    """Return the kernel as (*L, I, O)."""
    if isinstance(layer, nnx.Linear):
        inputs, neurons = (layer.in_features,), (layer.out_features,)
    else:
        inputs, neurons = layer.in_features, layer.out_features
    kernel = layer.kernel.get_value()
    if kernel.shape[kernel.ndim - len(inputs) - len(neurons) :] != (*inputs, *neurons):
        raise UserError(f"{'.'.join(path)}: a kernel {kernel.shape}, expected {(*inputs, *neurons)} after stacked layers")
    return linen.as_matrices(kernel, len(inputs), len(neurons))
