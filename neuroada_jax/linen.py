"""Bypass layers in any Flax Linen model that uses `nn.Dense` or `nn.DenseGeneral`, without changes to the model.

    bypass = linen.build(model, variables, images, targets=["query", "value"], k=1)
    apply = linen.with_bypass(model.apply)
    logits = apply({"params": params, "bypass": bypass.values, "columns": bypass.columns}, images)
    merged = merge(params, bypass, layout=Layout.IO)

Kernels keep Flax's layout, inputs first: (I, O) for `nn.Dense`, (D, H, N) and (H, N, D) in Flax's attention, with the axes
of stacked layers in front. Values and columns are (*L, O, k), where several axes of inputs or neurons are flattened.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from neuroada_jax.core import bypass, trees
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.core.entries import Layout
from neuroada_jax.core.ops import bypass_dense
from neuroada_jax.core.scores import Score, magnitude
from neuroada_jax.core.trees import ModulePath, Targets, Tree
from neuroada_jax.errors import UserError

# Leaves beside the kernel, so that Flax transforms them in the same way, such as slicing by nn.scan.
_VALUES, _COLUMNS = "bypass_values", "bypass_columns"


def build(
    module: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    targets: Targets,
    k: int,
    score: Score = magnitude,
    dtype: Any = jnp.float32,
    **kwargs: Any,
) -> Bypass:
    """Return zero values and selected columns for the linear maps of a model that `targets` select.

    The linear maps are those that `module.apply(variables, *args, **kwargs)` calls; it is traced, not computed.

    Args:
      module: any Linen module.
      variables: its variables; the kernels are those of "params".
      args: as for `module.apply`, such as one batch.
      targets: exact module paths ("encoder.block_0.query") or the last components of paths ("query"), never substrings;
        or a predicate of the path; or None for all of them.
      k: connections per neuron; a map with fewer inputs gets all of them.
      score: kernel (O, I) -> finite scores of the same shape; see `selection.select`.
      dtype: of the values.
      kwargs: as for `module.apply`.

    Returns: values (*L, O, min(k, I)) and int32 columns of the same shape, at the modules' paths.

    Raises:
      UserError: the model calls no linear map, a target matches none (lists them), or a selected linear map cannot carry a
        bypass (says why).
      ValueError: k < 1.
    """
    axes: dict[ModulePath, tuple[int, int]] = {}
    refused: dict[ModulePath, str] = {}

    def record(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module: Any = context.module
        if isinstance(module, nn.Dense | nn.DenseGeneral) and context.method_name == "__call__":
            axes[module.path] = _count(getattr(module, "axis", -1)), _count(module.features)
            if reason := _obstacle(module):
                refused[module.path] = reason
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda variables: module.apply(variables, *args, **kwargs), variables)

    if not axes:
        raise UserError(f"a {type(module).__name__} without Dense or DenseGeneral layers: nothing in it can carry a bypass")
    names = {".".join(path): path for path in axes}
    matrices: Tree = {}
    paths = [names[name] for name in trees.matching(names, targets)]
    for path in paths:
        if path in refused:
            raise UserError(f"{'.'.join(path)}: {refused[path]}")
        matrix = as_matrices(trees.kernel_at(variables["params"], path), *axes[path])
        matrices = trees.put(matrices, path, {"kernel": matrix})
    return bypass.build(matrices, paths, k, score=score, dtype=dtype, layout=Layout.IO)


def with_bypass(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `module.apply`, or any function of variables, so that the variables may contain a bypass.

    The returned function is called like `apply`. Where its variables have the collections "bypass" and "columns", the
    linear maps at their paths are bypass layers that form W + D on the fly, and the gradient of the values needs no dense
    gradient. Without these collections it equals `apply`. It works under jit, grad and `nn.remat`, and with `nn.scan` or
    `nn.vmap` over stacked layers whose parameters have the layer axis in front.

    Raises (by the returned function):
      UserError: one of the two collections is missing, there is a "base_entries" collection (a resident kernel holds the
        values already), or the module at a path cannot carry a bypass.
      KeyError: a path holds no kernel.
      ValueError: columns do not fit their kernel.
    """

    @functools.wraps(apply)
    def applied(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        rest = dict(variables)
        values, columns = rest.pop("bypass", None), rest.pop("columns", None)
        if values is None and columns is None:
            return apply(variables, *args, **kwargs)
        if values is None or columns is None or "base_entries" in rest:
            raise UserError(
                f"a bypass needs the collections bypass and columns, and no base_entries; found {', '.join(variables)}"
            )
        params: Tree = dict(rest["params"])
        for path, chosen in trees.leaves(columns, "columns"):
            trees.kernel_at(params, path)
            leaves = {_VALUES: trees.get(values, path)["values"], _COLUMNS: chosen}
            params = trees.put(params, path, {**trees.get(params, path), **leaves})
        with nn.intercept_methods(_intercept):
            return apply({**rest, "params": params}, *args, **kwargs)

    return applied


def _obstacle(module: Any) -> str | None:
    """Return the reason why a module cannot carry a bypass, None if it can."""
    if not isinstance(module, nn.Dense | nn.DenseGeneral):
        return f"a {type(module).__name__} cannot carry a bypass, only a Dense or DenseGeneral"
    if module.dot_general is not None or module.dot_general_cls is not None:
        return "a linear map with a dot_general of its own cannot carry a bypass"
    if module.precision is not None:
        return f"precision {module.precision} cannot be kept; set jax.default_matmul_precision instead"
    if getattr(module, "batch_dims", ()) not in ((), []):
        return "a DenseGeneral with batch_dims cannot carry a bypass"
    return None


def _count(axes: Any) -> int:
    return len(axes) if isinstance(axes, tuple | list) else 1


def _intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    module: Any = context.module
    if context.method_name != "__call__" or not module.has_variable("params", _VALUES):
        return call(*args, **kwargs)
    if reason := _obstacle(module):
        raise UserError(f"{'.'.join(module.path)}: {reason}")
    columns, values = (module.get_variable("params", name) for name in (_COLUMNS, _VALUES))
    # Flax handles the rest: axes, bias, other dtypes. A bound module is frozen and lives for one call of apply, so its
    # fields are set from outside; a clone would show up in captured intermediates.
    fields = {
        "dot_general": functools.partial(bypass_dot_general, columns=columns, values=values),
        "promote_dtype": functools.partial(_promote_all_but_the_kernel, module.promote_dtype),
    }
    former = {name: getattr(module, name) for name in fields}
    _set(module, fields)
    try:
        return call(*args, **kwargs)
    finally:
        _set(module, former)


def _set(module: Any, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        object.__setattr__(module, name, value)


def _promote_all_but_the_kernel(promote: Callable[..., Any], x: Any, kernel: Any, bias: Any, *, dtype: Any) -> Any:
    """Cast the arrays of a layer as it does, except the kernel: W + D is rounded to its own dtype first, as in `merge`."""
    x, _, bias = promote(x, kernel, bias, dtype=dtype)
    return x, kernel, bias


def as_matrices(kernel: jax.Array, input_axes: int, neuron_axes: int) -> jax.Array:
    """Return a kernel (*L, *I, *O) as (*L, I, O), given how many axes its inputs and its neurons have."""
    stacked = kernel.ndim - input_axes - neuron_axes
    return kernel.reshape(*kernel.shape[:stacked], -1, math.prod(kernel.shape[stacked + input_axes :]))


def bypass_dot_general(
    x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: None, *, columns: jax.Array, values: jax.Array
) -> jax.Array:
    """Apply a bypass layer in place of the `lax.dot_general` of Flax's linear layers.

    They contract some axes of x with the first axes of a kernel (*I, *O), and batch over none.
    """
    (axes, inputs), _ = dimension_numbers
    x = jnp.moveaxis(x, axes, tuple(range(-len(axes), 0)))
    batch, features = x.shape[: x.ndim - len(axes)], kernel.shape[len(inputs) :]
    matrix = as_matrices(kernel, len(inputs), len(features))
    y = bypass_dense(x.reshape(*batch, matrix.shape[0]), matrix, columns, values, layout=Layout.IO)
    return y.reshape(*batch, *features)
