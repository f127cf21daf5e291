"""The sections of a config that say how it is computed: on which devices, and what happens when a step fails."""

from typing import Literal

import pydantic
from pydantic.dataclasses import dataclass

STRICT = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, config=STRICT)
class ParallelSection:
    """How devices share a batch, and whether each holds all weights (docs/scaling.md).

    Attributes:
      mode: "shard_map" and "pmap": every device holds all weights, and one reduction sums the gradients. "jit": the same,
        or with `fsdp` and `tensor` devices that shard the weights by neuron. "single": one device. "auto" (the default):
        jit where weights are sharded, shard_map on several GPUs or TPUs, else single.
      devices: number of devices. None (the default): all of them.
      fsdp: devices that shard weights and batch, and gather one layer at a time. Default 1.
      tensor: devices that shard weights and the neurons' outputs. Default 1.
    """

    mode: Literal["auto", "single", "shard_map", "pmap", "jit"] = "auto"
    devices: int | None = pydantic.Field(default=None, gt=0)
    fsdp: int = pydantic.Field(default=1, gt=0)
    tensor: int = pydantic.Field(default=1, gt=0)

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "jit") and self.fsdp * self.tensor > 1:
            raise ValueError(f"parallel.mode: found {self.mode!r}, but fsdp and tensor need jit (or auto)")
        if self.mode == "single" and self.devices not in (None, 1):
            raise ValueError(f"parallel.devices: found {self.devices}, but mode single means one")


@dataclass(frozen=True, config=STRICT)
class WatchdogSection:
    """Reactions to failing steps, and thresholds of warnings (docs/reliability.md).

    Attributes:
      nonfinite: a step whose loss, gradient or updated values are NaN or infinite ends the run ("stop", the default) or is
        skipped ("skip").
      max_skips: the most steps of a run that may be skipped; one more ends it. Default 10.
      spike: a loss so many robust deviations above the median of the last 100 is a spike. Default 10; None: no warning.
      stall_warn: seconds to wait for a batch before a warning. Default 30; None: no warning.
      stall_stop: seconds to wait for a batch before the run ends. None (the default): wait forever.
    """

    nonfinite: Literal["stop", "skip"] = "stop"
    max_skips: int = pydantic.Field(default=10, ge=0)
    spike: float | None = pydantic.Field(default=10.0, gt=0)
    stall_warn: float | None = pydantic.Field(default=30.0, gt=0)
    stall_stop: float | None = pydantic.Field(default=None, gt=0)
