"""Locks by files, which the system releases when a process ends, however it ends; also over NFS, where it has locks."""

import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path

from neuroada_jax.errors import UserError


class Lock:
    """An exclusive lock by a file, which the system releases when the process ends, however it ends."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Take the locked file; use `acquire`."""
        self._path, self._descriptor = path, descriptor

    @classmethod
    def acquire(cls, path: Path, what: str) -> "Lock":
        """Lock a file, which is created in an existing directory.

        Args:
          path: of the file.
          what: what is locked, for the message.

        Raises:
          UserError: another process holds it, which is named; or the file cannot be written.
        """
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except OSError as error:
                raise UserError(f"{path}: cannot be written ({error.strerror})") from error
            if not lock_file(descriptor):
                in_use = _in_use(path, what)
                os.close(descriptor)
                raise in_use
            if _is_at(descriptor, path):  # its former holder has not removed it meanwhile
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return cls(path, descriptor)
            os.close(descriptor)

    def release(self) -> None:
        """Remove the file and release the lock; does nothing the second time."""
        if self._descriptor >= 0:
            if _is_at(self._descriptor, self._path):
                self._path.unlink()
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def check_unlocked(path: Path, what: str) -> None:
    """Raise the UserError of `Lock.acquire` if another process holds the lock; create nothing."""
    with contextlib.suppress(OSError):  # `Lock.acquire` says what is wrong
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            if not lock_file(descriptor):
                raise _in_use(path, what)
        finally:
            os.close(descriptor)


def lock_file(descriptor: int) -> bool:
    """Lock an open file until it is closed; return False where another process holds it.

    A file system without locks counts as one in which nobody does.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _in_use(path: Path, what: str) -> UserError:
    """Return the error that names the process which holds a lock."""
    holder = "another process"
    with contextlib.suppress(OSError):
        holder = path.read_text(encoding="utf-8", errors="replace").strip()[:200] or holder
    return UserError(f"{what} is in use by {holder}; wait for its end, stop it, or choose another name")


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether the path is that of the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False
