"""What of store paths is asked for through a mount, told to whoever was passed in to hear it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fusesnap.nix.tree import Tree


class Accesses(Protocol):
    """Hears of every request for the inside of a store path, before it is answered.

    Its methods must be quick and must not fail: every request of the mount goes through them. ``pid`` is the thread
    that asks, where the kernel says it; ``ordinal`` stands for a path and its NAR, ``entry`` is a position in that.
    """

    def accessed(self, ordinal: int, pid: int | None) -> None:
        """Something of a path is asked for."""
        ...

    def opened(self, ordinal: int, tree: Tree, entry: int, pid: int | None) -> None:
        """A file of it is opened, whose path is there."""
        ...

    def read(self, ordinal: int, entry: int, offset: int, size: int) -> None:
        """``size`` bytes from ``offset`` of a file are asked for. Who opened it last may not be who reads."""
        ...


class Opened:
    """Hears of files that are opened, and of nothing else; ``follow`` is told ordinal, tree and entry."""

    def __init__(self, follow: Callable[[int, Tree, int], None]) -> None:
        self._follow = follow

    def accessed(self, ordinal: int, pid: int | None) -> None:
        """See ``Accesses``."""

    def opened(self, ordinal: int, tree: Tree, entry: int, pid: int | None) -> None:
        """See ``Accesses``."""
        self._follow(ordinal, tree, entry)

    def read(self, ordinal: int, entry: int, offset: int, size: int) -> None:
        """See ``Accesses``."""


class Recorded:
    """Tells ``record`` of everything, and ``follow`` of files that are opened."""

    def __init__(self, record: Accesses, follow: Callable[[int, Tree, int], None]) -> None:
        self._follow = follow
        self._opened = record.opened
        self.accessed = record.accessed
        self.read = record.read

    def opened(self, ordinal: int, tree: Tree, entry: int, pid: int | None) -> None:
        """See ``Accesses``."""
        self._opened(ordinal, tree, entry, pid)
        self._follow(ordinal, tree, entry)
