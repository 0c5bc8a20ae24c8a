"""What each part of a mount answers, whatever serves it.

Words: a *node* is what an inode number names. A *name* is one component, as bytes. An *entry* is a name in a
directory, with the number of its node. A *part* of a mount serves the nodes of some inode kinds.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fusesnap.filesystem.inode import Inode
from fusesnap.nix.tree import STORE_MTIME_NS

# Everything under a store path is immutable, and the kernel may keep what it was told for as long as it likes.
FOREVER = 1e9
# Only the roots of views change, by growing or vanishing: there the kernel asks again each time.
NOT_AT_ALL = 0.0


@dataclass(frozen=True, slots=True)
class Attributes:
    """What stat(2) shows of a node, and for how many seconds the kernel may keep it.

    ``mode`` includes the file type, ``size`` is in bytes, ``mtime_ns`` in nanoseconds since 1970.
    """

    inode: int
    mode: int
    size: int = 0
    nlink: int = 1
    uid: int = 0
    gid: int = 0
    rdev: int = 0
    mtime_ns: int = STORE_MTIME_NS
    timeout: float = FOREVER


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """A name and the number of its node. ``attributes`` only where they are known without fetching anything."""

    name: bytes
    inode: int
    attributes: Attributes | None = None


def directory(inode: int, mode: int = 0o555, *, timeout: float = FOREVER) -> Attributes:
    """A directory as store paths have them."""
    return Attributes(inode=inode, mode=stat.S_IFDIR | mode, timeout=timeout)


class Nodes(Protocol):
    """One part of a mount. All methods raise ``FusesnapError`` where an answer cannot be verified.

    ``pid`` is the process that the kernel says is asking, where it says so: to be shown to people, never to decide.
    """

    async def attributes(self, inode: Inode, pid: int | None) -> Attributes:
        """The node's attributes."""
        ...

    async def lookup(self, parent: Inode, name: bytes, pid: int | None) -> Attributes | None:
        """The attributes of what ``name`` is in the directory ``parent``; ``None`` where there is nothing.

        ``None`` is a verified statement like any other.
        """
        ...

    def negative_timeout(self, parent: Inode) -> float:
        """For how many seconds the kernel may keep that ``lookup`` found nothing."""
        ...

    async def entries(self, inode: Inode, pid: int | None) -> Sequence[DirectoryEntry]:
        """All entries of a directory, in an order that is the same each time."""
        ...

    async def target(self, inode: Inode, pid: int | None) -> bytes:
        """Where a symbolic link points."""
        ...

    async def open(self, inode: Inode, pid: int | None) -> None:
        """Make sure that the contents can be read."""
        ...

    async def open_directory(self, inode: Inode, pid: int | None) -> None:
        """Make sure that the entries can be listed: here it is known who asks, in ``entries`` it is not."""
        ...

    async def read(self, inode: Inode, offset: int, size: int) -> bytes:
        """At most ``size`` bytes from ``offset``; fewer only at the end of the file."""
        ...

    async def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        """The node's extended attributes."""
        ...
