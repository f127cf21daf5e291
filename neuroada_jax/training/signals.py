"""A run that is asked to stop, by SIGTERM or Ctrl-C, saves and ends well."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """The run was asked to stop and did. `step`: the updates that are saved, None where nothing new is."""

    def __init__(self, step: int | None = None) -> None:
        super().__init__()
        self.step = step


class Stop:
    """Whether the run was asked to stop.

    Outside of `held` the request raises `Stopped` wherever the program is; inside, the work looks at `requested` where it
    can stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._held = False

    def request(self) -> None:
        """Asks for it."""
        self.requested = True
        self.check()

    def check(self) -> None:
        """Raises Stopped if that was asked for and is not held back."""
        if self.requested and not self._held:
            raise Stopped

    @contextlib.contextmanager
    def held(self, held: bool = True) -> Iterator[None]:
        """A block of work that is not interrupted, or with False one inside it that is."""
        before, self._held = self._held, held
        try:
            self.check()
            yield
        finally:
            self._held = before


@contextlib.contextmanager
def listening() -> Iterator[Stop]:
    """The first SIGTERM or SIGINT requests a stop, the second ends the process at once; afterwards all is as before.

    Python runs a signal's handler between two of its own instructions, and a compilation or a step is one of them. The
    bytes that Python writes to a wakeup pipe come at once, so that a thread reads them.
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
        os.close(send)  # which ends the thread
        thread.join()
        os.close(receive)
