"""Adapters of the caller's own parameters: a hand-written pytree, or a Flax Linen, NNX or Equinox model.

    own.save("adapter", trained, params)
    trained = own.load("adapter", params)

The files are those of `native`, with these differences: modules are named by their dotted paths in the caller's tree; the
axes of stacked layers are flattened into the neurons (adapter.json has the `shapes`); and `base` holds only
`"kind": "tree"` and a digest of every kernel that carries a bypass.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import xxhash

from neuroada_jax.adapters import native
from neuroada_jax.core import trees
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.errors import UserError

_KIND = "tree"


def save(
    directory: str | Path,
    trained: Bypass,
    params: Any,
    *,
    rule: str | None = "magnitude",
    seed: int | None = None,
    replace: bool = False,
) -> None:
    """Write an adapter directory, complete or not at all.

    Args:
      directory: must not exist unless `replace`.
      trained: values (*L, O, k), written as float32, and columns.
      params: the parameters that it was trained on, any pytree of arrays; the kernels are at the paths of `trained`.
      rule: the scoring rule of the columns; None if unknown.
      seed: the seed of the run; None if unknown.
      replace: overwrite an existing adapter.

    Raises:
      UserError: no kernel at a path, a kernel that the columns do not fit, or the directory exists or cannot be written.
    """
    values = {".".join(path): np.asarray(leaf, np.float32) for path, leaf in trees.leaves(trained.values, "values")}
    columns = {".".join(path): np.asarray(leaf, np.int32) for path, leaf in trees.leaves(trained.columns, "columns")}
    for name, leaf in columns.items():
        if name in values and leaf.shape[-2] == 1:  # shared by all neurons: written for each
            columns[name] = np.ascontiguousarray(np.broadcast_to(leaf, values[name].shape))
    if not columns or {name: leaf.shape for name, leaf in values.items()} != {n: leaf.shape for n, leaf in columns.items()}:
        raise UserError(f"{directory}: values at {', '.join(values)} and columns at {', '.join(columns)} are not a bypass")
    kernels = _kernels(params)
    inputs = {name: _inputs(name, kernels, chosen) for name, chosen in columns.items()}
    about = native.new_metadata(
        {"kind": _KIND, "digests": {name: _digest(kernels[name][1]) for name in columns}},
        inputs,
        native.Selection(max(chosen.shape[-1] for chosen in columns.values()), list(columns), rule, seed),
    )
    about["shapes"] = {name: list(chosen.shape) for name, chosen in columns.items()}
    flat_values, flat_columns = (
        {name: leaf.reshape(-1, leaf.shape[-1]) for name, leaf in tree.items()} for tree in (values, columns)
    )
    native.write(Path(directory), native.Adapter(about, flat_values, flat_columns, {}), replace=replace)


def load(directory: str | Path, params: Any) -> Bypass:
    """Read an adapter and check that `params` holds the kernels that it was trained on.

    Args:
      directory: as `save` wrote it.
      params: any pytree of arrays with the same kernels at the same paths.

    Raises:
      UserError: a missing or damaged file, an adapter of another kind, or a kernel that is missing or differs (names the
        first).
    """
    adapter = native.read(str(directory))
    about, shapes = adapter.metadata["base"], adapter.metadata.get("shapes")
    if about.get("kind") != _KIND:
        raise UserError(f"{directory}: an adapter of {about.get('source')}, expected one of the caller's own parameters")
    kernels = _kernels(params)
    digests = {name: _digest(kernels[name][1]) for name in about["digests"] if name in kernels}
    native.check_base(adapter, digests, "this tree")
    values: trees.Tree = {}
    columns: trees.Tree = {}
    for name, flat in adapter.columns.items():
        shape = shapes.get(name) if isinstance(shapes, dict) else None
        if name not in digests or not _describes(shape, flat):
            raise UserError(f"{directory}: {name} has columns {flat.shape}, adapter.json has no digest or shape for them")
        chosen = flat.reshape(shape)
        _inputs(name, kernels, chosen)
        path = kernels[name][0]
        values = trees.put(values, path, {"values": jnp.asarray(adapter.values[name].reshape(shape))})
        columns = trees.put(columns, path, {"columns": jnp.asarray(chosen)})
    return Bypass(values, columns)


def _kernels(params: Any) -> dict[str, tuple[trees.ModulePath, Any]]:
    """Return (path, array) by dotted name for every array that may be a kernel, and also for the module that holds it."""
    kernels: dict[str, tuple[trees.ModulePath, Any]] = {}
    for path, leaf in trees.flatten(trees.to_nested(params)):
        if getattr(leaf, "ndim", 0) >= 2:
            for place in [path, path[:-1]] if path[-1] == "kernel" else [path]:
                name = ".".join(place)
                if name in kernels:
                    raise UserError(f"two parameters are named {name}")
                kernels[name] = place, leaf
    return kernels


def _inputs(name: str, kernels: Mapping[str, tuple[trees.ModulePath, Any]], columns: np.ndarray) -> int:
    """Check that the columns fit a kernel and return its number of inputs."""
    if name not in kernels:
        raise UserError(f"{name} holds no kernel")
    kernel, neurons = kernels[name][1], math.prod(columns.shape[:-1])
    if kernel.size % neurons or columns.max() >= kernel.size // neurons:
        raise UserError(f"{name}: columns {columns.shape} up to {columns.max()} do not fit a kernel {kernel.shape}")
    return kernel.size // neurons


def _describes(shape: Any, flat: np.ndarray) -> bool:
    """Return whether a shape (*L, O, k) from adapter.json describes the flattened array (L * O, k)."""
    sizes = isinstance(shape, list) and len(shape) > 1 and all(isinstance(size, int) and size > 0 for size in shape)
    return sizes and (math.prod(shape[:-1]), shape[-1]) == flat.shape


def _digest(kernel: Any) -> str:
    return xxhash.xxh3_128_hexdigest(np.asarray(kernel).tobytes())
