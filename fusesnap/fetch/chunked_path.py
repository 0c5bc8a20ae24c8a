"""A store path of which single chunks are fetched.

Its index is known and signed, so its tree is told at once, and bytes of its files as soon as the chunks that hold them
are here and verified. One request carries what is missing and near: chunks beside one another are beside one another
in the cache's file too. What is fetched outlives who asked for it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Final

import trio

from fusesnap.errors import (
    DeadlineExceeded,
    FusesnapError,
    InvalidData,
    StorageFailure,
    Unavailable,
)
from fusesnap.fetch.events import ObserveFetch, Rebuilt, unobserved
from fusesnap.fetch.flight import Flight
from fusesnap.fetch.grouping import LARGEST_RUN, grouped
from fusesnap.fetch.guesses import SCATTERED_RUN, Guesses
from fusesnap.fetch.link import Link, PauseLost
from fusesnap.fetch.part_events import PartEvents
from fusesnap.fetch.part_of import part_of
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.promised import Bringer, Promised
from fusesnap.fetch.read_ahead import FURTHEST, before, reach
from fusesnap.fetch.rebuilding import Rebuilding
from fusesnap.fetch.reserving import reservation
from fusesnap.fetch.runs import FetchRun, RebuildRun, Run
from fusesnap.nix.chunk_table import Chunk
from fusesnap.nix.nar_index import NarIndex
from fusesnap.nix.store_path import StorePath
from fusesnap.nix.tree import Tree
from fusesnap.store.local_store import Pin
from fusesnap.store.partial_nars import Extent, PartialNar
from fusesnap.store.room import Room
from fusesnap.substituter.pool import Offer

# Bytes of the NAR that are taken at a time when the rest is fetched.
_PIECE: Final = 1024 * 1024


class ChunkedPath:
    """One path. ``offer`` finds who has its NAR; ``stall`` is in seconds; ``nursery`` holds the requests.

    ``observe`` hears of each request. ``room`` is that on the disk. What ``rebuilding`` makes of what is here is not
    asked for. ``guesses`` say what readers will want next.
    """

    def __init__(
        self,
        pin: Pin,
        index: NarIndex,
        partial: PartialNar,
        offer: Callable[[], Awaitable[Offer]],
        link: Link,
        nursery: trio.Nursery,
        stall: float,
        observe: ObserveFetch = unobserved,
        *,
        room: Room,
        rebuilding: Rebuilding,
        guesses: Guesses,
    ) -> None:
        self.pin = pin
        self._rebuilding = rebuilding
        self._room = room
        self._observe = observe
        self._index = index
        self._chunks = index.chunks
        self._partial = partial
        self._offer = offer
        self._link = link
        self._guesses = guesses
        self._nursery = nursery
        self._stall = stall
        self._source = ""  # the URL of the cache that was asked last
        self._coming: dict[int, Run] = {}  # by the chunk
        self._runs: set[Run] = set()
        self._promised = Promised()
        self._adopting = 0
        self._flight: Flight | None = None
        self._progressed = self.used = trio.current_time()
        self._closed = False
        self.is_foreseen = False  # a startup trace has told what will be read of it

    @property
    def path(self) -> StorePath:
        """Which path it is."""
        return self.pin.info.store_path

    @property
    def tree(self) -> Tree:
        """The tree, as the index tells it."""
        return self._index.tree

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        return not (self._runs or self._promised or self._adopting)

    @property
    def is_streamed(self) -> bool:
        """Whether a stream is bringing what a start reads of it."""
        return bool(self._promised)

    @property
    def is_empty(self) -> bool:
        """Whether no chunk is here."""
        return self._partial.is_empty

    @property
    def flight(self) -> Flight | None:
        """What is being fetched now, for people to see."""
        return self._flight or self._promised.flight

    @property
    def source(self) -> str:
        """The URL of the cache that was asked last; empty before."""
        return self._source

    @property
    def file_size(self) -> int:
        """Bytes of the file."""
        return self._chunks.file_size

    @property
    def remaining(self) -> int:
        """Bytes of the file that are still to be fetched."""
        missing = self._partial.missing(range(len(self._chunks)))
        return sum(self._chunks[number].file_size for number in missing)

    def close(self) -> None:
        """Let go of its files, as soon as nothing writes to them. Who still reads is told that there is nothing."""
        self._closed = True
        self._let_go()

    def _let_go(self) -> None:
        if self._closed and self.is_idle:
            self._partial.close()

    async def read(
        self,
        offset: int,
        size: int,
        watch: Callable[[Flight], None] = lambda _: None,
        priority: Priority = Priority.READER,
    ) -> bytes | None:
        """``size`` bytes of the NAR from ``offset``; None where this was closed meanwhile.

        ``watch`` is told what is waited for. Raises why a chunk cannot be had (``Unavailable``, ``PathNotFound``,
        ``InvalidData`` where it is not the one that the index tells of, ``StorageFailure``), or ``DeadlineExceeded``.
        """
        self.used = trio.current_time()
        await self._ensure(offset, offset + size, watch, priority)
        return None if self._closed else self._partial.read(offset, size)

    def want(self, ranges: Iterable[tuple[int, int]], priority: Priority) -> None:
        """Have bytes of the NAR fetched, each range from its start up to its end, without waiting for them."""
        if self._closed:
            return
        self.used = trio.current_time()
        gaps = [gap for start, end in ranges for gap in self._partial.gaps(start, end)]
        self._ask(self._numbers(self._promised.without(gaps)), priority)

    def foresee(self) -> None:
        """A startup trace tells what is read of it: what was guessed of that, and has not begun, is not asked for."""
        self.is_foreseen = True
        for run in [each for each in self._runs if each.waits and each.priority >= Priority.REST]:
            self._withdraw(run)

    def at_hand(self, offset: int, size: int) -> bytes | None:
        """The same without waiting: None unless all of it is here."""
        if self._closed or self._partial.gaps(offset, offset + size):
            return None
        self.used = trio.current_time()
        return self._partial.read(offset, size)

    async def nar(
        self, priority: Callable[[], Priority], progress: Callable[[int], None]
    ) -> AsyncGenerator[bytes]:
        """The whole NAR in pieces, fetching what is missing as urgently as ``priority`` says each time.

        ``progress`` is told how many bytes of the file are here more than before. Raises as :meth:`read`.
        """
        await self.adopt()
        left = self.remaining
        for done in range(0, self._chunks.nar_size, _PIECE):
            size = min(_PIECE, self._chunks.nar_size - done)
            # More than one piece is asked for at a time, or each would wait for its round trip.
            self.want([(done, done + FURTHEST)], priority())
            data = await self.read(done, size, priority=priority())
            if data is None:
                raise Unavailable(f"{self.path}: what was here of it was removed")
            before, left = left, self.remaining
            progress(before - left)
            yield data

    async def rebuild(self, ranges: Iterable[tuple[int, int]] | None = None) -> None:
        """Make what can be made of what is here, of all of the NAR or of these ranges; return when all was tried."""
        numbers = range(len(self._chunks)) if ranges is None else self._numbers(ranges)
        untried = self._rebuilding.untried(numbers)
        wanted = [n for n in self._partial.missing(untried) if n not in self._coming]
        if wanted and not self._closed:
            run = RebuildRun(wanted, Priority.COMPLETION, fetches=False)
            self._start_rebuild(run)
            await run.arrived[wanted[-1]].wait()

    # ------------------------------------------------------------ what a stream brings

    def promise(self, by: Bringer, flight: Flight, ranges: Iterable[tuple[int, int]]) -> None:
        """``by`` will bring these ranges of the NAR; until :meth:`withdraw` nobody asks for them otherwise.

        It tells what a start reads of this path; so nothing is guessed any more.
        """
        self.is_foreseen = True
        self._promised.add(by, flight, ranges)

    def lacks(self, start: int, end: int) -> bool:
        """Whether some of these bytes of the NAR are not here."""
        return bool(self._partial.gaps(start, end))

    def put_extent(self, extent: Extent, data: bytes) -> None:
        """Write what was promised, which is verified; in a thread. Raises ``StorageFailure``."""
        if not self._closed:
            self._partial.write_extent(extent, data)

    def has_extent(self, by: Bringer, extent: Extent) -> None:
        """It was written."""
        self._partial.note_extent(extent)
        self._promised.kept(by, extent.start, extent.end)

    def withdraw(self, by: Bringer) -> list[tuple[int, int]]:
        """``by`` brings no more; returns the ranges that it has not brought."""
        left = self._promised.withdraw(by)
        self._let_go()
        return left

    async def adopt(self) -> None:
        """Count chunks as here of which extents have brought every byte."""
        self._adopting += 1
        try:
            for chunk in self._partial.made_of_extents():
                if not self._closed and await trio.to_thread.run_sync(self._partial.adopt, chunk):
                    self._partial.note(chunk.number)
        finally:
            self._adopting -= 1
            self._let_go()

    # ------------------------------------------------------------ private

    async def _ensure(
        self, start: int, end: int, watch: Callable[[Flight], None], priority: Priority
    ) -> None:
        while not self._closed and (gaps := self._partial.gaps(start, end)):
            wanted = self._numbers(self._promised.without(gaps))
            if not wanted:  # a chunk with them may be on its way, and wakes those who wait, too
                await self._promised.wait(gaps, watch, priority, self._stall)
                continue
            self._ask(wanted, priority)
            if self._flight is not None:
                watch(self._flight)
            await self._wait(self._coming[wanted[0]], wanted[0])

    def _ask(self, wanted: list[int], priority: Priority) -> None:
        """Have chunks fetched at least as urgently as this.

        A guess that has not begun begins with them. What a trace foresees is needed with them, so it comes whole.
        """
        coming = {self._coming[number] for number in wanted if number in self._coming}
        guesses = [run for run in coming if run.waits and run.priority >= Priority.REST]
        late = [run for run in guesses if run.priority > priority]
        for run in coming.difference(late):
            run.want(priority)
        for run in late:
            self._withdraw(run)
        due = [number for number in wanted if number not in self._coming]
        if late and priority is Priority.READER:
            guessed = {number for run in late for number in self._partial.missing(run.numbers)}
            due = [*before(wanted[0], guessed, self._chunks), *due]
        self._begin(due, priority)
        for run in late:
            left = self._partial.missing(run.numbers)
            self._start_runs([n for n in left if n not in self._coming], run.priority)

    def _withdraw(self, run: Run) -> None:
        run.withdraw()
        for number in run.numbers:
            if self._coming.get(number) is run:
                del self._coming[number]

    def _numbers(self, gaps: Iterable[tuple[int, int]]) -> list[int]:
        return sorted({number for gap in gaps for number in self._chunks.covering(*gap)})

    async def _wait(self, run: Run, number: int) -> None:
        arrived = run.arrived[number]
        while not arrived.is_set():
            if run.passage is not None and run.passage.paused:
                self._progressed = (
                    trio.current_time()
                )  # the clock stands still for what others keep from coming
            with trio.move_on_at(self._progressed + self._stall):
                await arrived.wait()
            late = trio.current_time() >= self._progressed + self._stall
            if late and not arrived.is_set() and not (run.passage and run.passage.paused):
                raise DeadlineExceeded(
                    f"{self.path}: no progress for {self._stall:g} s: waiting for a part of it from"
                    f" {self._source or 'any cache'}"
                )
        if not self._partial.has(number) and not run.withdrawn:
            raise run.error or Unavailable(f"{self.path}: chunk {number} did not come")

    # ------------------------------------------------------------ fetching

    def _begin(self, due: list[int], priority: Priority) -> None:
        """Ask for chunks that nobody has asked for, and for some behind them."""
        if not due:
            return
        if not self._runs:
            self._progressed = trio.current_time()
            self._flight = Flight(self.path)
        # Some know what they want; and what a stream brings is not worth guessing at.
        if priority is not Priority.READER or self._promised:
            self._start_runs(due, priority)
            return
        reached = reach(self._link, self._source)
        guess = self._guesses.after(due, reached, self._is_due, self._guessed())
        self._start_runs([*due, *guess.near], priority)
        self._start_runs(guess.far, Priority.REST)
        if not self.is_foreseen:
            self._start_runs(guess.scattered, Priority.REST, SCATTERED_RUN)

    def _is_due(self, number: int) -> bool:
        return not self._partial.has(number) and number not in self._coming

    def _guessed(self) -> int:
        """Bytes of the file that are coming although nobody has asked for them."""
        guessed = (each for each, run in self._coming.items() if run.priority >= Priority.REST)
        return sum(self._chunks[number].file_size for number in guessed)

    def _start_runs(
        self, numbers: Sequence[int], priority: Priority, largest: int = LARGEST_RUN
    ) -> None:
        """Have chunks made of what is here, and fetched where they cannot be: at most ``largest`` bytes a request."""
        untried = self._rebuilding.untried(numbers)
        if untried:
            self._start_rebuild(RebuildRun(untried, priority, fetches=True))
        self._start_fetches([n for n in numbers if n not in self._coming], priority, largest)

    def _start_rebuild(self, run: RebuildRun) -> None:
        self._runs.add(run)
        self._coming |= dict.fromkeys(run.numbers, run)
        self._nursery.start_soon(self._rebuild, run, name=f"rebuild a part of {self.path}")

    async def _rebuild(self, run: RebuildRun) -> None:
        size = sum(self._chunks[each].size for each in run.numbers)
        try:
            async with reservation(self._room) as reserved:
                await reserved.take(size)
                tried = partial(self._tried, run)
                await self._rebuilding.rebuild(run.numbers, self._partial, tried)
        except StorageFailure:  # told to whoever fetches
            self._tried(run, run.numbers, ())
        except trio.Cancelled:
            run.withdrawn = False  # nothing will be asked for any more
            raise
        finally:
            self._end(run)

    def _tried(self, run: RebuildRun, numbers: Sequence[int], made: Sequence[Chunk]) -> None:
        """Of ``numbers`` those that were ``made`` are here, and nobody need try the others again."""
        self._progressed = trio.current_time()
        if made:
            part = made[0].file_start, made[-1].file_end
            size = sum(chunk.file_size for chunk in made)
            self._observe(Rebuilt(self.path, run.priority, size, part))
        self._arrived(run, made)
        left = [number for number in numbers if self._coming.get(number) is run]
        for number in left:
            del self._coming[number]
            run.arrived[number].set()
        if run.fetches and not self._closed:
            self._start_fetches(left, run.priority)

    def _start_fetches(
        self, numbers: Iterable[int], priority: Priority, largest: int = LARGEST_RUN
    ) -> None:
        for group in grouped(numbers, self._chunks, self._partial, self._coming, largest):
            run = FetchRun(group, priority, self._events(group, priority))
            self._runs.add(run)
            self._coming |= dict.fromkeys(group, run)
            self._nursery.start_soon(self._fetch, run, name=f"fetch a part of {self.path}")

    def _events(self, group: Sequence[int], priority: Priority) -> PartEvents:
        part = self._chunks[group[0]].file_start, self._chunks[group[-1]].file_end
        return PartEvents(self._observe, self.path, priority, part)

    async def _fetch(self, run: FetchRun) -> None:
        run.error = Unavailable(f"{self.path}: the fetch was given up because the process ends")
        run.events.board()
        try:
            with run.scope:
                async with reservation(self._room) as reserved:
                    await reserved.take(sum(self._chunks[each].size for each in run.numbers))
                    await self._fetch_from(await self._offer(), run)
            run.error = None
        except FusesnapError as error:
            run.error = error
        except PauseLost as error:
            run.error = Unavailable(str(error))
        finally:
            run.events.land(run.error)
            self._end(run)

    def _end(self, run: Run) -> None:
        self._runs.discard(run)
        for number in run.numbers:
            if self._coming.get(number) is run:
                del self._coming[number]
        for event in run.arrived.values():
            event.set()
        if self._runs:
            return
        if self._flight is not None:
            self._flight.land(run.error or self.tree)
            self._flight = None
        self._let_go()

    async def _fetch_from(self, offer: Offer, run: FetchRun) -> None:
        first, last = self._chunks[run.numbers[0]], self._chunks[run.numbers[-1]]
        self._source = offer.substituter.url
        size = last.file_end - first.file_start
        # A program that starts asks for one chunk after another, and most of the time it is the round trip that it
        # waits for: the rest of what it has opened comes meanwhile.
        beside, known = bool(self._promised), self.is_foreseen
        with self._link.passage(
            run.priority, self._source, size, modest=True, beside=beside, foreseen=known
        ) as run.passage:
            run.events.cross(run.passage)
            await run.passage.turn()
            run.events.begin(self._source)
            self._progressed = trio.current_time()
            if self._flight is not None:
                self._flight.begin(self._source, size)
            reading = run.passage.pieces(
                lambda bookmark: part_of(offer, first.file_start, last.file_end, bookmark),
                partial(self._resumed, run),
            )
            async with aclosing(reading) as pieces:
                await self._receive(run, pieces)

    def _resumed(self, run: FetchRun, kept: int) -> None:
        self._progressed = trio.current_time()
        run.events.begin(self._source, kept)

    async def _receive(self, run: FetchRun, pieces: AsyncIterator[bytes]) -> None:
        left = iter(range(run.numbers[0], run.numbers[-1] + 1))
        due = self._chunks[next(left)]
        held = bytearray()
        async for piece in pieces:
            self._progressed = trio.current_time()
            run.events.receive(len(piece))
            if self._flight is not None:
                self._flight.progress(len(piece))
            held += piece
            frames: list[tuple[Chunk, bytes]] = []
            while len(held) >= due.file_size:
                frames.append((due, bytes(memoryview(held)[: due.file_size])))
                del held[: due.file_size]
                number = next(left, None)
                if number is None:
                    break
                due = self._chunks[number]
            if frames:
                await trio.to_thread.run_sync(self._put, frames)
                self._arrived(run, [chunk for chunk, _ in frames])

    def _put(self, frames: Iterable[tuple[Chunk, bytes]]) -> None:
        """Verify and write chunks; in a thread: zstd and SHA-256 let go of the interpreter lock."""
        for chunk, frame in frames:
            try:
                data = chunk.unpack(frame)
            except InvalidData as error:
                raise type(error)(f"{self._source}: {self.path}: {error}") from None
            self._partial.write(chunk, data)

    def _arrived(self, run: Run, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            self._partial.note(chunk.number)
            if chunk.number in run.arrived:
                self._coming.pop(chunk.number, None)
                run.arrived[chunk.number].set()
        self._promised.wake()
