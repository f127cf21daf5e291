"""Bypass layers in any Equinox model that uses `eqx.nn.Linear`, with no change to the model.

    bypass = na.equinox.build(model, targets=["query_proj", "value_proj"], k=1)

    def loss(values):
        return objective(jax.vmap(na.equinox.attach(model, na.Bypass(values, bypass.columns)))(x))

    merged = na.equinox.merge(model, na.Bypass(values, bypass.columns))

The values are a tree of their own for `jax.grad` and optax, so the model needs no filter. Kernels are (O, I), with the axis
of an ensemble or of stacked layers in front; a layer's path is that of its weight, such as `layers.0.weight`.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from neuroada_jax.core import attached, trees
from neuroada_jax.core import bypass as core
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.core.scores import Score, magnitude
from neuroada_jax.core.trees import ModulePath, Targets, Tree
from neuroada_jax.errors import UserError


def build(
    model: Any,
    *,
    targets: Targets = None,
    k: int,
    score: Score = magnitude,
    dtype: Any = jnp.float32,
) -> Bypass:
    """Return zero values and selected columns for linear layers of a model.

    Args:
      model: any Equinox module, or a pytree that contains some.
      targets: exact paths of layers ("blocks.0.query_proj") or the last components of paths ("query_proj"), a predicate of
        the path, or None for every `eqx.nn.Linear`.
      k: connections per neuron; a layer with fewer inputs gets all of them.
      score: kernel (O, I) -> finite scores of the same shape; see `selection.select`.
      dtype: of the values.

    Returns: values (*L, O, min(k, I)) and int32 columns of the same shape, at the paths of the layers' weights.

    Raises:
      UserError: the model has no linear layer, or a target matches none (lists them).
      ValueError: k < 1.
    """
    layers: dict[str, ModulePath] = {}
    for keys, node in jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_linear):
        if _is_linear(node):
            path = trees.path_of(keys)
            layers[".".join(path)] = (*path, "weight")
    if not layers:
        raise UserError(f"a {type(model).__name__} without eqx.nn.Linear layers: nothing in it can carry a bypass")
    paths = [layers[name] for name in trees.matching(layers, targets)]
    return core.build(parameters(model), paths, k, score=score, dtype=dtype)


def attach(model: Any, bypass: Bypass) -> Any:
    """Return the model with bypass layers; it is called as before, and its own arrays get no gradient from these layers.

    Raises:
      UserError: a weight does not fit its columns, or carries a bypass already.
      KeyError: a path holds no weight.
    """
    return trees.from_nested(model, attached.attach(parameters(model), bypass), is_leaf=_is_attached)


def merge(model: Any, trained: Bypass) -> Any:
    """Return the model with W + D as the weights of its layers, in the same structure.

    Args:
      model: without a bypass attached.
      trained: see `build`.

    Raises:
      KeyError: a path holds no weight.
    """
    return trees.from_nested(model, core.merge(parameters(model), trained))


def parameters(model: Any) -> Tree:
    """Return the leaves of a model as nested dicts, for `adapters.own` and the functions of the core."""
    return trees.to_nested(model, is_leaf=_is_attached)


def _is_linear(node: Any) -> bool:
    return isinstance(node, eqx.nn.Linear)


def _is_attached(node: Any) -> bool:
    return isinstance(node, attached.BypassKernel)
