"""A startup bundle on its way: its bytes become parts of NARs as they come.

What it has promised and not brought yet nobody asks for otherwise; whoever needs it waits for the stream, which is as
urgent as those who wait. Where the stream ends early, however, the promises are withdrawn, and all goes on with chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager
from typing import Final, TypeAlias

import trio

from fusesnap.errors import DeadlineExceeded, FusesnapError, Unavailable
from fusesnap.fetch.chunked_path import ChunkedPath
from fusesnap.fetch.events import BUNDLED, ObserveFetch, unobserved
from fusesnap.fetch.flight import Flight
from fusesnap.fetch.link import Link, Passage, PauseLost, Read
from fusesnap.fetch.part_events import PartEvents
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.reserving import Reservation, reservation
from fusesnap.nix.startup_bundle import (
    BundledExtent,
    BundleEvent,
    BundleHeader,
    BundleParser,
    ReadyExtent,
)
from fusesnap.nix.store_path import StorePath
from fusesnap.store.partial_nars import Extent
from fusesnap.store.room import Room
from fusesnap.substituter.base import Bookmark

# Seconds without a byte, although it has the link, after which a stream is given up: chunks may come from elsewhere.
SILENT: Final = 5.0
# The part of a start that may be missing for the stream to be left. Chunks with it are larger than its extents, and
# take a round trip more; but with the stream all that is here comes once more.
CHUNKS_FOR: Final = 1 / 8

Take: TypeAlias = Callable[[BundleHeader], Awaitable[Mapping[StorePath, ChunkedPath]]]


class _Bringing:
    """What a stream brings of one path: ``left`` are the extents that have not come."""

    def __init__(self, chunked: ChunkedPath, extents: Sequence[Extent], events: PartEvents) -> None:
        self.chunked = chunked
        self.left = dict.fromkeys(extents)
        self.flight = Flight(chunked.path, priority=Priority.TRACE)
        self.events = events
        self.over = False

    def begin(self, cache: str) -> None:
        """Bytes of it come from ``cache``."""
        self.flight.begin(cache, sum(extent.size for extent in self.left))
        self.events.board()
        self.events.begin(cache)

    def end(self, error: FusesnapError | None) -> None:
        """All of it is here, or no more comes and this is why."""
        if not self.over:
            self.over = True
            self.flight.land(error)
            self.events.land(error)


class BundleStream:
    """One response with a bundle, from the cache ``source``.

    ``take`` is told what the bundle says of itself, and gives those of its paths which its bytes are wanted of; it
    raises why the bundle is not used. ``room`` is that on the disk, ``observe`` hears of what comes. ``promised`` is
    called when readers wait for what is on its way.
    """

    def __init__(
        self,
        source: str,
        parser: BundleParser,
        take: Take,
        link: Link,
        room: Room,
        observe: ObserveFetch = unobserved,
        promised: Callable[[], object] = lambda: None,
    ) -> None:
        self._source = source
        self._parser = parser
        self._take = take
        self._link = link
        self._room = room
        self._observe = observe
        self._promised = promised
        self._passage: Passage | None = None
        self._scope = trio.CancelScope()
        self._given_up: str | None = None
        self._wanted: dict[StorePath, _Bringing] = {}
        self._due: deque[BundledExtent] = deque()  # in the order in which they come
        self._ready: deque[BundledExtent] = deque()  # written, and not told of
        self._unaccounted = 0  # bytes that came before it was known whose they are
        self._waiting = 0
        self._progressed = trio.current_time()
        self._taking = False
        self._enough = False

    # ------------------------------------------------------------ for whoever waits

    @property
    def is_paused(self) -> bool:
        """See ``Bringer``."""
        return self._passage is not None and self._passage.paused

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """See ``Bringer``."""
        self._waiting += 1
        self._tell_priority()
        try:
            yield
        finally:
            self._waiting -= 1
            self._tell_priority()

    def give_up(self, why: str) -> None:
        """See ``Bringer``."""
        self._given_up = self._given_up or why
        self._scope.cancel()

    def _tell_priority(self) -> None:
        if self._passage is not None:
            self._passage.become(Priority.READER if self._waiting else Priority.TRACE)

    # ------------------------------------------------------------ taking it

    async def run(self, read: Read) -> None:
        """Take the bytes that ``read`` gives, which opens the bundle where a bookmark says, to their end.

        Raises what ``take`` and ``read`` raise, ``UntrustedPath`` and ``InvalidData`` for what is wrong with the
        bundle, ``StorageFailure``, and ``DeadlineExceeded`` where it is too slow. What was verified before stays.
        """
        ended: FusesnapError = Unavailable(f"{self._source}: the process ends")
        failure: FusesnapError | None = ended
        try:
            with self._scope:
                await self._run(read)
            failure = None
            if self._given_up is not None:
                raise DeadlineExceeded(f"{self._source}: startup bundle: {self._given_up}")
        except PauseLost as error:
            failure = Unavailable(str(error))
            raise failure from error
        except FusesnapError as error:
            failure = error
            raise
        finally:
            self._withdraw(failure, and_ask=failure is not ended)

    async def _run(self, read: Read) -> None:
        failure: FusesnapError | PauseLost | None = None
        async with reservation(self._room) as reserved, trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            try:
                await self._receive(read, reserved)
            except (FusesnapError, PauseLost) as error:  # the nursery would make a group of it
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _receive(self, read: Read, reserved: Reservation) -> None:
        with self._link.passage(Priority.TRACE, self._source, None, foreseen=True) as self._passage:
            self._passage.paused_or_resumed = self._paused_or_resumed
            marked = _Marked(read)
            reading = self._passage.pieces(marked, self._resumed)
            async with aclosing(reading) as pieces:
                await self._feed_all(pieces, marked, reserved)

    async def _feed_all(
        self, pieces: AsyncIterator[bytes], marked: _Marked, reserved: Reservation
    ) -> None:
        load = self._passage.load if self._passage is not None else None
        async for piece in pieces:
            self._progressed = trio.current_time()
            if load is not None and load.remaining is None:
                load.remaining = marked.remaining
            self._account(len(piece))
            await self._feed(self._parser.feed(piece), reserved)
            if self._enough:
                return
        self._parser.finish()

    async def _feed(self, events: Iterator[BundleEvent], reserved: Reservation) -> None:
        while True:
            try:
                header = await trio.to_thread.run_sync(self._go_on, events)
            finally:  # what came before an error is here all the same
                self._note_ready()
            if header is None:
                return
            await self._promise(header, reserved)

    def _go_on(self, events: Iterator[BundleEvent]) -> BundleHeader | None:
        """Write what is complete; in a thread. Stops at the header."""
        for event in events:
            if isinstance(event, BundleHeader):
                return event
            self._put(event)
        return None

    def _put(self, ready: ReadyExtent) -> None:
        bringing = self._wanted.get(ready.extent.path)
        extent = _of_nar(ready.extent)
        if bringing is not None and extent in bringing.left:
            bringing.chunked.put_extent(extent, ready.data)
        self._ready.append(ready.extent)

    def _note_ready(self) -> None:
        while self._ready:
            bundled = self._ready.popleft()
            self._due.popleft()
            bringing, extent = self._wanted.get(bundled.path), _of_nar(bundled)
            if bringing is not None and extent in bringing.left:
                del bringing.left[extent]
                bringing.flight.progress(extent.size)
                if not bringing.left:
                    bringing.end(None)
                bringing.chunked.has_extent(self, extent)

    async def _promise(self, header: BundleHeader, reserved: Reservation) -> None:
        self._taking = True
        try:
            chunked = await self._take(header)
            await reserved.take(max(1, header.content_size))
        finally:
            self._taking = False
            self._progressed = trio.current_time()
        self._due.extend(header.extents)
        by_path: dict[StorePath, list[Extent]] = {path: [] for path in chunked}
        for bundled in header.extents:
            extent = _of_nar(bundled)
            wanted = chunked.get(bundled.path)
            if wanted is not None and wanted.lacks(extent.start, extent.end):
                by_path[bundled.path].append(extent)
        lacking = sum(extent.size for extents in by_path.values() for extent in extents)
        self._enough = lacking <= header.content_size * CHUNKS_FOR
        for path, extents in by_path.items():
            if self._enough:
                ranges = [(extent.start, extent.end) for extent in extents]
                chunked[path].want(ranges, Priority.TRACE)
            else:
                self._begin(chunked[path], extents)
        self._account(0)
        self._promised()

    def _begin(self, chunked: ChunkedPath, extents: Sequence[Extent]) -> None:
        events = PartEvents(self._observe, chunked.path, Priority.TRACE, BUNDLED)
        bringing = self._wanted[chunked.path] = _Bringing(chunked, extents, events)
        bringing.begin(self._source)
        ranges = [(extent.start, extent.end) for extent in extents]
        chunked.promise(self, bringing.flight, ranges)
        if not extents:
            bringing.end(None)

    def _withdraw(self, failure: FusesnapError | None, *, and_ask: bool) -> None:
        """Nothing more comes. What is missing is needed all the same: chunks of it are asked for, in that order."""
        wanted, self._wanted = self._wanted, {}
        for bringing in wanted.values():
            bringing.end(failure)
            left = bringing.chunked.withdraw(self)
            if left and and_ask:
                bringing.chunked.want(left, Priority.TRACE)

    # ------------------------------------------------------------ telling of it

    def _account(self, count: int) -> None:
        """So many bytes came; they are of the path whose extent is due."""
        self._unaccounted += count
        bringing = self._wanted.get(self._due[0].path) if self._due else None
        if bringing is not None and not bringing.over and self._unaccounted:
            bringing.events.receive(self._unaccounted)
            self._unaccounted = 0

    def _resumed(self, kept: int) -> None:
        self._progressed = trio.current_time()

    def _paused_or_resumed(self, paused: bool) -> None:
        self._progressed = trio.current_time()
        for bringing in self._wanted.values():
            if not bringing.over:
                bringing.events.paused_or_resumed(paused)

    async def _watch(self) -> None:
        """Give it up when it is silent. The clock stands still for what others keep from coming."""
        while (left := self._progressed + SILENT - trio.current_time()) > 0:
            await trio.sleep(left)
            if self._taking or self._passage is None or self._passage.paused or self._passage.waits:
                self._progressed = trio.current_time()
        self.give_up(f"nothing came for {SILENT:g} s")


class _Marked:
    """Opens what ``read`` opens, and remembers the bookmark."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._bookmark = Bookmark()

    def __call__(self, bookmark: Bookmark) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        self._bookmark = bookmark
        return self._read(bookmark)

    @property
    def remaining(self) -> int | None:
        """Bytes that are still to come, where anybody has said how many there are."""
        length = self._bookmark.length
        return None if length is None else max(0, length - self._bookmark.received)


def _of_nar(extent: BundledExtent) -> Extent:
    return Extent(extent.offset, extent.size, extent.digest)
