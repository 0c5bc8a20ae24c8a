"""Room for what is on its way: a limit that is looked at only afterwards does not hold.

Whoever is about to fetch a path reserves its size first. The size of the store, what all processes have reserved, and
the new path together stay below the limits; what no root reaches is removed for it, the least recently used first.
Where that is not enough because others have reserved so much, they are waited for; where it is not because everything
is in use, the path is fetched all the same and the log says so: a container that starts is worth more than a limit, and
what is in use cannot be removed.

What a process has reserved is in a file ``reserved/<name>`` that it has locked; the kernel drops the lock when it dies,
and then it counts no more. One process at a time decides, under the lock of that directory.
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fusesnap.errors import StorageFailure
from fusesnap.store.collection import Collected, Collection
from fusesnap.store.disk_space import free_space
from fusesnap.store.locks import directory_lock, try_flock
from fusesnap.store.storage_errors import storage

logger = logging.getLogger(__name__)

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
# Files take whole blocks, and a NAR has none: so much more is reserved.
_OVERHEAD_SHARE: Final = 8
_OVERHEAD: Final = 64 * 1024
_NUMBER: Final = 20  # digits of a number of bytes in a file


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """``max_size``: bytes that committed paths may take; ``min_free``: bytes to keep free on the disk. 0: no limit."""

    max_size: int = 0
    min_free: int = 0

    def __bool__(self) -> bool:
        return bool(self.max_size or self.min_free)


NO_LIMITS: Final = StoreLimits()


@dataclass(frozen=True, slots=True)
class Lack:
    """By how many bytes a path does not fit. ``for_good``: nobody's transfer has to end for that, all is in use."""

    size: int
    for_good: bool


class Room:
    """The room of one opened store. Thread-safe; methods block, and raise :class:`StorageFailure`."""

    def __init__(self, real: Path, reserved: Path, collection: Collection) -> None:
        self._real = real
        self._directory = reserved
        self._collection = collection
        self._limits = NO_LIMITS
        self._turn = threading.Lock()
        self._own = 0
        self._file: tuple[Path, int] | None = None
        self._told = False
        self._removed = (0, 0)

    @property
    def removed(self) -> tuple[int, int]:
        """How many paths were removed here to make room, and how many bytes on disk that freed."""
        return self._removed

    @property
    def limits(self) -> StoreLimits:
        """What is kept to."""
        return self._limits

    def keep_to(self, limits: StoreLimits) -> None:
        """From now on keep to ``limits``."""
        self._limits = limits

    def reserve(self, nar_size: int, *, whatever: bool = False) -> Lack | None:
        """Reserve what a path takes whose NAR has ``nar_size`` bytes; give it back with :meth:`give_back`.

        Removes what no root reaches, if need be. Where it does not fit nothing is reserved, and what it lacks is
        returned; with ``whatever`` it is reserved nevertheless, and the log says so.
        """
        size = space_for(nar_size)
        with self._deciding():
            excess = self._excess(size)
            if excess > 0:
                self._collect(excess)
                excess = self._excess(size)
            if excess <= 0:
                self._told = False
            elif not whatever:
                return Lack(excess, for_good=excess > self._reserved())
            else:
                self._tell(excess)
            self._write(self._own + size)
        return None

    def give_back(self, nar_size: int) -> None:
        """The path is committed, or it is not fetched after all. Raises nothing: an error may be under way."""
        with self._turn:
            self._own -= space_for(nar_size)
            try:
                self._write(self._own)
            except (
                StorageFailure
            ) as error:  # where it is written anew, as on btrfs, that takes room
                logger.warning("others will take it for reserved still: %s", error)

    def free(self, nar_size: int) -> Collected:
        """The disk is full: remove what no root reaches until a path with such a NAR has room."""
        with self._turn:
            return self._collect(space_for(nar_size))

    def drop_ballast(self) -> bool:
        """Give the ballast's room away, to something that frees more; returns whether there was any."""
        return self._collection.ballast.release()

    def restore_ballast(self) -> None:
        """Take the ballast's room again, if it is there."""
        self._collection.ballast.restore()

    def close(self) -> None:
        """Give everything back."""
        with self._turn:
            if self._file is not None:
                path, descriptor = self._file
                with suppress(OSError):  # whoever decides next removes it
                    path.unlink()
                os.close(descriptor)
            self._file, self._own = None, 0

    @contextmanager
    def _deciding(self) -> Iterator[None]:
        with self._turn:
            with storage("create", self._directory):
                self._directory.mkdir(mode=0o700, exist_ok=True)
            with directory_lock(self._directory):
                yield

    def _collect(self, size: int) -> Collected:
        collected = self._collection.collect(size, lambda _: None)
        paths, freed = self._removed
        self._removed = paths + len(collected.paths), freed + collected.size
        return collected

    def _excess(self, size: int) -> int:
        """By how many bytes the limits would not hold with ``size`` bytes more."""
        limits, coming = self._limits, self._reserved() + size
        over = lacking = 0
        if limits.max_size:
            over = self._collection.size() + coming - limits.max_size
        if limits.min_free:
            lacking = limits.min_free + coming - free_space(self._real)
        return max(0, over, lacking)

    def _reserved(self) -> int:
        """What all processes have reserved."""
        with storage("read", self._directory):
            return self._own + sum(map(_reserved_in, self._others()))

    def _others(self) -> list[Path]:
        own = None if self._file is None else self._file[0]
        return [path for path in self._directory.iterdir() if path != own]

    def _write(self, size: int) -> None:
        with storage("write", self._directory):
            if self._file is None:
                self._file = _create(self._directory)
            os.pwrite(self._file[1], b"%0*d" % (_NUMBER, size), 0)
        self._own = size

    def _tell(self, excess: int) -> None:
        if not self._told:
            self._told = True
            logger.warning(
                "%s: goes beyond its limits by %d bytes: all that is there is in use by images, mounts or transfers."
                " Delete images, or raise store.max-size or lower store.min-free",
                self._real,
                excess,
            )


def space_for(nar_size: int) -> int:
    """The bytes on disk that are reserved for a path whose NAR has ``nar_size`` bytes."""
    return nar_size + nar_size // _OVERHEAD_SHARE + _OVERHEAD


def is_full(error: StorageFailure) -> bool:
    """Whether there was no room for a write."""
    return error.errno in FULL


def _create(directory: Path) -> tuple[Path, int]:
    descriptor, name = tempfile.mkstemp(dir=directory)
    if not try_flock(descriptor):  # somebody took it for a dead one's in this very moment
        os.close(descriptor)
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return Path(name), descriptor


def _reserved_in(path: Path) -> int:
    """What another process has reserved; the file of one that is dead is removed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        if try_flock(descriptor):
            path.unlink(missing_ok=True)
            return 0
        text = os.read(descriptor, _NUMBER)
    finally:
        os.close(descriptor)
    return int(text) if text.isdigit() else 0
