"""Graceful stop of a run on SIGTERM or Ctrl-C."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """Stop of a run on request. `step`: the number of updates in the checkpoint, None where nothing new was saved."""

    def __init__(self, step: int | None = None) -> None:
        super().__init__()
        self.step = step


class Stop:
    """Request to stop a run.

    Outside of `held`, a request raises `Stopped` wherever the main thread is. Inside, the work polls `requested` where it
    can stop.
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

    @contextlib.contextmanager
    def held(self, held: bool = True) -> Iterator[None]:
        """Hold `Stopped` back for the enclosed code; with False, allow it again inside such a block."""
        before, self._held = self._held, held
        try:
            self.check()
            yield
        finally:
            self._held = before


@contextlib.contextmanager
def listening() -> Iterator[Stop]:
    """Turn the first SIGTERM or SIGINT into a request to stop, and end the process at once on the second.

    Python runs signal handlers between bytecode instructions, and a compilation or a step is one instruction. The byte that
    Python writes to the wakeup pipe arrives at once, so a thread reads that to confirm the first signal and act on the
    second.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
        yield stop
        return
    receive, send = os.pipe()
    os.set_blocking(send, False)

    def watch() -> None:
        asked = False
        while received := os.read(receive, 1):
            if received[0] not in SIGNALS:
                continue
            name = signal.Signals(received[0]).name
            if asked:
                os.write(2, f"neuroada: {name} again: ending at once\n".encode())
                os._exit(128 + received[0])
            asked = True
            os.write(2, f"neuroada: {name}: saving, then stopping; once more ends at once\n".encode())

    def handle(number: int, frame: Any) -> None:
        if not stop.requested:
            stop.request()

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    woken = signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        os.close(send)  # ends the thread
        thread.join()
        os.close(receive)
