"""Resident memory of this process on Linux: now, and at most since a mark.

The figures depend on how the C library's allocator keeps freed memory. Processes that are compared with each other
therefore run under ALLOCATOR: few arenas, and large blocks return to the system as soon as they are freed.
"""

import ctypes
import gc
from pathlib import Path

ALLOCATOR = {"MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}

_STATUS = Path("/proc/self/status")
_MARK = Path("/proc/self/clear_refs")


def available() -> bool:
    """Return whether the system has these figures."""
    return _STATUS.exists() and _MARK.exists() and hasattr(ctypes.CDLL(None), "malloc_trim")


def resident() -> int:
    """Return the bytes held now, after freed memory has been returned to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _field("VmRSS")


def mark() -> None:
    """Start a new peak."""
    resident()
    _MARK.write_text("5")


def peak() -> int:
    """Return the peak in bytes since `mark`."""
    return _field("VmHWM")


def _field(name: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
