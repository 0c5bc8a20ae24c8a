"""Files that are here already, of which a path to come may have the same bytes.

casync calls such a source a seed. Nothing is claimed of what is read: whoever reads it knows what it must hash to.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from fusesnap.nix.tree import Entry, EntryKind, Tree
from fusesnap.store.partial_nars import NarGlance

_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Seed(Protocol):
    """One path that is here, all of it or in parts. Its methods block; one thread at a time."""

    def read(self, names: Sequence[bytes], size: int, offset: int, length: int) -> bytes | None:
        """``length`` bytes from ``offset`` of the file that ``names`` lead to, which has ``size`` bytes.

        None where there is no such file, or these bytes of it are not here, or cannot be read.
        """

    def rest(self) -> None:
        """Let go of the file that is open; the next read opens it again."""


class _OpenFile:
    """The file that was read last."""

    def __init__(self) -> None:
        self._descriptor = -1
        self._names: tuple[bytes, ...] | None = None
        self.size = 0

    def look_at(self, location: Path, names: Sequence[bytes]) -> bool:
        """Have the file open that ``names`` lead to below ``location``; false where there is none."""
        if tuple(names) != self._names:
            self.close()
            self._names = tuple(names)
            with suppress(OSError):
                self._open(location, names)
        return self._descriptor >= 0

    def read(self, offset: int, length: int) -> bytes | None:
        """So many bytes of it, or None."""
        try:
            data = os.pread(self._descriptor, length, offset)
        except OSError:
            return None
        return data if len(data) == length else None

    def close(self) -> None:
        """Let go of it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._names = -1, None

    def _open(self, location: Path, names: Sequence[bytes]) -> None:
        """Follow no link: somebody may have put one there."""
        opened = os.open(location, _OPEN)
        for name in names:
            above = opened
            try:
                opened = os.open(name, _OPEN, dir_fd=above)
            finally:
                os.close(above)
        status = os.fstat(opened)
        if stat.S_ISREG(status.st_mode):
            self._descriptor, self.size = opened, status.st_size
        else:
            os.close(opened)


class CommittedSeed:
    """A path in the local store, at ``location``. It may be collected, or changed, at any moment."""

    def __init__(self, location: Path) -> None:
        self._location = location
        self._file = _OpenFile()

    def read(self, names: Sequence[bytes], size: int, offset: int, length: int) -> bytes | None:
        """See :class:`Seed`."""
        if not self._file.look_at(self._location, names) or self._file.size != size:
            return None
        return self._file.read(offset, length)

    def rest(self) -> None:
        """See :class:`Seed`."""
        self._file.close()


class PartialSeed:
    """A NAR of which parts are here, as they were at a ``glance``; ``tree`` is its tree."""

    def __init__(self, tree: Tree, glance: NarGlance) -> None:
        self._tree = tree
        self._glance = glance
        self._file = _OpenFile()

    def read(self, names: Sequence[bytes], size: int, offset: int, length: int) -> bytes | None:
        """See :class:`Seed`."""
        entry = self._find(names)
        if entry is None or entry.kind is not EntryKind.REGULAR or entry.size != size:
            return None
        start = entry.offset + offset
        if any(self._glance.here.gaps(start, start + length)):
            return None
        return self._file.read(start, length) if self._file.look_at(self._glance.nar, ()) else None

    def rest(self) -> None:
        """See :class:`Seed`."""
        self._file.close()

    def _find(self, names: Sequence[bytes]) -> Entry | None:
        number: int | None = 0
        for name in names:
            number = None if number is None else self._tree.child(number, name)
        return None if number is None else self._tree.entries[number]
