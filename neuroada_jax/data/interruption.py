"""Work in pure Python that is interrupted where it takes too long: programs of others, such as chat templates."""

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
_POLL, _IDLE = 0.1, 100  # seconds between two looks at the clock, and how often there is no work before they end


class _Interrupted(BaseException):
    """The time is up; no code of a library swallows it."""


class TooMuch(ValueError):
    """A bound that is exceeded."""


class _Job:
    """Work in a thread.

    Attributes:
      thread: its number.
      seconds: how long it may take.
      deadline: the time of the thread's processor at which it has to end; None until the clock is looked at.
      fired: whether it was interrupted.
    """

    __slots__ = ("deadline", "fired", "seconds", "thread")

    def __init__(self, seconds: float) -> None:
        self.thread, self.seconds, self.fired = threading.get_ident(), seconds, False
        self.deadline: float | None = None


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """Return what some work in pure Python returns. It takes a few microseconds, as every chat needs it.

    Raises:
      TooMuch: the work takes longer.
    """
    job = _Job(seconds)
    try:
        try:
            _enter(job)
            return work()
        finally:
            _leave(job)
    except _Interrupted:  # maybe before `_leave` had left
        _leave(job)
        raise TooMuch(f"it takes longer than {seconds:g} s") from None


def _enter(job: _Job) -> None:
    global _watching, _collects
    with _lock:
        _running.add(job)
        start, _watching = not _watching, True
        if len(_running) == 1:
            _collects = gc.isenabled()
            gc.disable()  # its callbacks, such as JAX's, would swallow an interruption
    if start:
        threading.Thread(target=_watch, name="templates", daemon=True).start()


def _leave(job: _Job) -> None:
    with _lock:
        _running.discard(job)
        if not _running and _collects:
            gc.enable()
        if job.fired:
            _raise_in(job.thread, None)  # if it was not raised yet, it must not be later


_running: set[_Job] = set()
_lock = threading.Lock()  # of all state of this module
_watching = False
_collects = True  # whether Python collected garbage before


def _watch() -> None:
    """Interrupt the renderings whose time is up; end once there is none for a while."""
    global _watching
    idle = 0
    while True:
        time.sleep(_POLL)
        with _lock:
            idle = 0 if _running else idle + 1
            if idle > _IDLE:
                _watching = False
                return
            for each in _running:
                now = time.clock_gettime(time.pthread_getcpuclockid(each.thread))
                each.deadline = each.deadline or now + each.seconds
                if now > each.deadline:
                    each.fired = True  # and again at the next look: code that runs in between may have swallowed it
                    _raise_in(each.thread, _Interrupted)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    value = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), value)
