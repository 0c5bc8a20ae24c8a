"""One store path on its way from a cache into the local store, shared by everyone who waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from fusesnap.errors import DeadlineExceeded
from fusesnap.fetch.events import (
    Asked,
    Boarded,
    InLine,
    Joined,
    Landed,
    ObserveFetch,
    Paused,
    Received,
    Resumed,
    TransferBegun,
    Verifying,
    unobserved,
)
from fusesnap.fetch.link import Passage
from fusesnap.fetch.priority import Priority
from fusesnap.nix.store_path import StorePath
from fusesnap.nix.tree import Tree


@dataclass(frozen=True, slots=True)
class Reader:
    """The process that the kernel named when it asked: ``pid`` in our namespace, ``command`` as ``comm`` has it."""

    pid: int
    command: str


@dataclass(frozen=True, slots=True)
class FlightState:
    """What a person sees of a path being fetched. Sizes in bytes, ``seconds`` since the fetch began.

    ``expected`` is the size of the compressed NAR where a narinfo told it. ``waiting`` counts those blocked on the
    path now; ``readers`` are the last processes that asked. ``queued``: it has not begun, because others are before
    it. ``priority``: how urgent it is now; ``paused``: it has begun, and more urgent ones have the link.
    ``verifying``: all bytes came, and are checked and committed. ``idle``: seconds since something last came;
    ``rate``: bytes a second, of late.
    """

    path: StorePath
    cache: str | None
    received: int
    expected: int | None
    seconds: float
    waiting: int
    readers: tuple[Reader, ...]
    queued: bool
    priority: Priority
    paused: bool
    verifying: bool
    idle: float
    rate: float


class Progress:
    """When anything last came, for all flights together: who queues behind others goes on as they do."""

    def __init__(self) -> None:
        self.at = trio.current_time()


class Flight:
    """The fetch of one path, with its waiters.

    A waiter's clock counts time *without progress*, not time: a large NAR over a slow link may take an hour, and its
    reader is served, as long as bytes keep coming. Before a flight's turn what ``everybody`` gets counts as progress,
    and while it is paused the clock stands still.

    It is as urgent as it was asked to be, and as ``Priority.READER`` while somebody is blocked on it.
    """

    READERS_KEPT = 8  # a whole thread pool may block on one path: enough to see who it is

    RATE_OVER = 5.0  # seconds that a rate is measured over, at least

    def __init__(
        self,
        path: StorePath,
        everybody: Progress | None = None,
        observe: ObserveFetch = unobserved,
        priority: Priority = Priority.READER,
    ) -> None:
        self.path = path
        # Who asked because he reads has it urgent for as long as he waits.
        self._asked_as: Priority = Priority.REST if priority is Priority.READER else priority
        self._passage: Passage | None = None
        self._observe = observe
        self._has_readers = priority is Priority.READER  # or had
        self.cache: str | None = None
        self._everybody = everybody or Progress()
        self._queued = everybody is not None
        self._verifying = False
        self._received = 0
        self._expected: int | None = None
        self._began = self._own_progress = trio.current_time()
        self._marks = ((self._began, 0), (self._began, 0))  # (time, bytes) of two earlier moments
        self._landed = trio.Event()
        self._in_line = trio.Event()
        self._departed = trio.Event()
        self._outcome: Tree | Exception | None = None  # None also for a tree that nobody waited for
        self._waiting = 0
        self._readers: dict[Reader, None] = {}
        observe(Asked(path, priority))

    @property
    def priority(self) -> Priority:
        """How urgent it is now."""
        return Priority.READER if self._waiting else self._asked_as

    def want(self, priority: Priority) -> None:
        """It is wanted as urgently as this, if that is more than before."""
        self._asked_as = min(self._asked_as, priority)
        self._tell_priority()

    @contextmanager
    def crossing(self, passage: Passage) -> Iterator[None]:
        """Its bytes come by ``passage`` meanwhile, when they have their turn."""
        self._passage, self._queued = passage, passage.waits
        passage.paused_or_resumed = self._paused_or_resumed
        self._in_line.set()
        if passage.waits:
            self._observe(InLine(self.path))
        try:
            yield
        finally:
            self._passage = None

    def _paused_or_resumed(self, paused: bool) -> None:
        self._observe(Paused(self.path) if paused else Resumed(self.path))

    def _tell_priority(self) -> None:
        if self._passage is not None:
            self._passage.become(self.priority)

    @property
    def _paused(self) -> bool:
        return self._passage is not None and self._passage.paused

    @property
    def _progressed(self) -> float:
        if self._paused:
            return trio.current_time()
        others = self._everybody.at if self._queued else self._own_progress
        began = self._passage.resumed if self._passage is not None else self._own_progress
        return max(self._own_progress, others, began)

    def board(self) -> None:
        """It is this path's turn: it is looked for, or its bytes may come."""
        self._queued = False
        self._own_progress = trio.current_time()
        self._observe(Boarded(self.path))

    def begin(self, cache: str, expected: int | None) -> None:
        """An offer was chosen: bytes come from ``cache``, ``expected`` of them where that is known."""
        self.cache, self._expected, self._received, self._queued = cache, expected, 0, False
        self._verifying = False
        for event in (self._in_line, self._departed):
            event.set()
        self._own_progress = now = trio.current_time()
        self._marks = ((now, 0), (now, 0))
        self._observe(TransferBegun(self.path, cache, expected))

    def resume(self, kept: int) -> None:
        """What is missing is asked for, after a pause; ``kept`` bytes are here."""
        self._own_progress = trio.current_time()
        self._observe(TransferBegun(self.path, self.cache or "", self._expected, kept))

    def progress(self, count: int) -> None:
        """``count`` more bytes of the compressed NAR are here."""
        self._count(count)
        self._observe(Received(self.path, self.cache or "", count))

    def _count(self, count: int) -> None:
        self._received += count
        self._own_progress = self._everybody.at = now = trio.current_time()
        if now - self._marks[1][0] >= self.RATE_OVER:
            self._marks = (self._marks[1], (now, self._received))

    def came(self, count: int) -> None:
        """``count`` more bytes are here, which came as parts and were told of as such."""
        self._count(count)
        self._observe(Received(self.path, self.cache or "", 0))

    def verify(self) -> None:
        """All bytes are here, and are about to be checked and committed."""
        self._verifying = True
        self._observe(Verifying(self.path))

    def land(self, outcome: Tree | Exception | None) -> None:
        """The path is committed, and this is its tree if anybody waits for it, or it cannot be had and this is why."""
        self._outcome = outcome
        for event in (self._landed, self._in_line, self._departed):
            event.set()
        self._observe(Landed(self.path, outcome if isinstance(outcome, Exception) else None))

    async def in_line(self) -> None:
        """Return when it is known where its bytes come from and it waits for its turn, or at its end."""
        await self._in_line.wait()

    async def departed(self) -> None:
        """Return when its first bytes are asked for, or at its end."""
        await self._departed.wait()

    async def landed(self) -> None:
        """Return when it is over, however it ended. Its own limits see to it that it ends."""
        await self._landed.wait()

    async def wait(self, stall: float, reader: Reader | None) -> Tree | None:
        """Return once the path is committed, with its tree unless nobody seemed to need it.

        Raises what the fetch raised, or ``DeadlineExceeded`` after ``stall`` seconds without progress.
        """
        if reader is not None:
            self._remember(reader)
        if not self._has_readers:
            self._has_readers = True
            self._observe(Joined(self.path))
        self._waiting += 1
        self._tell_priority()
        try:
            return await self.outcome(stall)
        finally:
            self._waiting -= 1
            self._tell_priority()

    async def outcome(self, stall: float) -> Tree | None:
        """The same for somebody who is no reader, and does not make it more urgent."""
        await self._wait_for_landing(stall)
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    async def _wait_for_landing(self, stall: float) -> None:
        while not self._landed.is_set():
            with trio.move_on_at(self._progressed + stall):
                await self._landed.wait()
            if not self._landed.is_set() and trio.current_time() >= self._progressed + stall:
                source = self.cache or "any cache"
                raise DeadlineExceeded(
                    f"{self.path}: no progress for {stall:g} s: "
                    f"{self._received} of {self._expected or 'unknown'} bytes came from {source}"
                )

    def _remember(self, reader: Reader) -> None:
        self._readers.pop(reader, None)
        self._readers[reader] = None
        while len(self._readers) > self.READERS_KEPT:
            del self._readers[next(iter(self._readers))]

    def state(self) -> FlightState:
        """A picture of this moment."""
        return FlightState(
            path=self.path,
            cache=self.cache,
            received=self._received,
            expected=self._expected,
            seconds=trio.current_time() - self._began,
            waiting=self._waiting,
            readers=tuple(self._readers),
            queued=self._queued,
            priority=self.priority,
            paused=self._paused,
            verifying=self._verifying,
            idle=trio.current_time() - self._progressed,
            rate=self._rate(),
        )

    def _rate(self) -> float:
        since, already = self._marks[0]
        seconds = trio.current_time() - since
        return (self._received - already) / seconds if seconds > 0 else 0.0
