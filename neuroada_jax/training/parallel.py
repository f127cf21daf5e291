"""Devices, mesh and mode of a run: the interpretation of the config's section `parallel` (the modes are in modes.py)."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from neuroada_jax import devices
from neuroada_jax.errors import UserError
from neuroada_jax.training.config import ParallelSection
from neuroada_jax.training.modes import MODES, Parallel
from neuroada_jax.training.sharding import DATA, FSDP, TENSOR


def resolve(section: ParallelSection, available: Sequence[Any] | None = None) -> Parallel:
    """Return the devices and mode that a config asks for, out of `available` or of all devices that JAX sees.

    Raises:
      UserError: as in `layout`, and where JAX cannot start (`devices.check`).
    """
    if available is None:
        devices.check()
    processes = jax.process_count() if available is None else 1
    available = jax.devices() if available is None else available
    mode, shape = layout(section, available[0].platform, len(available), processes)
    chosen = np.array(available[: math.prod(shape)]).reshape(shape)
    return MODES[mode](Mesh(chosen, (DATA, FSDP, TENSOR), axis_types=(AxisType.Auto,) * 3))


def layout(section: ParallelSection, platform: str, available: int, processes: int = 1) -> tuple[str, tuple[int, int, int]]:
    """Return the mode, never "auto", and the mesh shape (data, fsdp, tensor) that a config asks for.

    Several CPU devices exist only where the user asked JAX for virtual ones, to try out several GPUs: `auto` uses one
    of them unless `parallel.devices` says how many.

    Args:
      section: `parallel` of a config.
      platform: of the devices: "cpu", "gpu" or "tpu".
      available: number of devices in all processes.
      processes: number of processes of the run. Several always use all of their devices.

    Raises:
      UserError: too few devices, a number of devices that fsdp x tensor does not divide, or a mode that several processes
        do not support.
    """
    shared = section.fsdp * section.tensor
    if processes > 1 and section.mode == "single":
        raise UserError(f"parallel.mode: single supports one process, found {processes}; use shard_map, pmap or jit")
    if processes > 1 and section.devices not in (None, available):
        raise UserError(
            f"parallel.devices: expected null or {available} (all of {processes} processes), found {section.devices}"
        )
    virtual = platform == "cpu" and processes == 1
    one = section.mode == "single" or (virtual and section.mode == "auto" and shared == 1)
    count = section.devices or (1 if one else available)
    if max(count, shared) > available:
        mesh = f"fsdp {section.fsdp} x tensor {section.tensor}: " if shared > 1 else ""
        raise UserError(f"parallel: {mesh}needs {max(count, shared)} devices, found {available} ({platform})")
    if count % shared:
        raise UserError(f"parallel: fsdp {section.fsdp} x tensor {section.tensor} does not divide {count} devices")
    automatic = "jit" if shared > 1 else "shard_map" if count > 1 else "single"
    return automatic if section.mode == "auto" else section.mode, (count // shared, section.fsdp, section.tensor)
