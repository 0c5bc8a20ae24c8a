"""The inside of store paths: what is committed is read from the local store, what is not is fetched first."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from fusesnap.errors import InvalidData, NotFound, Unavailable
from fusesnap.fetch.contents import Contents
from fusesnap.filesystem.accesses import Accesses
from fusesnap.filesystem.inode import Inode, InodeKind
from fusesnap.filesystem.nodes import FOREVER, Attributes, DirectoryEntry, directory
from fusesnap.filesystem.open_files import OpenFiles
from fusesnap.filesystem.waiting import Question, WaitingRequests
from fusesnap.nix.store_path import StorePath
from fusesnap.nix.tree import Entry, EntryKind, Tree
from fusesnap.store.local_store import LocalStore, Pin

# A path that is removed again as soon as it is fetched is no accident.
READ_ATTEMPTS = 3
GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}  # or something else is there

MODES = {
    EntryKind.DIRECTORY: stat.S_IFDIR | 0o555,
    EntryKind.REGULAR: stat.S_IFREG | 0o444,
    EntryKind.SYMLINK: stat.S_IFLNK | 0o777,
}


class StoreNodes:
    """Serves inodes of the kinds STORE and CLAIMED.

    No byte, size, entry or "no such file" below a path is answered before the path is committed, which is after it
    was verified. The one thing said earlier is that a CLAIMED root is a directory: the image's digest covers that.
    """

    def __init__(
        self,
        store: LocalStore,
        contents: Contents,
        open_files: OpenFiles,
        waiting: WaitingRequests,
        accesses: Accesses,
    ) -> None:
        self._accesses = accesses
        self._store = store
        self._contents = contents
        self._open_files = open_files
        self._waiting = waiting

    # ------------------------------------------------------ roots of paths

    def claimed_root(self, path: StorePath) -> Attributes:
        """The root of a path that a placeholder says is a directory, unfetched.

        Raises where that cannot be so: overlayfs would take an absence here, or another kind, for an empty directory.
        """
        pin = self._pinned(path)
        if self._store.is_committed(path) and not self._may_be_directory(path):
            raise InvalidData(f"{path}: the image's placeholder says directory, its NAR does not")
        return directory(Inode(InodeKind.CLAIMED, 0, pin.ordinal).number)

    async def root(self, path: StorePath, view: int, pid: int | None) -> Attributes:
        """The root of a path of unknown kind: known once the path is committed."""
        inode = Inode(InodeKind.STORE, 0, self._pinned(path).ordinal, view)
        self._accesses.accessed(inode.ordinal, pid)
        tree = self._contents.cached_tree(inode.ordinal)
        if tree is None:
            tree = await self._wait(Question("lookup", path, inode.number, pid=pid))
            inode = Inode(InodeKind.STORE, 0, self._pinned(path).ordinal, view)
        return _attributes(tree, inode)

    def _may_be_directory(self, path: StorePath) -> bool:
        with suppress(FileNotFoundError):  # collected meanwhile
            return stat.S_ISDIR(self._store.location(path).lstat().st_mode)
        return True

    # --------------------------------------------------------------- nodes

    async def attributes(self, inode: Inode, pid: int | None) -> Attributes:
        """See ``Nodes``."""
        if inode.kind is InodeKind.CLAIMED:
            return directory(inode.number)
        return _attributes(await self._tree(inode, pid, "getattr"), inode)

    async def lookup(self, parent: Inode, name: bytes, pid: int | None) -> Attributes | None:
        """See ``Nodes``."""
        tree, parent = await self._directory(parent, pid, "lookup", name)
        index = tree.child(parent.entry, name)
        if index is None:
            return None
        return _attributes(tree, _entry_inode(parent, index))

    def negative_timeout(self, parent: Inode) -> float:
        """A store path never gains a name."""
        return FOREVER

    async def entries(self, inode: Inode, pid: int | None) -> Sequence[DirectoryEntry]:
        """See ``Nodes``."""
        tree, inode = await self._directory(inode, pid, "readdir")
        found = []
        for index in tree.children(inode.entry):
            attributes = _attributes(tree, _entry_inode(inode, index))
            found.append(DirectoryEntry(tree.entries[index].name, attributes.inode, attributes))
        return found

    async def target(self, inode: Inode, pid: int | None) -> bytes:
        """See ``Nodes``."""
        entry = _entry(await self._tree(inode, pid, "readlink"), inode)
        if entry.kind is not EntryKind.SYMLINK:
            raise InvalidData(
                f"inode {inode}: asked for a link's target, but it is a {entry.kind.name}"
            )
        return entry.target

    async def open(self, inode: Inode, pid: int | None) -> None:
        """See ``Nodes``."""
        self._waiting.opened(inode.number, pid)
        tree = await self._tree(inode, pid, "open")
        self._accesses.opened(inode.ordinal, tree, inode.entry, pid)

    async def open_directory(self, inode: Inode, pid: int | None) -> None:
        """See ``Nodes``."""
        self._waiting.opened(inode.number, pid)
        await self._directory(inode, pid, "opendir")

    async def read(self, inode: Inode, offset: int, size: int) -> bytes:
        """See ``Nodes``. No await lies between finding the descriptor and using it: nothing can close it meanwhile.

        What is not committed is read from its NAR, by the chunk, as far as that can be had so. A path may have been
        collected, or removed by somebody, since its tree was read; then it is fetched again.
        """
        self._accesses.read(inode.ordinal, inode.entry, offset, size)
        for _ in range(READ_ATTEMPTS):
            descriptor = self._open_files.get(inode.number)
            if descriptor is None:
                tree = await self._tree(inode, None, "read")
                descriptor = self._open(inode, tree)
            if descriptor is not None:
                return os.pread(descriptor, size, offset)
            data = await self._part(inode, tree, offset, size)
            if data is not None:
                return data
            self._contents.forget_tree(inode.ordinal)
        raise Unavailable(
            f"{self._pin(inode).info.store_path}: removed {READ_ATTEMPTS} times while it was read"
        )

    async def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        """A NAR has none."""
        return {}

    # ------------------------------------------------------------- private

    def _open(self, inode: Inode, tree: Tree) -> int | None:
        """A descriptor of a file that the tree has, or ``None`` where it is not on disk any more."""
        location = os.fsencode(self._store.location(self._pin(inode).info.store_path))
        inner = tree.path(inode.entry)
        try:
            return self._open_files.open(
                inode.number,
                b"/".join((location, inner)) if inner else location,
                _entry(tree, inode).size,
            )
        except OSError as error:
            if error.errno not in GONE:
                raise
            return None

    async def _part(self, inode: Inode, tree: Tree, offset: int, size: int) -> bytes | None:
        """Bytes of a file of a path that is not committed, or ``None`` once it is."""
        entry, pin = _entry(tree, inode), self._pin(inode)
        path = pin.info.store_path
        start, size = entry.offset + offset, min(size, entry.size - offset)
        if size <= 0:
            return b""
        data = self._contents.at_hand(pin.ordinal, path, start, size)
        if data is None:
            data = await self._waiting.wait(
                Question("read", path, inode.number),
                lambda watch: self._contents.read(path, start, size, watch=watch),
            )
            self._check_same(pin)
        return data

    def _pinned(self, path: StorePath) -> Pin:
        pin = self._store.pinned(path)
        if pin is None:
            raise NotFound(f"{path}: no image on this node names it")
        return pin

    def _pin(self, inode: Inode) -> Pin:
        pin = self._store.pin_of(inode.ordinal)
        if pin is None:
            raise NotFound(f"inode {inode}: this state directory never gave out its ordinal")
        return pin

    async def _tree(self, inode: Inode, pid: int | None, operation: str, name: bytes = b"") -> Tree:
        self._accesses.accessed(inode.ordinal, pid)
        tree = self._contents.cached_tree(inode.ordinal)
        if tree is not None:
            return tree
        pin = self._pin(inode)
        tree = await self._wait(Question(operation, pin.info.store_path, inode.number, name, pid))
        self._check_same(pin)
        return tree

    async def _wait(self, question: Question) -> Tree:
        return await self._waiting.wait(
            question, partial(self._contents.tree, question.path, question.pid)
        )

    def _check_same(self, pin: Pin) -> None:
        """What was committed meanwhile must be what this inode was computed for."""
        now = self._store.pinned(pin.info.store_path)
        if now is None or now.ordinal != pin.ordinal:
            found = "nothing" if now is None else now.info.nar_hash
            raise InvalidData(
                f"{pin.info.store_path}: this mount shows the NAR {pin.info.nar_hash}, the store has {found}"
            )

    async def _directory(
        self, inode: Inode, pid: int | None, operation: str, name: bytes = b""
    ) -> tuple[Tree, Inode]:
        """The tree, and the inode of what is committed.

        Of a claimed root nothing was shown but that it is a directory, so it may be what its cache has by now.
        """
        if inode.kind is InodeKind.CLAIMED and self._contents.cached_tree(inode.ordinal) is None:
            self._accesses.accessed(inode.ordinal, pid)
            path = self._pin(inode).info.store_path
            tree = await self._wait(Question(operation, path, inode.number, name, pid))
            inode = Inode(InodeKind.STORE, 0, self._pinned(path).ordinal)
        else:
            tree = await self._tree(inode, pid, operation, name)
        kind = _entry(tree, inode).kind
        if kind is not EntryKind.DIRECTORY:
            raise InvalidData(
                f"{self._pin(inode).info.store_path}: the image's placeholder says directory, "
                f"its NAR says {kind.name.lower()}"
            )
        return tree, inode


def _entry(tree: Tree, inode: Inode) -> Entry:
    if inode.entry >= len(tree.entries):
        raise NotFound(f"inode {inode}: its NAR has {len(tree.entries)} entries")
    return tree.entries[inode.entry]


def _entry_inode(parent: Inode, index: int) -> Inode:
    return Inode(InodeKind.STORE, index, parent.ordinal, parent.view)


def _attributes(tree: Tree, inode: Inode) -> Attributes:
    entry = _entry(tree, inode)
    mode = MODES[entry.kind]
    if entry.kind is EntryKind.DIRECTORY:
        # A directory has one alias in a mount, so one that a view shows is not the one that the lazy layer shows.
        return Attributes(inode=inode.number, mode=mode)
    shared = Inode(inode.kind, inode.entry, inode.ordinal)  # one page cache for all views
    if entry.kind is EntryKind.SYMLINK:
        return Attributes(inode=shared.number, mode=mode, size=len(entry.target))
    return Attributes(
        inode=shared.number, mode=mode | (0o111 if entry.executable else 0), size=entry.size
    )
