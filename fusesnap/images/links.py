"""Links of store paths, followed from tree to tree within one closure."""

from __future__ import annotations

import posixpath
from collections.abc import Awaitable, Callable, Collection
from typing import Final

from fusesnap.errors import InvalidData
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.tree import EntryKind, Tree

# As Linux, which follows no more links than that for one name (path_resolution(7)).
MAX_LINKS: Final = 40

TreeOf = Callable[[StorePath], Awaitable[Tree]]


class Links:
    """The paths of ``closure``, as far as links lead from one into another.

    ``tree_of`` gives the tree of one, fetching it where it must. What leads out of the closure leads nowhere.
    """

    def __init__(
        self, closure: Collection[StorePath], tree_of: TreeOf, store_dir: StoreDir
    ) -> None:
        self._closure = closure
        self._tree_of = tree_of
        self._store_dir = store_dir

    async def follow(self, path: StorePath, inner: bytes) -> tuple[StorePath, int] | None:
        """Walk to ``inner`` within ``path``; returns where that is in the end, which is no link. None: nowhere."""
        for _ in range(MAX_LINKS):
            tree = await self._tree_of(path)
            index, rest = _walk(tree, inner)
            if index is None:
                return None
            if tree.kind(index) is not EntryKind.SYMLINK:
                return (path, index) if not rest else None
            target = self.target(path, tree.path(index), tree.link_target(index))
            if target is None:
                return None
            path, inner = target[0], b"/".join(filter(None, (target[1], rest)))
        return None

    async def kind_of(self, path: StorePath, inner: bytes) -> EntryKind | None:
        """Say what ``inner`` of ``path`` is in the end: a directory or a file; None where it leads nowhere."""
        found = await self.follow(path, inner)
        return None if found is None else (await self._tree_of(found[0])).kind(found[1])

    def target(self, path: StorePath, link: bytes, target: bytes) -> tuple[StorePath, bytes] | None:
        """Where a link at ``link`` of ``path`` leads: a store path and what is within; None: out of the store."""
        store = self._store_dir.path.encode()
        here = b"/".join(filter(None, (store, path.base_name.encode(), link)))
        return self.place(posixpath.join(posixpath.dirname(here), target))

    def place(self, name: bytes) -> tuple[StorePath, bytes] | None:
        """The store path of an absolute file name, and what is within; None: it is not in the closure."""
        full = posixpath.normpath(name)
        base, _, inner = full.removeprefix(self._store_dir.path.encode() + b"/").partition(b"/")
        if base == full:
            return None
        try:
            found = StorePath.parse_base_name(base.decode("ascii"))
        except (InvalidData, UnicodeDecodeError):
            return None
        return (found, inner) if found in self._closure else None


def _walk(tree: Tree, inner: bytes) -> tuple[int | None, bytes]:
    """Go down to ``inner``, but no further than to the first link; returns what is left behind that."""
    index = 0
    parts = inner.split(b"/") if inner else []
    for position, part in enumerate(parts):
        if tree.kind(index) is EntryKind.SYMLINK:
            return index, b"/".join(parts[position:])
        child = tree.child(index, part)
        if child is None:
            return None, b""
        index = child
    return index, b""
