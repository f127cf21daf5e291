"""The platform that a program is traced for: the one that runs it or, in `neuroada plan`, that of a described machine."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_override: contextvars.ContextVar[tuple[str, bool] | None] = contextvars.ContextVar("override", default=None)


def name() -> str:
    """Return the platform that choices made at trace time are for, such as "cpu" or "gpu"."""
    override = _override.get()
    return override[0] if override else jax.default_backend()


def has_flash_attention() -> bool:
    """Return whether the program may call cuDNN's fused attention."""
    override = _override.get()
    return override[1] if override else jax.default_backend() == "gpu"


@contextlib.contextmanager
def tracing_for(platform: str, *, flash_attention: bool) -> Iterator[None]:
    """Trace the enclosed code for `platform` instead of the backend of this process."""
    token = _override.set((platform, flash_attention))
    try:
        yield
    finally:
        _override.reset(token)
