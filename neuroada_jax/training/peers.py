"""Sockets between the processes of a run: by them they share small values, agree when to stop, and end together.

JAX's own coordination service ends a process from C++ where another one is missing or dead. These sockets are connected
before it starts, so that every such end is one line of text. Each process holds one socket to the first process, which
relays; a thread for each socket reads, and another one writes, so that a signal handler that raises in the main thread
never leaves half a message behind.

A message is a JSON object after its length. All processes share the same keys in the same order.
"""

import contextlib
import json
import os
import queue
import shutil
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

Position = tuple[int, ...]  # of a process in the training: ascending
BEFORE, AFTER = (-1,), (1 << 62,)  # the positions outside the training loop
LEAVING = "leaving"  # the key that all share once nothing is left to do
FLUSH = 5.0  # seconds to wait for messages to leave, and for other processes to end
_LENGTH = struct.Struct("!I")
_folders: list[str] = []  # to be removed however the process ends


def remove_at_end(folder: str) -> None:
    """Remove a folder also where this process is ended for another one's sake."""
    _folders.append(folder)


class Peers:
    """The processes of a run. With a count of one it has no sockets, and everything is immediate.

    Attributes:
      index: number of this process.
      count: number of processes.
      on_notice: called in a thread of the first process when any process asks to stop.
    """

    def __init__(self, index: int = 0, count: int = 1, sockets: dict[int, socket.socket] | None = None) -> None:
        """Take the connected sockets: of the first process one for every other, of the others one to the first."""
        self.index, self.count = index, count
        self.on_notice: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self._uses = Counter[str]()  # of each key
        self._came: dict[str, dict[int, Any]] = {}  # on the first process: key -> number -> value
        self._answers: dict[str, list[Any]] = {}
        self._passed: Position = BEFORE  # see `passes`
        self._target: Position | None = None
        self._holding, self._positions = False, dict[int, Position]()
        self._left = False
        self._ending = threading.Lock()
        # Standard error itself: a progress bar takes the place of sys.stderr, and `devices.check` that of descriptor 2.
        self._stderr = os.dup(2) if sockets else 2
        self._outboxes: dict[int, queue.SimpleQueue[dict[str, Any] | None]] = {}
        self._threads: list[threading.Thread] = []
        for number, peer in (sockets or {}).items():
            self._outboxes[number] = queue.SimpleQueue()
            threading.Thread(target=self._read, args=(number, peer), daemon=True).start()
            self._threads.append(threading.Thread(target=self._write, args=(number, peer), daemon=True))
            self._threads[-1].start()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes the run's files and shows it."""
        return self.index == 0

    def share(self, key: str, value: Any, poll: Callable[[], None] | None = None) -> list[Any]:
        """Return the values of all processes, as JSON has them, in the order of their numbers.

        Args:
          key: what is shared.
          value: of this process.
          poll: called while waiting; what it raises ends the waiting.
        """
        self._uses[key] += 1
        name = f"{key} {self._uses[key]}"
        self._tell(0, {"kind": "share", "key": name, "value": value})
        while True:
            with self._changed:
                if name in self._answers:
                    return self._answers.pop(name)
                self._changed.wait(0.1)
            if poll is not None:
                poll()

    def from_first(self, key: str, make: Callable[[], Any]) -> Any:
        """Return what `make` returns on the first process, as JSON has it; only there it is called."""
        return self.share(key, make() if self.is_first else None)[0]

    def leave(self) -> None:
        """Wait until all processes have nothing left to do, and close the sockets."""
        self.share(LEAVING, None)
        for outbox in list(self._outboxes.values()):
            outbox.put(None)

    # Stopping: any process asks the first one, which announces it; each then answers with the last position that it has
    # passed, and all stop at the first position after the greatest of these.

    def ask_to_stop(self) -> None:
        """Ask the first process to stop the run."""
        self._tell(0, {"kind": "notice"})

    def hold(self) -> None:
        """Announce, from the first process, that the run is to stop inside the training loop."""
        for number in range(self.count):
            self._tell(number, {"kind": "hold"})

    def passes(self, position: Position) -> bool:
        """Pass a position, or return True where all are to stop at it."""
        with self._changed:
            if self.stops_at(position, wait=True):
                return True
            self._passed = position
            return False

    def stops_at(self, position: Position, *, wait: bool = False) -> bool:
        """Return whether all are to stop at this position, which is not passed by asking."""
        with self._changed:
            while wait and self._holding and self._target is None:
                self._changed.wait(0.1)
            return self._target is not None and position > self._target

    # Ending.

    def end(self, code: int, line: str | None = None, reason: str | None = None) -> NoReturn:
        """End all processes at once with an exit code.

        Args:
          code: of all processes.
          line: shown by this process.
          reason: shown by the others; None: they end without a word.
        """
        self._end(code, line, {"kind": "end", "code": code, "line": reason})

    def stopped(self, code: int) -> NoReturn:
        """End all processes of a run that was stopped, once the first process has saved what there is to save."""
        if self.is_first:
            self.end(code)
        while True:
            time.sleep(FLUSH)  # the first process ends this one

    def _end(self, code: int, line: str | None, message: dict[str, Any], sender: int | None = None) -> NoReturn:
        if not self._ending.acquire(blocking=False):
            time.sleep(4 * FLUSH)  # another thread ends this process
            os._exit(code)
        if line is not None:
            sys.stderr.flush()
            os.write(self._stderr, f"neuroada: error: {line}\n".encode())
        for number, outbox in list(self._outboxes.items()):
            if number != sender:
                outbox.put(message)
            outbox.put(None)
        deadline = time.monotonic() + FLUSH
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        # JAX aborts the others, with a stack of C++, once the first process is gone: it goes last.
        with self._changed:
            while self.is_first and self._outboxes and time.monotonic() < deadline:
                self._changed.wait(0.1)
        for folder in _folders:
            shutil.rmtree(folder, ignore_errors=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _tell(self, number: int, message: dict[str, Any]) -> None:
        if number == self.index:
            self._take(number, message)
        elif number in self._outboxes:
            self._outboxes[number].put(message)

    def _take(self, sender: int, message: dict[str, Any]) -> None:
        """Act on a message."""
        kind = message["kind"]
        if kind == "end":
            self._end(message["code"], message["line"], message, sender)
        if kind == "notice":
            self.on_notice()
            return
        with self._changed:
            if kind == "share":
                came = self._came.setdefault(message["key"], {})
                came[sender] = message["value"]
                if len(came) == self.count:
                    values = [came[number] for number in range(self.count)]
                    del self._came[message["key"]]
                    self._to_all({"kind": "answer", "key": message["key"], "values": values})
            elif kind == "answer":
                self._left = self._left or message["key"].startswith(LEAVING)
                self._answers[message["key"]] = message["values"]
            elif kind == "hold":
                self._holding = True
                self._tell(0, {"kind": "passed", "position": self._passed})
            elif kind == "passed":
                self._positions[sender] = tuple(message["position"])
                if len(self._positions) == self.count:
                    self._to_all({"kind": "target", "position": max(self._positions.values())})
            elif kind == "target":
                self._target = tuple(message["position"])
            self._changed.notify_all()

    def _to_all(self, message: dict[str, Any]) -> None:
        for number in range(self.count):
            self._tell(number, message)

    def _read(self, number: int, peer: socket.socket) -> None:
        with peer:
            while (message := receive(peer)) is not None:
                self._take(number, message)
        with self._changed:
            self._outboxes.pop(number, None)
            self._changed.notify_all()
        if self._left or self._ending.locked():
            return
        line = f"process {number} of {self.count} ended before the run did, see its own output for the reason"
        self._end(1, f"{line}; process {self.index} stops too", {"kind": "end", "code": 1, "line": line}, number)

    def _write(self, number: int, peer: socket.socket) -> None:
        outbox = self._outboxes[number]
        while (message := outbox.get()) is not None and send(peer, message):
            pass
        with contextlib.suppress(OSError):
            peer.shutdown(socket.SHUT_WR)  # its end closes the socket


def send(peer: socket.socket, message: dict[str, Any]) -> bool:
    """Send a message; return whether the connection took it."""
    content = json.dumps(message).encode()
    try:
        peer.sendall(_LENGTH.pack(len(content)) + content)
    except OSError:
        return False
    return True


def receive(peer: socket.socket) -> dict[str, Any] | None:
    """Return the next message; None where the connection ends, or brings something else."""
    try:
        (size,) = _LENGTH.unpack(_exactly(peer, _LENGTH.size))
        message = json.loads(_exactly(peer, size))
    except (OSError, ValueError, struct.error):
        return None
    return message if isinstance(message, dict) else None


def _exactly(peer: socket.socket, size: int) -> bytes:
    """Return so many bytes, fewer where the connection ends."""
    parts: list[bytes] = []
    while size and (part := peer.recv(min(size, 1 << 20))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


_current = Peers()


def current() -> Peers:
    """Return the processes of the run that this process has joined; by default it is alone."""
    return _current


def set_current(peers: Peers) -> None:
    """Make the processes those of `current`."""
    global _current
    _current = peers
