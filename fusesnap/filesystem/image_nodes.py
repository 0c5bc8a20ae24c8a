"""The merged view of a standalone mount: an image's own tree, and the store laid over it.

Where an image's layer adds into a store path, both show: the image's names first, and of the store those that the image
neither has nor hides.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fusesnap.errors import InvalidData
from fusesnap.filesystem.inode import Inode, InodeKind
from fusesnap.filesystem.nodes import FOREVER, Attributes, DirectoryEntry
from fusesnap.filesystem.store_nodes import StoreNodes
from fusesnap.nix.store_path import StorePath
from fusesnap.nix.tree import EntryKind

# Directories of a store path that a view shows carry the view in their inode; a standalone mount has one view.
VIEW = 1
MOUNT_ROOT = Inode(InodeKind.FIXED, 1)  # FUSE_ROOT_ID


class ImageNode(Protocol):
    """One file of an image. Sizes in bytes, times in nanoseconds since 1970."""

    @property
    def st_mode(self) -> int:
        """Kind and permissions."""

    @property
    def name(self) -> bytes:
        """Its name in its directory."""

    @property
    def uid(self) -> int:
        """Owner."""

    @property
    def gid(self) -> int:
        """Group."""

    @property
    def mtime_ns(self) -> int:
        """When it was changed last."""

    @property
    def size(self) -> int:
        """Of the contents or the target."""

    @property
    def target(self) -> bytes:
        """Where a link points."""

    @property
    def rdev(self) -> int:
        """Which device it is."""

    @property
    def nlink(self) -> int:
        """How many names it has."""

    @property
    def xattrs(self) -> Iterable[tuple[bytes, bytes]]:
        """Extended attributes."""

    @property
    def inode(self) -> int:
        """The number of the first node that names the same file."""

    @property
    def layer(self) -> int | None:
        """Which layer has an entry for it; none for a directory that is there because something is in it."""


class ImageTree(Protocol):
    """An image's merged layers, as nodes with small numbers; the root is 0."""

    @property
    def store_directory(self) -> int | None:
        """The node of the store directory."""

    def node(self, index: int) -> ImageNode:
        """One node."""

    def child(self, index: int, name: bytes) -> int | None:
        """The node of that name in a directory."""

    def children(self, index: int) -> Sequence[int]:
        """The nodes in a directory."""

    def parent(self, index: int) -> int:
        """The directory that a node is in."""

    def placeholder(self, index: int) -> StorePath | None:
        """The store path whose content shows at a node."""

    def hidden(self, index: int) -> frozenset[bytes]:
        """Names of a directory of which nothing lower shows."""

    def opaque(self, index: int) -> bool:
        """Whether nothing lower shows in a directory at all."""

    def read(self, index: int, offset: int, size: int) -> bytes:
        """Bytes of a file."""


@dataclass(frozen=True, slots=True)
class Beneath:
    """What of the store lies beneath a directory of the image: ``names`` lead to it from the root of ``path``."""

    path: StorePath
    names: tuple[bytes, ...]


