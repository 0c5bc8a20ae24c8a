"""The lock between garbage collectors and those who are about to need a path: Nix's own, so that it holds for Nix too.

Source: ``src/libstore/gc.cc`` of Nix. Whoever collects holds ``gc.lock`` exclusively, whoever adds a temporary root
holds it shared meanwhile. So no collector works from a list of roots that has become too short. Ours hold the lock for
one batch; Nix's holds it to its end, and listens on a socket for roots that are added meanwhile. Nix does not wait for
the lock where there is no such socket: it takes it that the collector has just ended (tried with 2.8). Where there is
one and nobody listens, it tries again. So there is always one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fusesnap.errors import StorageFailure
from fusesnap.store.storage_errors import storage

# Ours hold the lock for well under a second; Nix's is told through its socket.
WAIT_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.01  # flock has no deadline of its own
_ACKNOWLEDGED: Final = b"1"
_NOBODY_LISTENS: Final = (errno.ENOENT, errno.ECONNREFUSED, errno.EPIPE, errno.ECONNRESET)


class CollectorLock:
    """The lock of one store. ``nix_state`` is Nix's state directory."""

    def __init__(self, nix_state: Path, *, wait_seconds: float = WAIT_SECONDS) -> None:
        self._path = nix_state / "gc.lock"
        self._socket = nix_state / "gc-socket"
        self._wait_seconds = wait_seconds

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Hold the lock alone: nobody adds a temporary root meanwhile. Raises :class:`StorageFailure`."""
        self._make_socket()
        with self._held(fcntl.LOCK_EX, ()):
            self._make_socket()  # Nix's collector may have held the lock before us, and removed its own
            yield

    @contextmanager
    def rooting(self, full_paths: Iterable[str]) -> Iterator[None]:
        """Hold the lock with others who add temporary roots, or have told the collector of ``full_paths``.

        Raises :class:`StorageFailure`.
        """
        with self._held(fcntl.LOCK_SH, tuple(full_paths)):
            yield

    @contextmanager
    def _held(self, kind: int, tell: tuple[str, ...]) -> Iterator[None]:
        with storage("lock", self._path):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with storage("lock", self._path):
                self._wait(descriptor, kind, tell)
            yield
        finally:
            os.close(descriptor)

    def _make_socket(self) -> None:
        """Have a socket there that refuses, unless there is one."""
        with storage("create", self._socket):
            self._socket.mkdir(exist_ok=True)
            with self._directory() as way, socket.socket(socket.AF_UNIX) as refusing:
                try:
                    refusing.bind(f"{way}/socket")
                except OSError as error:
                    if error.errno != errno.EADDRINUSE:  # there is one already
                        raise

    @contextmanager
    def _directory(self) -> Iterator[str]:
        """A short way to the socket's directory: a socket's path has at most 107 bytes."""
        directory = os.open(self._socket, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield f"/proc/self/fd/{directory}"
        finally:
            os.close(directory)

    def _wait(self, descriptor: int, kind: int, tell: tuple[str, ...]) -> None:
        for _ in range(max(1, round(self._wait_seconds / _POLL_SECONDS))):
            if _try_flock(descriptor, kind) or (tell and self._told(tell)):
                return
            time.sleep(_POLL_SECONDS)
        raise StorageFailure(
            f"cannot lock {self._path}: a garbage collector has it for {self._wait_seconds:g} s",
            errno.ETIMEDOUT,
        )

    def _told(self, full_paths: tuple[str, ...]) -> bool:
        """Whether the collector that has the lock now knows of ``full_paths``."""
        try:
            with self._directory() as way, socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(self._wait_seconds)
                connection.connect(f"{way}/socket")
                return all(_tell(connection, path) for path in full_paths)
        except OSError as error:
            if error.errno in _NOBODY_LISTENS:
                return False  # it is one of ours, or has not begun to listen, or ends
            raise


def _try_flock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _tell(connection: socket.socket, full_path: str) -> bool:
    connection.sendall(full_path.encode() + b"\n")
    return connection.recv(1) == _ACKNOWLEDGED
