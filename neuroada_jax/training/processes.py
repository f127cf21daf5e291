"""A run in several processes: how they find one another, who writes, and how the death of one ends all of them.

JAX's own service joins the processes, and notices after half a minute when one is silent. A process that dies takes its
sockets with it, so that the others know at once: everyone holds one to the first process.
"""

import contextlib
import dataclasses
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from neuroada_jax import console
from neuroada_jax.errors import UserError
from neuroada_jax.training.config import RunConfig

HEARTBEAT = 30  # seconds of silence after which JAX takes a process for dead
WAIT = 120  # seconds for all to be there
GRACE = 3.0  # seconds in which a process may find by itself what another one has ended with
_folders: list[str] = []  # to be removed at the end, whatever end that is
_DONE, _FAILED = b"d", b"f"  # the last word of a process that ends as it should, or with an error that it has shown


@contextlib.contextmanager
def joined(coordinator: str | None, processes: int | None, process: int | None) -> Iterator[bool]:
    """Joins the processes of a run for the time inside, and says whether this is the first, which alone shows anything.

    Does nothing without a coordinator. If another process dies meanwhile, this one ends with exit code 1; a UserError ends
    it with exit code 2.

    Args:
      coordinator: HOST:PORT of the first process, or "auto" where JAX finds it by itself (SLURM, Open MPI, TPU).
      processes: how many there are; None for "auto".
      process: the number of this one, from 0; None for "auto".

    Raises:
      UserError: some of the three, or numbers that do not go together, or the others did not come in time.
    """
    if coordinator is None:
        if (processes, process) != (None, None):
            raise UserError("--processes, --process: only together with --coordinator HOST:PORT")
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
        raise UserError(f"--coordinator {coordinator}: the processes cannot be joined ({reason})") from error
    console.say(f"process {jax.process_index()} of {jax.process_count()}, {jax.local_device_count()} device(s)")
    if jax.process_index() != 0:
        console.silence()
    watch = _watch(coordinator)
    try:
        yield jax.process_index() == 0
    except UserError as error:
        sys.stderr.write(f"neuroada: error: {' '.join(str(error).split())}\n")
        watch.farewell(failed=True)  # the others find the same by themselves, or are told
        if jax.process_index() == 0:
            time.sleep(2 * GRACE)  # JAX ends the others without a word when the first one is gone
        _end(2)
    except jax.errors.JaxRuntimeError:
        time.sleep(2 * GRACE)  # most likely another process died: the watch says so, and ends this one
        raise
    watch.farewell()


def _end(code: int) -> None:
    """Ends this process at once: the main thread may be inside a collective, and JAX would wait for all at the exit."""
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
        raise UserError("--coordinator HOST:PORT also needs --processes and --process")
    if not 0 <= process < processes:
        raise UserError(f"--process: expected 0 to {processes - 1}, found {process}")


@contextlib.contextmanager
def own_output(config: RunConfig) -> Iterator[RunConfig]:
    """The config as this process runs it: all but the first write into a folder of their own, which is removed."""
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
    """This process's ends of the sockets between it and the others."""

    def __init__(self, peers: dict[int, socket.socket]) -> None:
        self._peers, self._leaving = peers, False
        for number, peer in peers.items():
            threading.Thread(target=self._listen, args=(number, peer), daemon=True).start()

    def _listen(self, number: int, peer: socket.socket) -> None:
        try:
            said = peer.recv(2)
        except OSError:
            said = b""
        if said == _DONE:
            return
        dead = int(said[1:].hex(), 16) if len(said) == 2 else number
        if said[:1] == _FAILED:
            time.sleep(GRACE)
        if self._leaving:
            return
        # Said before JAX ends this process too, which it does at once where the first one is gone.
        message = (
            f"process {dead} of {jax.process_count()} ended before the run did, and its own output says why; process "
            f"{jax.process_index()} stops too"
        )
        sys.stderr.write(f"neuroada: error: {message}\n")
        self._tell(_FAILED + bytes([dead]))
        _end(1)

    def _tell(self, word: bytes) -> None:
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(word)

    def farewell(self, failed: bool = False) -> None:
        """Tells the others that this process ends, and that it knows why."""
        self._leaving = True
        self._tell(_FAILED + bytes([jax.process_index()]) if failed else _DONE)


def _watch(coordinator: str) -> _Watch:
    """Connects everybody to the first process, at a port that it chooses."""
    first, count = jax.process_index() == 0, jax.process_count()
    host = socket.gethostname() if coordinator == "auto" else coordinator.rpartition(":")[0].strip("[]")
    if first:
        server = socket.create_server(("", 0), backlog=count)
        server.settimeout(WAIT)
        told = f"{host} {server.getsockname()[1]}"
    else:
        told = ""
    place = np.zeros(256, np.uint8)
    place[: len(told)] = np.frombuffer(told.encode(), np.uint8)
    host, port = bytes(multihost_utils.broadcast_one_to_all(place)).rstrip(b"\0").decode().split()
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
            f"--coordinator {coordinator}: the processes cannot reach one another at {host} ({error})"
        ) from error
    return _Watch(peers)
