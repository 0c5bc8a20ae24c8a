"""Of what kind a store path is, without fetching all of it: a NAR says that in its first bytes.

What is read here of a path that is not committed is not verified: the rest of the NAR would have to be there for that.
It serves those who make images, whose placeholders say kinds; a reader of such an image never sees it unverified, and
meets an error, loud, where the NAR turns out to be something else.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from typing import Final

import trio

from fusesnap.errors import ClosureUnavailable, FusesnapError, InvalidData
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.realiser import Realiser
from fusesnap.nix.compression import decompressor
from fusesnap.nix.nar import DirectoryStart, NarEvent, NarParser, NeedData, RegularFile, Symlink
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.store_path import StorePath
from fusesnap.nix.tree import EntryKind, Tree
from fusesnap.store.local_store import LocalStore
from fusesnap.store.storage_errors import storage
from fusesnap.substituter.pool import SubstituterPool
from fusesnap.substituter.retry import PartsUnsupported

# Where a cache cannot send a part, each is a connection of its own, which is closed when the first bytes are there.
AT_ONCE: Final = 8
# Of a NAR's file, to begin with: what zstd compresses at once has at most 128 KiB, and headers before it.
_PART: Final = 160 * 1024
# The root of a NAR begins within 112 bytes; the target of a link has at most 4,095.
_MOST: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Root:
    """The root of a store path: its kind, and the target of a link."""

    kind: EntryKind
    target: bytes = b""


class KindFinder:
    """Asks the store first, then the caches. ``pay`` is called for so many bytes, and returns when more may come."""

    def __init__(
        self,
        store: LocalStore,
        pool: SubstituterPool,
        realiser: Realiser,
        pay: Callable[[int], Awaitable[None]],
    ) -> None:
        self._store = store
        self._pool = pool
        self._realiser = realiser
        self._pay = pay

    async def roots(self, paths: Iterable[StorePath]) -> Mapping[StorePath, Root]:
        """Say what each path is. Raises ClosureUnavailable with one error a path that cannot be had."""
        found: dict[StorePath, Root] = {}
        failures: dict[StorePath, FusesnapError] = {}
        turns = trio.CapacityLimiter(AT_ONCE)

        async def find(path: StorePath) -> None:
            async with turns:
                try:
                    found[path] = await self._root(path)
                except FusesnapError as error:
                    failures[path] = error

        async with trio.open_nursery() as nursery:
            for path in sorted(set(paths)):
                nursery.start_soon(find, path)
        if failures:
            raise ClosureUnavailable(failures[path] for path in sorted(failures))
        return found

    async def _root(self, path: StorePath) -> Root:
        there = await trio.to_thread.run_sync(self._committed, path)
        if there is not None:
            return there
        try:
            return await self._first_bytes(path)
        except FusesnapError:
            # What fetches knows how to go on: with another cache, after a while. It says too why not.
            return _root_of(await self._realiser.realise(path, priority=Priority.PREFETCH))

    def _committed(self, path: StorePath) -> Root | None:
        if not self._store.is_committed(path):
            return None
        location = self._store.location(path)
        with storage("look at", location):
            mode = location.lstat().st_mode
            if stat.S_ISLNK(mode):
                return Root(EntryKind.SYMLINK, os.fsencode(location.readlink()))
        return Root(EntryKind.DIRECTORY if stat.S_ISDIR(mode) else EntryKind.REGULAR)

    async def _first_bytes(self, path: StorePath) -> Root:
        offer = await self._pool.find(path)
        info = offer.narinfo
        if info.file_size is not None and info.file_size > _PART:
            with suppress(PartsUnsupported):
                root = await self._read(info, offer.substituter.part(info, 0, _PART))
                if root is not None:
                    return root
        root = await self._read(info, offer.substituter.nar(info))
        if root is None:
            raise InvalidData(f"{path}: its NAR ends before it begins")
        return root

    async def _read(
        self, info: NarInfo, opening: AbstractAsyncContextManager[AsyncIterator[bytes]]
    ) -> Root | None:
        """Read a NAR's file, or the beginning of it, as far as its first object; None where that does not come."""
        reader = _Reader(info)
        async with opening as pieces:
            async for piece in pieces:
                await self._pay(len(piece))
                root = reader.receive(piece)
                if root is not None:
                    return root
        return None


class _Reader:
    """Reads a NAR's file up to its first object."""

    def __init__(self, info: NarInfo) -> None:
        self._path = info.store_path
        self._decompressor = decompressor(info.compression)
        self._parser = NarParser()
        self._received = 0

    def receive(self, piece: bytes) -> Root | None:
        for data in self._decompressor.decompress(piece):
            self._received += len(data)
            self._parser.receive_data(data[:_MOST])
            event = self._parser.next_event()
            if not isinstance(event, NeedData):
                return _root_from(event)
            if self._received > _MOST:
                raise InvalidData(f"{self._path}: its NAR does not begin within {_MOST} bytes")
        return None


def _root_from(event: NarEvent) -> Root:
    match event:
        case DirectoryStart():
            return Root(EntryKind.DIRECTORY)
        case RegularFile():
            return Root(EntryKind.REGULAR)
        case Symlink(_, target):
            return Root(EntryKind.SYMLINK, target)
    raise InvalidData(f"NAR: begins with {event}")


def _root_of(tree: Tree) -> Root:
    return Root(tree.kind(0), tree.link_target(0))