class ImageNodes:
    """Serves inodes of the kinds IMAGE and, for the mount's root, FIXED.

    ``paths`` are the store paths whose content shows: the closures of the image's Nix layers without those that layers
    above replaced.
    """

    def __init__(
        self, tree: ImageTree, paths: frozenset[StorePath], store_nodes: StoreNodes
    ) -> None:
        self._tree = tree
        self._names = {path.base_name.encode(): path for path in paths}
        self._store_nodes = store_nodes
        self._beneath_known: dict[int, Beneath | None] = {}

    async def attributes(self, inode: Inode, pid: int | None) -> Attributes:
        """See ``Nodes``."""
        return self._attributes(_index(inode))

    async def lookup(self, parent: Inode, name: bytes, pid: int | None) -> Attributes | None:
        """See ``Nodes``."""
        index = _index(parent)
        child = self._tree.child(index, name)
        path = self._store_path(index, name)
        if path is not None and (child is None or not self._tree.children(child)):
            return await self._store_nodes.root(path, VIEW, pid)
        if child is not None:
            return self._attributes(child)
        if name in self._tree.hidden(index):
            return None
        beneath = await self._store_directory(index, pid)
        return None if beneath is None else await self._store_nodes.lookup(beneath, name, pid)

    def negative_timeout(self, parent: Inode) -> float:
        """An image never changes."""
        return FOREVER

    async def entries(self, inode: Inode, pid: int | None) -> Sequence[DirectoryEntry]:
        """See ``Nodes``. Store paths come as names alone: listing the store directory fetches nothing."""
        index = _index(inode)
        found = {
            node.name: self._listed(index, child, node)
            for child in self._tree.children(index)
            for node in [self._tree.node(child)]
        }
        if index == self._tree.store_directory:
            for number, name in enumerate(sorted(self._names.keys() - found.keys())):
                found[name] = DirectoryEntry(name, Inode(InodeKind.IMAGE, number, VIEW).number)
        beneath = await self._store_directory(index, pid)
        if beneath is not None:
            hidden = self._tree.hidden(index)
            for entry in await self._store_nodes.entries(beneath, pid):
                if entry.name not in found and entry.name not in hidden:
                    found[entry.name] = entry
        return list(found.values())

    async def target(self, inode: Inode, pid: int | None) -> bytes:
        """See ``Nodes``."""
        return self._tree.node(_index(inode)).target

    async def open(self, inode: Inode, pid: int | None) -> None:
        """The layers' files are open as long as the mount is there."""

    async def open_directory(self, inode: Inode, pid: int | None) -> None:
        """See ``Nodes``: only what lies beneath in the store may have to be waited for."""
        await self._store_directory(_index(inode), pid)

    async def read(self, inode: Inode, offset: int, size: int) -> bytes:
        """See ``Nodes``."""
        return self._tree.read(_index(inode), offset, size)

    async def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        """See ``Nodes``."""
        return dict(self._tree.node(_index(inode)).xattrs)

    # ------------------------------------------------------------- private

    def _store_path(self, directory: int, name: bytes) -> StorePath | None:
        return self._names.get(name) if directory == self._tree.store_directory else None

    def _listed(self, directory: int, child: int, node: ImageNode) -> DirectoryEntry:
        number = _number(node, child)
        bare = self._store_path(directory, node.name) is not None and not self._tree.children(child)
        return DirectoryEntry(node.name, number, None if bare else self._attributes(child))

    def _attributes(self, index: int) -> Attributes:
        node = self._tree.node(index)
        number = _number(node, index)
        if node.layer is None and self._beneath(index) is not None:
            return Attributes(inode=number, mode=stat.S_IFDIR | 0o555)  # as the store has it
        return Attributes(
            inode=number,
            mode=node.st_mode,
            size=node.size,
            nlink=node.nlink,
            uid=node.uid,
            gid=node.gid,
            rdev=node.rdev,
            mtime_ns=node.mtime_ns,
        )

    def _beneath(self, index: int) -> Beneath | None:
        """What of the store an image's directory is merged with; found by going up to the placeholder."""
        if index not in self._beneath_known:
            self._beneath_known[index] = self._find_beneath(index)
        return self._beneath_known[index]

    def _find_beneath(self, index: int) -> Beneath | None:
        if self._tree.opaque(index) or not self._tree.children(index):
            return None
        path = self._tree.placeholder(index)
        if path is not None:
            return Beneath(path, ())
        parent = self._tree.parent(index)
        name = self._tree.node(index).name
        if parent == index or name in self._tree.hidden(parent):
            return None
        above = self._beneath(parent)
        return None if above is None else Beneath(above.path, (*above.names, name))

    async def _store_directory(self, index: int, pid: int | None) -> Inode | None:
        """The store's directory beneath the image's directory ``index``, if there is one."""
        beneath = self._beneath(index)
        if beneath is None:
            return None
        here = await self._store_nodes.root(beneath.path, VIEW, pid)
        if not stat.S_ISDIR(here.mode):
            raise InvalidData(
                f"{beneath.path}: a layer adds files to it as to a {EntryKind.DIRECTORY.name.lower()}, "
                "its NAR is none"
            )
        for name in beneath.names:
            found = await self._store_nodes.lookup(Inode.parse(here.inode), name, pid)
            if found is None or not stat.S_ISDIR(found.mode):
                return None
            here = found
        return Inode.parse(here.inode)


def _index(inode: Inode) -> int:
    return 0 if inode == MOUNT_ROOT else inode.entry


def _number(node: ImageNode, index: int) -> int:
    return MOUNT_ROOT.number if index == 0 else Inode(InodeKind.IMAGE, node.inode).number
