"""Checks of a checkpoint's tensors: shapes and memory before anything is allocated, finite values when they are read."""

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from neuroada_jax import console
from neuroada_jax.errors import UserError

_CHUNK = 2**22  # elements that are checked at a time
# A value whose exponent has these bits is infinite or NaN.
_EXPONENTS = {np.dtype(ml_dtypes.bfloat16): 0x7F80, np.dtype(np.float16): 0x7C00}


def check_memory(leaves: Mapping[Any, Any], shardings: Mapping[Any, Any]) -> None:
    """Check that parameters fit into the memory of the devices that hold them; on a CPU, into the machine's.

    Args:
      leaves: path -> shape and dtype.
      shardings: path -> the sharding, None for the default device.

    Raises:
      UserError: they are larger than all of that memory, used or not.
    """
    needed = dict[jax.Device, int]()
    default = jax.devices()[0]
    for path, leaf in leaves.items():
        sharding = shardings.get(path)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        for device in [default] if sharding is None else sharding.addressable_devices:
            needed[device] = needed.get(device, 0) + math.prod(shape) * leaf.dtype.itemsize
    on_host = sum(size for device, size in needed.items() if device.platform == "cpu")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sizes = [("this machine", on_host, machine)]
    for device, size in needed.items():
        limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
        sizes += [(str(device), size, limit)] if limit else []
    for place, size, limit in sizes:
        if size > limit:
            raise UserError(
                f"the parameters take {console.size(size)}, more than all of the {console.size(limit)} of memory that "
                f"{place} has"
            )


def check_finite(name: str, tensor: np.ndarray) -> None:
    """Check that a tensor holds no NaN and no infinity.

    Raises:
      UserError: it does; names the tensor and says how many of its entries.
    """
    flat = tensor.reshape(-1)
    if all(_is_finite(flat[start : start + _CHUNK]) for start in range(0, flat.size, _CHUNK)):
        return
    values = flat.astype(np.float32)
    nan, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    counts = [f"{count} {what}" for count, what in ((nan, "NaN"), (infinite, "infinite entries")) if count]
    raise UserError(f"tensor {name!r} holds {' and '.join(counts)} in {flat.size}, expected finite numbers")


def _is_finite(part: np.ndarray) -> bool:
    mask = _EXPONENTS.get(part.dtype)
    if mask is not None:
        return int(np.bitwise_and(part.view(np.uint16), np.uint16(mask)).max(initial=0)) != mask
    # NaN and infinities last in a sum of squares, which takes a third of the time of `isfinite`; it may also overflow.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.dot(part, part)) or np.isfinite(part).all())


def check_shapes(tensors: Any, expected: Iterable[tuple[str, tuple[int, ...], str]]) -> None:
    """Check the shapes of stored tensors, from the headers.

    Args:
      tensors: the checkpoint.
      expected: (name in the checkpoint, shape, what a message adds) of every tensor that is read.

    Raises:
      UserError: a tensor of another shape.
    """
    for stored, shape, hint in expected:
        if tensors.shape(stored) != shape:
            raise UserError(f"tensor {stored!r} has shape {list(tensors.shape(stored))}, expected {list(shape)}{hint}")
