"""Runs in several processes: joining them, writing from the first one only, and ending all of them when one dies.

JAX's coordination service joins the processes. Its heartbeat detects a dead process after `HEARTBEAT` seconds and aborts
the others with a message of its own. To be faster and clearer for a process that dies while its machine lives, every
process also holds a socket to the first one: the operating system closes it with the process.
"""

import contextlib
import dataclasses
import os
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from neuroada_jax import console, devices
from neuroada_jax.errors import UserError
from neuroada_jax.training.config import RunConfig

HEARTBEAT = 30  # seconds without a heartbeat after which JAX declares a process dead
WAIT = 120  # seconds for all processes to join
GRACE = 3.0  # seconds in which a process may find the error of another one by itself
_folders: list[str] = []  # to be removed however the process ends
_DONE, _FAILED = b"d", b"f"  # farewell of a process that ends normally, or with an error that it has shown
_FAREWELL = struct.Struct("!cI")  # the word above, and the number of the process that it is about


@contextlib.contextmanager
def joined(coordinator: str | None, processes: int | None, process: int | None) -> Iterator[bool]:
    """Join the processes of a run for the enclosed code; yields whether this is the first one, the only one with output.

    Without a coordinator it does nothing. Inside, the death of another process ends this one with exit code 1, and a
    UserError ends it with exit code 2.

    Args:
      coordinator: HOST:PORT of the first process, or "auto" where JAX can detect it (SLURM, Open MPI, TPU).
      processes: number of processes; None for "auto".
      process: number of this process, from 0; None for "auto".

    Raises:
      UserError: the arguments are incomplete or contradict each other, or the other processes did not join in time;
        JAX cannot start (`devices.check`).
    """
    if coordinator is None:
        if (processes, process) != (None, None):
            raise UserError("--processes, --process: need --coordinator HOST:PORT")
        devices.check()
        yield True
        return
    if coordinator != "auto":
        _check(coordinator, processes, process)
    try:
        jax.distributed.initialize(
            None if coordinator == "auto" else coordinator,
            processes,
            process,
            initialization_timeout=WAIT,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--coordinator {coordinator}: cannot join the processes ({reason})") from error
    devices.check()
    console.say(f"process {jax.process_index()} of {jax.process_count()}, {jax.local_device_count()} device(s)")
    if jax.process_index() != 0:
        console.silence()
    watch = _watch(coordinator)
    try:
        yield jax.process_index() == 0
    except UserError as error:
        sys.stderr.write(f"neuroada: error: {' '.join(str(error).split())}\n")
        watch.farewell(failed=True)  # the others may find the same error by themselves
        if jax.process_index() == 0:
            time.sleep(2 * GRACE)  # JAX aborts the others at once when the first process is gone
        _end(2)
    except jax.errors.JaxRuntimeError:
        time.sleep(2 * GRACE)  # most likely another process died: the watch then reports it and ends this one
        raise
    watch.farewell()


def _end(code: int) -> None:
    """End this process at once; a normal exit would wait for the collective that the main thread may be in."""
    for folder in _folders:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _check(coordinator: str, processes: int | None, process: int | None) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator: expected HOST:PORT or auto, found {coordinator!r}")
    if processes is None or process is None:
        raise UserError("--coordinator HOST:PORT: needs --processes and --process")
    if not 0 <= process < processes:
        raise UserError(f"--process: expected 0 to {processes - 1}, found {process}")


@contextlib.contextmanager
def own_output(config: RunConfig) -> Iterator[RunConfig]:
    """Yield the config for this process: all but the first write into a temporary folder, removed afterwards."""
    if jax.process_index() == 0:
        yield config
        return
    folder = tempfile.mkdtemp(prefix="neuroada-process-")
    _folders.append(folder)
    try:
        yield dataclasses.replace(config, output=str(Path(folder) / "run"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Watch:
    """Sockets between this process and its peers, each with a thread that ends this process when the peer dies."""

    def __init__(self, peers: dict[int, socket.socket]) -> None:
        self._peers, self._leaving = peers, False
        for number, peer in peers.items():
            threading.Thread(target=self._listen, args=(number, peer), daemon=True).start()

    def _listen(self, number: int, peer: socket.socket) -> None:
        word, dead = _receive(peer) or (b"", number)
        if word == _DONE:
            return
        if word == _FAILED:
            time.sleep(GRACE)
        if self._leaving:
            return
        # Written first, because JAX aborts this process too, at once where the first process is gone.
        message = (
            f"process {dead} of {jax.process_count()} ended before the run did, see its own output for the reason; process "
            f"{jax.process_index()} stops too"
        )
        sys.stderr.write(f"neuroada: error: {message}\n")
        self._send(_FAILED, dead)
        _end(1)

    def _send(self, word: bytes, number: int) -> None:
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(_FAREWELL.pack(word, number))

    def farewell(self, failed: bool = False) -> None:
        """Report to the peers that this process ends on purpose; `failed`: after an error that it has shown."""
        self._leaving = True
        self._send(_FAILED if failed else _DONE, jax.process_index())


def _receive(peer: socket.socket) -> tuple[bytes, int] | None:
    """Return the farewell of a peer, (word, process number); None where the connection ends without one."""
    try:
        message = peer.recv(_FAREWELL.size, socket.MSG_WAITALL)
    except OSError:
        return None
    return _FAREWELL.unpack(message) if len(message) == _FAREWELL.size else None


def _watch(coordinator: str) -> _Watch:
    """Connect every process to the first one, at a port that it chooses."""
    first, count = jax.process_index() == 0, jax.process_count()
    host = socket.gethostname() if coordinator == "auto" else coordinator.rpartition(":")[0].strip("[]")
    if first:
        server = socket.create_server(("", 0), backlog=count)
        server.settimeout(WAIT)
        address = f"{host} {server.getsockname()[1]}"
    else:
        address = ""
    buffer = np.zeros(256, np.uint8)
    buffer[: len(address)] = np.frombuffer(address.encode(), np.uint8)
    host, port = bytes(multihost_utils.broadcast_one_to_all(buffer)).rstrip(b"\0").decode().split()
    peers: dict[int, socket.socket] = {}
    try:
        if first:
            for _ in range(count - 1):
                peer, _address = server.accept()
                peer.settimeout(None)
                peers[int.from_bytes(peer.recv(4), "big")] = peer
            server.close()
        else:
            peers[0] = socket.create_connection((host, int(port)), timeout=WAIT)
            peers[0].settimeout(None)
            peers[0].sendall(jax.process_index().to_bytes(4, "big"))
    except OSError as error:
        raise UserError(
            f"--coordinator {coordinator}: the processes cannot reach each other at {host} ({error})"
        ) from error
    return _Watch(peers)
