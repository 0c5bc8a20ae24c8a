"""A link and a cache at its other end, on a virtual clock: what is sent when, to the byte."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import trio

from fusesnap.errors import Unavailable
from fusesnap.fetch.bandwidth import Bandwidth
from fusesnap.fetch.link import Passage, Read, open_link
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.scheduler import LinkLimits
from fusesnap.substituter.base import Bookmark

PIECE = 16 * 1024


@dataclass(frozen=True)
class Asked:
    """A request: when it was sent, for which file, from which byte on."""

    at: float
    name: str
    start: int


class Wire:
    """A link of ``rate`` bytes a second, on which a request takes ``round_trip`` seconds to its first byte.

    ``share``: bytes a second that the cache gives a connection at most. ``ranges``: whether it can begin in the middle
    of a file. ``silent``: files of which nothing comes. ``patience``: seconds after which it closes a connection that
    nobody reads from.
    """

    def __init__(self, rate: float = 2.5e6, round_trip: float = 0.08) -> None:
        self.rate = rate
        self.round_trip = round_trip
        self.share = math.inf
        self.ranges: bool | None = True
        self.silent: set[str] = set()
        self.patience = math.inf
        self.requests: list[Asked] = []
        self.sent = 0
        self.open = 0
        self.most_open = 0
        self._free_at = 0.0

    def file(self, name: str, size: int) -> Read:
        """How the file of that name is read."""

        @asynccontextmanager
        async def read(bookmark: Bookmark) -> AsyncGenerator[AsyncIterator[bytes]]:
            async with aclosing(self._send(name, size, bookmark)) as pieces:
                yield pieces

        return read

    def asked(self, name: str) -> list[int]:
        """From where on a file was asked for, in order."""
        return [each.start for each in self.requests if each.name == name]

    async def _send(self, name: str, size: int, bookmark: Bookmark) -> AsyncGenerator[bytes]:
        self.requests.append(Asked(trio.current_time(), name, bookmark.received))
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        try:
            await trio.sleep(self.round_trip)
            bookmark.resumable = self.ranges
            if name in self.silent:
                await trio.sleep_forever()
            while bookmark.received < size:
                count = min(PIECE, size - bookmark.received)
                began = trio.current_time()
                self._free_at = max(self._free_at, began) + count / self.rate
                await trio.sleep_until(max(self._free_at, began + count / self.share))
                bookmark.received += count
                self.sent += count
                given = trio.current_time()
                yield bytes(count)
                if trio.current_time() - given > self.patience:
                    raise Unavailable("the cache has closed the connection")
        finally:
            self.open -= 1


class Node:
    """Transfers over the wire, each in a task, with the time at which each was complete."""

    def __init__(
        self,
        wire: Wire,
        nursery: trio.Nursery,
        limits: LinkLimits | None = None,
        bandwidth: int = 0,
    ) -> None:
        self.wire = wire
        self.bandwidth = Bandwidth(bandwidth)
        self.link = open_link(nursery, limits, self.bandwidth)
        self.done: dict[str, float] = {}
        self._one_done = trio.Event()
        self.resumed: dict[str, list[int]] = {}
        self.pauses: dict[str, list[bool]] = {}  # what was told of each: paused, or resumed
        self.passages: dict[str, Passage] = {}
        self._nursery = nursery

    def fetch(
        self, name: str, size: int, priority: Priority, *, source: str = "a", work: float = 0.0
    ) -> None:
        """Begin a transfer; ``work`` is how many seconds each piece takes to be dealt with."""
        self._nursery.start_soon(self._fetch, name, size, priority, source, work)

    async def _fetch(
        self, name: str, size: int, priority: Priority, source: str, work: float
    ) -> None:
        with self.link.passage(priority, source, size) as passage:
            self.passages[name] = passage
            passage.paused_or_resumed = self.pauses.setdefault(name, []).append
            resumed = self.resumed.setdefault(name, []).append
            came = 0
            async with aclosing(passage.pieces(self.wire.file(name, size), resumed)) as pieces:
                async for piece in pieces:
                    came += len(piece)
                    await trio.sleep(work)
            assert came == size
            self.done[name] = trio.current_time()
            self._one_done.set()
            self._one_done = trio.Event()

    async def all_done(self, *names: str) -> None:
        """Return when these are complete."""
        while not self.done.keys() >= set(names):
            await self._one_done.wait()
