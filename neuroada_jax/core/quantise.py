"""Quantising a kernel: its arrays in one of the formats that can be made here."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from neuroada_jax.core.quantised_formats import NESTED_BLOCK, NF4, NF4_BLOCK, dynamic_map, nested_width

MADE = ("nf4", "nf4_nested", "int8", "fp8")
_SMALLEST = 1e-38  # a scale below it counts as this
_SMALLEST_FP8 = 1e-30
_FP8_LARGEST = 448.0


@functools.partial(jax.jit, static_argnames="name")
def quantise(kernel: Float[Array | np.ndarray, "O I"], name: str) -> dict[str, Array]:
    """Return the arrays of a kernel in a format: the nearest code of every entry, with the largest one as the scale.

    Args:
      kernel: of one layer.
      name: one of `MADE`; its blocks divide I.
    """
    wide = jnp.asarray(kernel).astype(jnp.float32)
    return {"nf4": _nf4, "nf4_nested": _nf4_nested, "int8": _int8, "fp8": _fp8}[name](wide)


def _nearest(numbers: Array, table: np.ndarray) -> Array:
    """Return the place of the nearest entry of an ascending table, uint8; in the middle between two, the lower one."""
    bounds = (table[:-1] + table[1:]) / np.float32(2)
    if bounds.size > 32:
        return jnp.searchsorted(jnp.asarray(bounds), numbers, side="left").astype(jnp.uint8)
    found = jnp.zeros(numbers.shape, jnp.uint8)
    for bound in bounds:  # one pass over the numbers, where a search takes one for each bit of the code
        found = found + (numbers > bound).astype(jnp.uint8)
    return found


def _scaled(blocks: Array, absmax: Array) -> Array:
    """Return blocks (..., n) divided by their scales (...), from -1 to 1."""
    return jnp.clip(blocks * (1.0 / jnp.maximum(absmax, _SMALLEST))[..., None], -1.0, 1.0)


def _nf4(kernel: Array) -> dict[str, Array]:
    blocks = kernel.reshape(kernel.shape[0], -1, NF4_BLOCK)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    codes = _nearest(_scaled(blocks, absmax), NF4).reshape(kernel.shape[0], -1, 2)
    return {"codes": (codes[..., 0] << jnp.uint8(4)) | codes[..., 1], "absmax": absmax}


def _nf4_nested(kernel: Array) -> dict[str, Array]:
    parts = _nf4(kernel)
    absmax = parts["absmax"]
    offset = jnp.mean(absmax)
    flat = (absmax - offset).reshape(-1)
    padded = jnp.pad(flat, (0, -flat.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    nested = jnp.max(jnp.abs(padded), axis=-1)
    table = dynamic_map()
    codes = _nearest(_scaled(padded, nested), table).reshape(-1)[: flat.size].reshape(absmax.shape)
    rows = by_row(nested, *kernel.shape)
    shared = {"offset": offset.reshape(1, 1), "table": jnp.asarray(table)[None]}
    return {"codes": parts["codes"], "absmax": codes, **rows, **shared}


def by_row(nested: Any, outputs: int, inputs: int) -> dict[str, Array]:
    """Return the scales of scales of a map as the arrays of its rows.

    Args:
      nested: one for every 256 scales of the map, float32.
      outputs: O.
      inputs: I.
    """
    first = np.arange(outputs, dtype=np.int64) * (inputs // NF4_BLOCK)
    touched = first[:, None] // NESTED_BLOCK + np.arange(nested_width(inputs))
    return {
        "nested": jnp.take(nested, jnp.asarray(np.minimum(touched, nested.shape[0] - 1), jnp.int32), mode="clip"),
        "phase": jnp.asarray((first % NESTED_BLOCK).astype(np.uint8)[:, None]),
    }


def _int8(kernel: Array) -> dict[str, Array]:
    scale = jnp.max(jnp.abs(kernel), axis=-1, keepdims=True)
    return {"codes": jnp.round(kernel * (127.0 / jnp.maximum(scale, _SMALLEST))).astype(jnp.int8), "scale": scale}


def _fp8(kernel: Array) -> dict[str, Array]:
    scale = jnp.maximum(jnp.max(jnp.abs(kernel), axis=-1, keepdims=True), _SMALLEST_FP8) / _FP8_LARGEST
    codes = jnp.clip(kernel / scale, -_FP8_LARGEST, _FP8_LARGEST).astype(jnp.float8_e4m3fn)
    return {"codes": codes, "scale": scale}
