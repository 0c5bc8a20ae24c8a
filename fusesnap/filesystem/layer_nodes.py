"""The directories above the store paths in the daemon's one mount.

::

    /layer/.fusesnap-lazy/<hash>-<name>      every path that an image on this node names: the lazy layer
    /views/<ordinal>/nix/store/<hash>-<name> the paths of unknown kind, single files and links of one closure
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from fusesnap.errors import InvalidData
from fusesnap.filesystem.inode import MAX_VIEW, Inode, InodeKind
from fusesnap.filesystem.nodes import FOREVER, NOT_AT_ALL, Attributes, DirectoryEntry, directory
from fusesnap.filesystem.store_nodes import StoreNodes
from fusesnap.filesystem.views import Views
from fusesnap.nix.store_path import StorePath

LAZY_NAME = b".fusesnap-lazy"


class Fixed(IntEnum):
    """The entry part of inodes of kind FIXED. The mount's root is 1 because FUSE says so (FUSE_ROOT_ID)."""

    ROOT = 1
    LAYER = 2
    LAZY = 3
    VIEWS = 4
    VIEW = 5
    VIEW_NIX = 6
    VIEW_STORE = 7


# Which fixed directory a name leads to; views, their paths and lazy paths are looked up instead.
CHILDREN: dict[Fixed, dict[bytes, Fixed]] = {
    Fixed.ROOT: {b"layer": Fixed.LAYER, b"views": Fixed.VIEWS},
    Fixed.LAYER: {LAZY_NAME: Fixed.LAZY},
    Fixed.LAZY: {},
    Fixed.VIEWS: {},
    Fixed.VIEW: {b"nix": Fixed.VIEW_NIX},
    Fixed.VIEW_NIX: {b"store": Fixed.VIEW_STORE},
    Fixed.VIEW_STORE: {},
}


class LayerNodes:
    """Serves inodes of the kind FIXED."""

    def __init__(self, store_nodes: StoreNodes, views: Views) -> None:
        self._store_nodes = store_nodes
        self._views = views

    async def attributes(self, inode: Inode, pid: int | None) -> Attributes:
        """See ``Nodes``."""
        return directory(inode.number, 0o755)

    async def lookup(self, parent: Inode, name: bytes, pid: int | None) -> Attributes | None:
        """See ``Nodes``."""
        where = Fixed(parent.entry)
        if where is Fixed.LAZY:
            path = _store_path(name)
            return self._store_nodes.claimed_root(path) if path is not None else None
        if where is Fixed.VIEWS:
            return self._view(name)
        if where is Fixed.VIEW_STORE:
            path = _store_path(name)
            if path is None or path not in self._paths(parent):
                return None
            return await self._store_nodes.root(path, parent.view, pid)
        child = CHILDREN[where].get(name)
        if child is None:
            return None
        return directory(Inode(InodeKind.FIXED, child, view=parent.view).number, 0o755)

    def negative_timeout(self, parent: Inode) -> float:
        """New paths and views may come at any time; the rest is as it is."""
        return NOT_AT_ALL if parent.entry in (Fixed.LAZY, Fixed.VIEWS) else FOREVER

    async def entries(self, inode: Inode, pid: int | None) -> Sequence[DirectoryEntry]:
        """See ``Nodes``. Listing a view fetches nothing: names come without attributes.

        The lazy layer and the views are reached by redirects and options of mounts, never by listing; they show
        nothing, because any listing of theirs would be out of date when it arrives.
        """
        where = Fixed(inode.entry)
        if where is Fixed.VIEW_STORE:
            names = sorted(path.base_name.encode() for path in self._paths(inode))
            # The numbers only have to be there and to differ: the kernel looks a name up before it uses its node.
            return [
                DirectoryEntry(name, Inode(InodeKind.FIXED, 16 + i, view=inode.view).number)
                for i, name in enumerate(names)
            ]
        return [
            DirectoryEntry(name, number, directory(number, 0o755))
            for name, child in CHILDREN[where].items()
            for number in [Inode(InodeKind.FIXED, child, view=inode.view).number]
        ]

    async def target(self, inode: Inode, pid: int | None) -> bytes:
        """There are only directories here."""
        raise InvalidData(f"inode {inode} is a directory, not a link")

    async def open(self, inode: Inode, pid: int | None) -> None:
        """There are only directories here."""
        raise InvalidData(f"inode {inode} is a directory, not a file")

    async def open_directory(self, inode: Inode, pid: int | None) -> None:
        """Nothing here has to be waited for."""

    async def read(self, inode: Inode, offset: int, size: int) -> bytes:
        """There are only directories here."""
        raise InvalidData(f"inode {inode} is a directory, not a file")

    async def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        """See ``Nodes``.

        Overlayfs looks below a redirect's target in every further layer. The opaque mark ends that search here, so
        that an image's own /.fusesnap-lazy/X never merges into path X.
        """
        return {b"trusted.overlay.opaque": b"y"} if inode.entry == Fixed.LAZY else {}

    def _view(self, name: bytes) -> Attributes | None:
        if not name.isdigit() or int(name) > MAX_VIEW or self._views.paths(int(name)) is None:
            return None
        return directory(Inode(InodeKind.FIXED, Fixed.VIEW, view=int(name)).number, 0o755)

    def _paths(self, inode: Inode) -> frozenset[StorePath]:
        return self._views.paths(inode.view) or frozenset()


def _store_path(name: bytes) -> StorePath | None:
    try:
        return StorePath.parse_base_name(name.decode("ascii"))
    except (InvalidData, UnicodeDecodeError):
        return None  # no store path is spelled so: there is nothing by that name
