"""The platform that a program is traced for: the one that runs it or, in `neuroada plan`, that of a described machine."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax

# XLA's options for a training step on a GPU. It would join small products that share an input (q, k and v), for which
# cuBLAS needs a copy of their weights side by side. `layers.in_turn` keeps them apart while decoding, whose programs are
# jitted before the platform is known.
GPU_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": 0}
FLASH_CAPABILITY = (8, 0)  # the least CUDA compute capability for cuDNN's fused attention

_override: contextvars.ContextVar[tuple[str, bool, Any] | None] = contextvars.ContextVar("override", default=None)


def name() -> str:
    """Return the platform that choices made at trace time are for, such as "cpu" or "gpu"."""
    override = _override.get()
    return override[0] if override else jax.default_backend()


def step_options() -> dict[str, int] | None:
    """Return XLA's options for a training step, as `jax.jit(compiler_options=...)` takes them."""
    return GPU_OPTIONS if name() == "gpu" else None


def has_flash_attention(head_size: int) -> bool:
    """Return whether the program may call cuDNN's fused attention for heads of this size."""
    override = _override.get()
    found = None if override else capability()
    supported = override[1] if override else found is not None and found >= FLASH_CAPABILITY
    # The limits of `jax.nn.dot_product_attention`, which knows no capability where it is traced for a described GPU.
    return supported and head_size % 8 == 0 and head_size <= (256 if found and found >= (9, 0) else 128)


def capability(of: Any = None) -> tuple[int, int] | None:
    """Return the CUDA compute capability of a device, by default this process's first; None where it is no NVIDIA GPU."""
    found = jax.local_devices()[0] if of is None else of
    text = str(getattr(found, "compute_capability", ""))  # of an AMD GPU it is a name, such as gfx90a
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def device() -> Any:
    """Return a device like those that will run the program, or None where a program is traced for an unknown one."""
    override = _override.get()
    return override[2] if override else jax.local_devices()[0]


@contextlib.contextmanager
def tracing_for(platform: str, *, flash_attention: bool, device: Any = None) -> Iterator[None]:
    """Trace the enclosed code for `platform` instead of the backend of this process.

    Args:
      platform: what `name` returns.
      flash_attention: what `has_flash_attention` returns.
      device: what `device` returns, such as a device of a described topology.
    """
    token = _override.set((platform, flash_attention, device))
    try:
        yield
    finally:
        _override.reset(token)
