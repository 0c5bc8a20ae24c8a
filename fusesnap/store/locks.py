"""Locks between processes: on a directory in use, and on a store path being added, the latter as Nix does it.

They are ``flock`` locks, which belong to an open file: they exclude threads as well as processes, and the kernel drops
them when their owner dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from fusesnap.errors import StorageFailure
from fusesnap.store.storage_errors import storage

LOCK_SUFFIX: Final = ".lock"
# A commit of ours holds a lock for milliseconds; Nix holds it for as long as it downloads the path.
WAIT_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.02  # flock has no deadline of its own
_STALE: Final = b"d"  # what Nix writes into a lock file that it has removed


def try_flock(descriptor: int) -> bool:
    """Lock ``descriptor`` for this owner alone; return whether nobody else holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def directory_lock(directory: Path, *, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the lock on ``directory``. Raises :class:`StorageFailure`, with ETIMEDOUT after the wait."""
    with storage("lock", directory):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with storage("lock", directory):
            _flock_within(descriptor, directory, wait_seconds)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def path_lock(real: Path, base_name: str, *, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the lock on the store path ``base_name`` in the store directory ``real``.

    It is Nix's own (``PathLocks`` in ``src/libstore/pathlocks.cc``): a file beside the path whose name ends in
    ``.lock``, so that a Nix which adds the same path to the same store at the same time waits for us, and we for it.
    Raises :class:`StorageFailure`, with ETIMEDOUT after the wait.
    """
    lock = real / (base_name + LOCK_SUFFIX)
    with storage("lock", lock):
        descriptor = _open_locked(lock, wait_seconds)
    try:
        yield
    finally:
        mark_stale(lock, descriptor)


@contextmanager
def path_lock_if_free(real: Path, base_name: str) -> Iterator[bool]:
    """Hold the lock on a store path where nobody else holds it; give whether that is so."""
    lock = real / (base_name + LOCK_SUFFIX)
    with storage("lock", lock):
        descriptor = _try_open_locked(lock)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            mark_stale(lock, descriptor)


def _flock_within(descriptor: int, path: Path, wait_seconds: float) -> None:
    for _ in range(max(1, round(wait_seconds / _POLL_SECONDS))):
        if try_flock(descriptor):
            return
        time.sleep(_POLL_SECONDS)
    raise StorageFailure(
        f"cannot lock {path}: another process holds it for {wait_seconds} s", errno.ETIMEDOUT
    )


def _open_lock_file(lock: Path) -> int:
    return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _open_locked(lock: Path, wait_seconds: float) -> int:
    while True:
        descriptor = _open_lock_file(lock)
        try:
            _flock_within(descriptor, lock, wait_seconds)
            if not _is_stale(descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try_open_locked(lock: Path) -> int | None:
    descriptor = _open_lock_file(lock)
    try:
        if try_flock(descriptor) and not _is_stale(descriptor):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _is_stale(descriptor: int) -> bool:
    """Tell whether the owner before us removed the file while we waited: a newcomer would not see our lock."""
    status = os.fstat(descriptor)
    return status.st_size > 0 or status.st_nlink == 0


def mark_stale(lock: Path, descriptor: int) -> None:
    """Remove a file that we have locked, for everybody who waits for it, and close it."""
    # A lock file that stays behind is harmless and goes at the next start, and on a full disk it cannot be written.
    with suppress(OSError):
        lock.unlink(missing_ok=True)
        os.write(descriptor, _STALE)
    os.close(descriptor)
