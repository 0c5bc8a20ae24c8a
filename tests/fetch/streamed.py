"""A startup bundle that a scripted cache sends, and a process that takes it."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import trio

from fusesnap.errors import FusesnapError
from fusesnap.fetch.bundle_stream import BundleStream
from fusesnap.fetch.chunked_path import ChunkedPath
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.startup_bundle import (
    BundledExtent,
    BundleHeader,
    BundleParser,
    ReadyExtent,
    write_bundle,
)
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.substituter.base import Bookmark

from ..substituter.samples import KEY, TRUSTED
from .lazy_node import Node
from .published import PublishedPath

PIECE = 4096
SOURCE = "memory://cache"


@dataclass(frozen=True)
class Bundled:
    """A bundle's file, and how much of it must have come for each of its extents to be there."""

    file: bytes
    header_end: int
    ends: tuple[int, ...]


def bundled(*parts: tuple[PublishedPath, bytes, int, int]) -> Bundled:
    """Of each part the path, the name of the file, the offset in it, and how many bytes."""
    infos = {path.path: path.info for path, *_ in parts}
    indexes = {path.path: path.index.to_bytes(KEY) for path, *_ in parts}
    extents, contents = [], []
    for path, name, offset, size in parts:
        entry = next(each for each in path.index.tree.entries if each.name == name)
        start = entry.offset + offset
        contents.append(path.nar[start : start + size])
        digest = hashlib.sha256(contents[-1]).digest()
        extents.append(BundledExtent(path.path, start, size, digest))
    header = BundleHeader(
        ClosureDigest.of(infos, StoreDir()),
        tuple(infos[path] for path in sorted(infos)),
        tuple(indexes.items()),
        tuple(extents),
    )
    return _measured(write_bundle(header, contents, KEY, StoreDir()))


def _measured(file: bytes) -> Bundled:
    parser, header_end, ends = BundleParser(TRUSTED, StoreDir()), 0, []
    for come in range(0, len(file), 256):
        for event in parser.feed(file[come : come + 256]):
            if isinstance(event, ReadyExtent):
                ends.append(min(come + 256, len(file)))
            else:
                header_end = come + 256
    return Bundled(file, header_end, tuple(ends))


class Sender:
    """Sends a file, as far as it may: up to ``until``, where it stops, or ``fails`` if that is said."""

    def __init__(self, file: bytes, until: int | None = None) -> None:
        self.file = file
        self.until = len(file) if until is None else until
        self.fails: FusesnapError | None = None
        self.ranges = True
        self.asked: list[int] = []  # from which byte on, each time
        self.sent = 0
        self._more = trio.Event()

    def send(self, until: int | None = None) -> None:
        """It may go on, to the end if nothing is said."""
        self.until = len(self.file) if until is None else until
        self._wake()

    def fail(self, error: FusesnapError) -> None:
        """Break the response off, where it is."""
        self.fails = error
        self._wake()

    def _wake(self) -> None:
        self._more.set()
        self._more = trio.Event()

    @asynccontextmanager
    async def read(self, bookmark: Bookmark) -> AsyncGenerator[AsyncIterator[bytes]]:
        async with aclosing(self._send(bookmark)) as pieces:
            yield pieces

    async def _send(self, bookmark: Bookmark) -> AsyncGenerator[bytes]:
        self.asked.append(bookmark.received)
        bookmark.resumable, bookmark.length = self.ranges, len(self.file)
        while bookmark.received < len(self.file):
            await trio.lowlevel.checkpoint()
            end = min(bookmark.received + PIECE, self.until)
            piece = self.file[bookmark.received : end]
            if piece:
                bookmark.received = self.sent = end
                yield piece
            elif self.fails is not None:
                raise self.fails
            else:
                await self._more.wait()


class Taking:
    """A process that takes a bundle."""

    def __init__(self, node: Node, sender: Sender) -> None:
        self.node = node
        self.sender = sender
        self.error: FusesnapError | None = None
        self.over = False
        self.stream = BundleStream(
            SOURCE,
            BundleParser(TRUSTED, StoreDir()),
            self._take,
            node.link,
            node.store.room,
            node.heard.append,
        )

    async def run(self) -> None:
        """To its end; what goes wrong is in ``error``."""
        try:
            await self.stream.run(self.sender.read)
        except FusesnapError as error:
            self.error = error
        self.over = True

    async def _take(self, header: BundleHeader) -> Mapping[StorePath, ChunkedPath]:
        found = {path: await self.node.chunked.find(path) for path, _ in header.indexes}
        return {path: chunked for path, chunked in found.items() if chunked is not None}
