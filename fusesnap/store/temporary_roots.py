"""Temporary roots: paths that a living process needs, whether they are there already or not.

They are Nix's own: a file ``temproots/<number>``, locked by its owner, holds full store paths, each ended by a NUL.
They protect from real Nix's collector as well as from ours, and they alone protect a path that is committed and not
valid, because Nix follows a permanent root only to a valid path. The kernel drops the lock when the owner dies; then
whoever collects next removes the file. Source: ``src/libstore/gc.cc`` of Nix.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Final

from fusesnap.nix.store_path import StoreDir
from fusesnap.store.collector_lock import CollectorLock
from fusesnap.store.locks import mark_stale, try_flock
from fusesnap.store.storage_errors import storage

# Nix names the file by its process and reads the name as a number of 32 bits. We may have several stores open, and
# share the state directory with another process id namespace: a number that is taken is stepped over.
_STEP: Final = 1 << 22  # the largest process id that Linux gives (pid_max in proc(5))
_ATTEMPTS: Final = 500


class TemporaryRoots:
    """Those of one opened store. Thread-safe; methods raise :class:`StorageFailure`, and may wait for a collector."""

    def __init__(self, nix_state: Path, store_dir: StoreDir, lock: CollectorLock) -> None:
        """Nothing is written before there is a root."""
        self._directory = nix_state / "temproots"
        self._prefix = store_dir.path + "/"
        self._lock = lock
        self._turn = threading.Lock()
        self._owners: dict[str, frozenset[str]] = {}
        self._held: Counter[str] = Counter()  # by how many owners
        self._file: Path | None = None
        self._descriptor = -1

    def hold(self, owner: str, base_names: Iterable[str]) -> None:
        """Keep ``base_names`` until ``owner``, a word of the caller's, drops them or the store is closed."""
        with self._turn:
            before = self._owners.get(owner, frozenset())
            added = frozenset(base_names) - before
            news = [self._prefix + name for name in sorted(added) if not self._held[name]]
            if news:
                with self._lock.rooting(news), storage("write", self._directory):
                    self._append(news)
            self._owners[owner] = before | added
            self._held.update(added)

    def hold_with_others(self, owner: str, base_names: Iterable[str]) -> bool:
        """As :meth:`hold` for a new owner, if that can be done without waiting, because others hold them; else nothing.

        Return whether it was done.
        """
        if not self._turn.acquire(blocking=False):
            return False
        try:
            names = frozenset(base_names)
            held = all(map(self._held.__contains__, names))
            if held:
                self._owners[owner] = names
                self._held.update(names)
            return held
        finally:
            self._turn.release()

    def drop_with_others(self, owner: str) -> bool:
        """As :meth:`drop`, if that can be done without waiting, because others hold the same; else nothing.

        Return whether it was done.
        """
        if not self._turn.acquire(blocking=False):
            return False
        try:
            names = self._owners.get(owner, frozenset())
            held = all(self._held[name] > 1 for name in names)
            if held:
                self._forget(owner)
            return held
        finally:
            self._turn.release()

    def drop(self, owner: str) -> None:
        """Let go of what ``owner`` holds and nobody else does."""
        with self._turn:
            names = self._forget(owner)
            if any(name not in self._held for name in names):
                with self._lock.rooting([]), storage("write", self._directory):
                    self._rewrite()

    def close(self) -> None:
        """Let go of everything."""
        with self._turn:
            if self._file is not None:
                with suppress(OSError):  # whoever collects next removes it
                    self._file.unlink()
                os.close(self._descriptor)
            self._file, self._descriptor = None, -1

    def _forget(self, owner: str) -> frozenset[str]:
        names = self._owners.pop(owner, frozenset())
        for name in names:
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]
        return names

    def _append(self, full_paths: Iterable[str]) -> None:
        if self._file is None:
            self._file, self._descriptor = self._create()
        _write(self._descriptor, full_paths)

    def _rewrite(self) -> None:
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        _write(self._descriptor, [self._prefix + name for name in sorted(self._held)])

    def _create(self) -> tuple[Path, int]:
        for number in count(os.getpid(), _STEP):
            if number >= os.getpid() + _ATTEMPTS * _STEP:
                break
            path = self._directory / str(number)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if try_flock(descriptor) and os.fstat(descriptor).st_nlink > 0:
                os.ftruncate(descriptor, 0)  # a dead process's
                return path, descriptor
            os.close(descriptor)  # another's, or a collector removes it
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def read_temporary_roots(nix_state: Path, store_dir: StoreDir) -> set[str]:
    """The base names that living processes hold; files of dead ones are removed.

    None is added meanwhile if the collector's lock is held. Raises :class:`StorageFailure`.
    """
    found: set[str] = set()
    directory = nix_state / "temproots"
    with storage("read", directory):
        for path in directory.iterdir():
            with suppress(FileNotFoundError):
                found |= _read(path, store_dir)
    return found


def _read(path: Path, store_dir: StoreDir) -> set[str]:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    if try_flock(descriptor):
        mark_stale(path, descriptor)
        return set()
    with os.fdopen(descriptor, "rb") as file:
        *roots, _ = file.read().split(b"\0")  # the last one may still be being written
    return {store_dir.parse(root.decode("ascii", "replace")).base_name for root in roots}


def _write(descriptor: int, full_paths: Iterable[str]) -> None:
    data = b"".join(path.encode() + b"\0" for path in full_paths)
    while data:
        data = data[os.write(descriptor, data) :]
