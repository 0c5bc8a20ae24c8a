"""Fetches ahead what the dynamic loader is about to ask for.

A program that is started cold asks for its libraries one after another, and each of them is in another store path: a
round trip and a transfer each, in series. But an ELF file says which libraries it needs and in which store paths to
look (DT_NEEDED, DT_RUNPATH), and so do they. What this follows is what ld.so(8) does, so it fetches what a start
touches, and nothing else.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import trio

from fusesnap.errors import FusesnapError, InvalidData
from fusesnap.fetch.contents import Contents
from fusesnap.fetch.priority import Priority
from fusesnap.nix.elf import Dynamic, read_dynamic
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.tree import Entry, EntryKind, Tree
from fusesnap.store.local_store import LocalStore, Pin
from fusesnap.store.storage_errors import storage

log = logging.getLogger(__name__)

# Bytes of a program or library that is fetched as soon as it is opened: it is mapped, and read a page here and a page
# there, each a round trip. Of a larger one most is never touched.
MAPPED_AT_MOST = 8 * 1024 * 1024
# Bytes of its two ends in which what is looked for is, in most: the headers and the names of symbols, and what they are
# relocated by. One after the other they would take a round trip each.
HEAD = 128 * 1024
TAIL = 64 * 1024
MAX_LINKS = 40  # as many as Linux follows in one path
MAX_FOLLOWED = 4096  # files that one start leads to; a loop of a stranger's making ends somewhere


class Loader:
    """Follows what was opened, in ``nursery``, behind the back of whoever opened it; nothing unless it ``follows``."""

    def __init__(
        self,
        store: LocalStore,
        store_dir: StoreDir,
        contents: Contents,
        nursery: trio.Nursery,
        *,
        follows: bool = True,
    ) -> None:
        self._store = store
        self._prefix = os.fsencode(store_dir.path) + b"/"
        self._contents = contents
        self._nursery = nursery
        self._follows = follows
        self._followed: set[tuple[int, int]] = set()

    def opened(self, ordinal: int, tree: Tree, index: int) -> None:
        """Somebody opened a file of a path. Returns at once; what cannot be followed is let be."""
        if self._is_new(ordinal, tree, index):
            self._nursery.start_soon(self._follow, ordinal, tree, index, Priority.TRACE)

    async def follow(self, ordinal: int, tree: Tree, index: int, priority: Priority) -> None:
        """The same for who will perhaps open it: what it leads to is as urgent as this.

        Returns when all of that was asked for.
        """
        if self._is_new(ordinal, tree, index):
            await self._follow(ordinal, tree, index, priority)

    def _is_new(self, ordinal: int, tree: Tree, index: int) -> bool:
        """Whether it may be a program or a library, and was not followed before."""
        entry = tree.entries[index]
        may_be = entry.kind is EntryKind.REGULAR and (entry.executable or b".so" in entry.name)
        if not self._follows or not may_be or (ordinal, index) in self._followed:
            return False
        if len(self._followed) >= MAX_FOLLOWED:
            self._followed.clear()
        self._followed.add((ordinal, index))
        return True

    async def _follow(self, ordinal: int, tree: Tree, index: int, priority: Priority) -> None:
        pin = self._store.pin_of(ordinal)
        if pin is None or self._contents.is_streamed(pin.info.store_path):
            return
        inner = tree.path(index)
        location = self._store.location(pin.info.store_path)
        if inner:
            location /= os.fsdecode(inner)
        try:
            entry = tree.entries[index]
            ends = [(0, HEAD), (max(0, entry.size - TAIL), entry.size)]
            await self._contents.want_parts(pin.info.store_path, entry, ends, priority)
            if entry.size <= MAPPED_AT_MOST:
                await self._contents.want_file(pin.info.store_path, entry)
            dynamic = await self._dynamic_of(pin.info.store_path, entry, location, priority)
            if dynamic is None:
                return
            tables = [(each.offset, each.offset + each.size) for each in dynamic.tables]
            await self._contents.want_parts(pin.info.store_path, entry, tables, priority)
            await self._fetch(dynamic, priority)
        except FusesnapError as error:
            # Whoever really wants it will be told; this was only a guess.
            log.debug("%s: not followed: %s", location, error)

    async def _dynamic_of(
        self, path: StorePath, entry: Entry, location: Path, priority: Priority
    ) -> Dynamic | None:
        """What the loader will want of a file, wherever its bytes are by now. Raises as ``Contents.read``."""
        reader = read_dynamic()
        wanted = next(reader)
        try:
            while not self._store.is_committed(path):
                size = max(0, min(wanted.size, entry.size - wanted.offset))
                data = await self._contents.read(
                    path, entry.offset + wanted.offset, size, priority=priority
                )
                if data is not None:
                    wanted = reader.send(data)
        except StopIteration as end:
            found: Dynamic | None = end.value
            return found
        return await trio.to_thread.run_sync(dynamic_of, location)

    async def _fetch(self, dynamic: Dynamic, priority: Priority) -> None:
        places = list(self._places(dynamic.search))
        interpreter = list(self._places([dynamic.interpreter]))
        paths = list(dict.fromkeys(pin.info.store_path for pin, _ in (*interpreter, *places)))
        self._contents.request(paths, priority)
        async with trio.open_nursery() as nursery:
            for pin, names in interpreter:
                await self._open(pin, names, priority, nursery)
            for library in dynamic.needed:
                for pin, directory in places:
                    if await self._open(pin, [*directory, library], priority, nursery):
                        break

    async def _open(
        self, pin: Pin, names: list[bytes], priority: Priority, nursery: trio.Nursery
    ) -> bool:
        """Go on with the file at ``names`` in a path, in ``nursery``, if it is there."""
        tree = await self._contents.tree(pin.info.store_path, priority=priority)
        found = resolve(tree, names)
        if found is not None:
            nursery.start_soon(self.follow, pin.ordinal, tree, found, priority)
        return found is not None

    def _places(self, directories: Iterable[bytes]) -> Iterator[tuple[Pin, list[bytes]]]:
        """Those directories that are in store paths which an image on this node names, with what leads there."""
        for directory in directories:
            if not directory.startswith(self._prefix):
                continue
            base_name, *rest = directory.removeprefix(self._prefix).split(b"/")
            try:
                path = StorePath.parse_base_name(base_name.decode("ascii"))
            except (InvalidData, UnicodeDecodeError):
                continue
            pin = self._store.pinned(path)
            if pin is not None:
                yield pin, [name for name in rest if name not in (b"", b".")]


def dynamic_of(location: Path) -> Dynamic | None:
    """What the loader will want of a file; blocking. Raises ``StorageFailure``."""
    reader = read_dynamic()
    with storage("read", location), location.open("rb") as file:
        wanted = next(reader)
        try:
            while True:
                wanted = reader.send(os.pread(file.fileno(), wanted.size, wanted.offset))
        except StopIteration as end:
            found: Dynamic | None = end.value
            return found


def resolve(tree: Tree, names: list[bytes]) -> int | None:
    """The entry at ``names`` from the root of a tree, links within it followed; ``None`` where they lead out of it."""
    waiting = list(reversed(names))
    here, links = 0, 0
    while waiting:
        name = waiting.pop()
        if name == b"..":
            if here == 0:
                return None
            here = tree.entries[here].parent
            continue
        child = tree.child(here, name)
        if child is None:
            return None
        if tree.kind(child) is not EntryKind.SYMLINK:
            here = child
            continue
        target, links = tree.link_target(child), links + 1
        if target.startswith(b"/") or links > MAX_LINKS:
            return None
        waiting += [part for part in reversed(target.split(b"/")) if part not in (b"", b".")]
    return here
