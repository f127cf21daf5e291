"""Resident memory of this process (Linux): what it holds now, and the most it held since a mark.

The figures depend on how the C library's allocator keeps freed memory, so processes that are to be compared run under
ALLOCATOR: few arenas, and large blocks go back to the system as soon as they are freed.
"""

import ctypes
import gc
from pathlib import Path

ALLOCATOR = {"MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}

_STATUS = Path("/proc/self/status")
_MARK = Path("/proc/self/clear_refs")


def available() -> bool:
    """Whether the system tells."""
    return _STATUS.exists() and _MARK.exists() and hasattr(ctypes.CDLL(None), "malloc_trim")


def resident() -> int:
    """Bytes held now, once what is free has been given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _field("VmRSS")


def mark() -> None:
    """Starts a new peak from here."""
    resident()
    _MARK.write_text("5")


def peak() -> int:
    """The most bytes held at once since `mark`."""
    return _field("VmHWM")


def _field(name: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
