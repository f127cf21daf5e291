"""The meeting of a run's processes at the address of the first one, before JAX joins them."""

import contextlib
import errno
import os
import socket
import time

from neuroada_jax.errors import UserError
from neuroada_jax.training.peers import Peers, receive, send

GREETING = "neuroada-jax 1"  # what a process says first, so that another service at the address is recognised
ANSWER = 10.0  # seconds within which a connection must say who it is
KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))  # a dead machine is noticed within 25 s


def meet(address: str, count: int, index: int, wait: float) -> tuple[Peers, str]:
    """Return the processes of a run, and the address at which JAX's coordination service of the first one is to listen.

    Args:
      address: HOST:PORT of the first process.
      count: number of processes.
      index: number of this process.
      wait: seconds within which all must have come.

    Raises:
      UserError: they have not; the address is in use; or two of them disagree on who they are.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + wait
    where = f"--coordinator {address}"
    if index == 0:
        sockets, ours = _gather(where, int(port), count, deadline, wait)
    else:
        first, ours = _join(where, host.strip("[]"), int(port), count, index, deadline, wait)
        sockets = {0: first}
    for each in sockets.values():
        each.settimeout(None)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for name, value in KEEPALIVE:
            if hasattr(socket, name):
                each.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Peers(index, count, sockets), f"{host}:{ours}"


def _gather(where: str, port: int, count: int, deadline: float, wait: float) -> tuple[dict[int, socket.socket], int]:
    """Accept the other processes; return their sockets by number, and a free port."""
    try:
        server = _server(port, count)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"{where}: the address is in use on {socket.gethostname()}; choose another port") from error
        raise UserError(f"{where}: cannot listen there ({error.strerror or error})") from error
    sockets: dict[int, socket.socket] = {}
    hosts = {0: _host()}
    try:
        with server:
            while len(sockets) < count - 1:
                _accept(where, server, sockets, hosts, count, deadline, wait)
            with _server(0, 1) as free:
                ours = int(free.getsockname()[1])
    except UserError as error:
        for each in sockets.values():
            with each:
                send(each, {"kind": "refused", "line": str(error)})
        raise
    for each in sockets.values():
        send(each, {"kind": "welcome", "port": ours})
    return sockets, ours


def _accept(
    where: str,
    server: socket.socket,
    sockets: dict[int, socket.socket],
    hosts: dict[int, str],
    count: int,
    deadline: float,
    wait: float,
) -> None:
    """Accept a process, or drop a connection that is none."""
    server.settimeout(max(0.01, deadline - time.monotonic()))
    try:
        peer, _ = server.accept()
    except OSError as error:
        missing = ", ".join(str(number) for number in range(1, count) if number not in sockets)
        raise UserError(f"{where}: process(es) {missing} of {count} have not come within {wait:g} s") from error
    peer.settimeout(ANSWER)
    said = receive(peer) or {}
    number = said.get("process")
    if said.get("kind") != GREETING or not isinstance(number, int):
        peer.close()
        return
    host = str(said.get("host"))
    line = None
    if said.get("processes") != count:
        line = f"{where}: process {number} on {host} has --processes {said.get('processes')}, process 0 has {count}"
    elif number in hosts:
        line = f"{where}: two processes have --process {number}, on {hosts[number]} and {host}"
    sockets[-1 - number if line else number] = peer
    if line:
        raise UserError(line)
    hosts[number] = host


def _join(
    where: str, host: str, port: int, count: int, index: int, deadline: float, wait: float
) -> tuple[socket.socket, int]:
    """Connect to the first process; return the socket, and the port of its coordination service."""
    failure = "no answer"
    while time.monotonic() < deadline:
        try:
            peer = socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic()))
        except OSError as error:
            failure = error.strerror or str(error)
            time.sleep(0.2)
            continue
        greeting = {"kind": GREETING, "processes": count, "process": index, "host": _host()}
        peer.settimeout(deadline - time.monotonic() + 2 * ANSWER)  # the first process names those that are missing
        said = receive(peer) if send(peer, greeting) else None
        if said is not None and said.get("kind") == "welcome":
            return peer, int(said["port"])
        with contextlib.suppress(OSError):
            peer.close()
        if said is not None and said.get("kind") == "refused":
            raise UserError(str(said["line"]))
        raise UserError(f"{where}: process 0 ended, or another program answers there")
    raise UserError(f"{where}: process 0 has not come within {wait:g} s ({failure})")


def _server(port: int, backlog: int) -> socket.socket:
    """Return a socket that listens on all addresses of this machine."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
    return socket.create_server(("", port), backlog=backlog)


def _host() -> str:
    return f"{socket.gethostname()} (pid {os.getpid()})"
