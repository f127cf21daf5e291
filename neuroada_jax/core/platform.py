"""Which backend a program is traced for: the one that runs it or, while a run is planned, another machine's."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_planned: contextvars.ContextVar[tuple[str, bool] | None] = contextvars.ContextVar("planned", default=None)


def platform() -> str:
    """The platform that static choices are made for, such as "cpu" or "gpu"."""
    planned = _planned.get()
    return planned[0] if planned else jax.default_backend()


def has_flash_attention() -> bool:
    """Whether the program may call cuDNN's fused attention."""
    planned = _planned.get()
    return planned[1] if planned else jax.default_backend() == "gpu"


@contextlib.contextmanager
def planned_for(platform: str, *, flash_attention: bool) -> Iterator[None]:
    """What is traced inside is made for `platform`, whatever runs here."""
    token = _planned.set((platform, flash_attention))
    try:
        yield
    finally:
        _planned.reset(token)
