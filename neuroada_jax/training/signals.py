"""Graceful stop of a run on SIGTERM or Ctrl-C."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from neuroada_jax.training.peers import AFTER, Peers, Position

FORWARDED = signal.SIGUSR2  # from a thread to the main thread: to stop, as another process was asked to, or was dropped
SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AGAIN, _AGAIN_AFTER = b"\0", 0.05  # what asks the thread to send it, and after how many seconds


class Stopped(KeyboardInterrupt):
    """Stop of a run on request. `step`: the number of updates in the checkpoint, None where nothing new was saved."""

    def __init__(self, step: int | None = None) -> None:
        super().__init__()
        self.step = step


class Stop:
    """Request to stop a run.

    Outside of `held`, a request raises `Stopped` wherever the main thread is. Inside, the work asks `reached` where it can
    stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._held = False

    def request(self) -> None:
        """Request a stop, and raise Stopped unless it is held back."""
        self.requested = True
        self.check()

    def check(self) -> None:
        """Raise Stopped if a stop was requested and is not held back."""
        if self.requested and not self._held:
            raise Stopped

    def reached(self, *position: int) -> bool:
        """Return whether to stop here: at a position of the training, in ascending order."""
        return self.requested

    def scoring(self, *position: int) -> contextlib.AbstractContextManager[None]:
        """Allow a request to interrupt the enclosed scoring of a state, inside of `held`."""
        return self.held(False)

    def poll(self) -> None:
        """Raise Stopped where the scoring that calls this is to stop; one process is interrupted anyway."""

    @contextlib.contextmanager
    def held(self, held: bool = True) -> Iterator[None]:
        """Hold `Stopped` back for the enclosed code; with False, allow it again inside such a block."""
        before, self._held = self._held, held
        try:
            self.check()
            yield
        finally:
            self._held = before


class SharedStop(Stop):
    """Request to stop a run of several processes, whichever of them gets the signal.

    The first process decides. Inside of `held` all stop at the same position; elsewhere nothing of the others is needed to
    save, so `Stopped` is raised in the first process alone, which then ends the others.
    """

    def __init__(self, peers: Peers) -> None:
        super().__init__()
        self._peers = peers
        self._scoring: Position | None = None
        main = threading.main_thread().ident
        peers.on_notice = lambda: signal.pthread_kill(main, FORWARDED) if main else None

    def request(self) -> None:
        """Ask all processes to stop."""
        self.requested = True
        if not self._peers.is_first:
            self._peers.ask_to_stop()
        elif self._held:
            self._peers.hold()
        else:
            raise Stopped

    def check(self) -> None:
        """Raise Stopped in the first process if a stop was requested and is not held back."""
        if self._peers.is_first and self.requested and not self._held:
            raise Stopped

    def reached(self, *position: int) -> bool:
        """Return whether all processes stop here."""
        return self._peers.passes(position)

    @contextlib.contextmanager
    def scoring(self, *position: int) -> Iterator[None]:
        """Let `poll` interrupt the enclosed scoring, which ends at this position."""
        self._scoring = position
        try:
            yield
        finally:
            self._scoring = None

    def poll(self) -> None:
        """Raise Stopped if all processes stop during this scoring."""
        if self._scoring is not None and self._peers.stops_at(self._scoring):
            raise Stopped

    @contextlib.contextmanager
    def held(self, held: bool = True) -> Iterator[None]:
        """Hold `Stopped` back for the training loop, whose positions `reached` passes."""
        self._held = held
        try:
            if self.requested:
                self._held = False
                self.check()
            yield
        finally:
            self._held = False
            self._peers.passes(AFTER)


@contextlib.contextmanager
def listening(stop: Stop | None = None) -> Iterator[Stop]:
    """Turn the first SIGTERM or SIGINT into a request to stop, and end the process at once on the second.

    Python runs signal handlers between bytecode instructions, and a compilation or a step is one instruction. The byte that
    Python writes to the wakeup pipe arrives at once, so a thread reads that to confirm the first signal and act on the
    second. Where a handler happens to run inside of a destructor or of a callback of the garbage collector (JAX has one),
    Python drops what it raises: the thread then asks once more.
    """
    stop = stop or Stop()
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
        yield stop
        return
    dropped = sys.unraisablehook
    receive, send = os.pipe()
    os.set_blocking(send, False)

    def handle(number: int, frame: Any) -> None:
        if not stop.requested:
            stop.request()
        elif number == FORWARDED:
            stop.check()

    def ask_again(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, Stopped):
            if FORWARDED not in handlers:  # only now: a caller may use this signal for something else
                handlers[FORWARDED] = signal.signal(FORWARDED, handle)
            os.write(send, _AGAIN)
        else:
            dropped(unraisable)

    thread = threading.Thread(target=_watch, args=(receive, threading.get_ident()), name="signals", daemon=True)
    thread.start()
    woken = signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    heard = (*SIGNALS, FORWARDED) if isinstance(stop, SharedStop) else SIGNALS
    handlers = {number: signal.signal(number, handle) for number in heard}
    sys.unraisablehook = ask_again
    try:
        yield stop
    finally:
        sys.unraisablehook = dropped
        if FORWARDED in handlers:
            signal.signal(FORWARDED, signal.SIG_IGN)  # the thread may be about to send it
        signal.set_wakeup_fd(woken)
        os.close(send)  # ends the thread
        thread.join()
        os.close(receive)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _watch(receive: int, main: int) -> None:
    """Confirm the first signal that a pipe tells of, end the process on the second, and ask `main` again on `_AGAIN`."""
    asked = False
    while received := os.read(receive, 1):
        if received == _AGAIN:
            time.sleep(_AGAIN_AFTER)
            signal.pthread_kill(main, FORWARDED)
        if received[0] not in SIGNALS:
            continue
        name = signal.Signals(received[0]).name
        if asked:
            os.write(2, f"neuroada: {name} again: ending at once\n".encode())
            os._exit(128 + received[0])
        asked = True
        os.write(2, f"neuroada: {name}: saving, then stopping; once more ends at once\n".encode())
