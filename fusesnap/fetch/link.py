"""The link of a node to its caches: what the scheduler decides, done."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Final, TypeAlias

import trio

from fusesnap.errors import Unavailable
from fusesnap.fetch.bandwidth import Bandwidth
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.scheduler import LinkLimits, Load, LoadState, Scheduler
from fusesnap.substituter.base import Bookmark

# Seconds: between two decisions because of bytes that came. There are thousands of pieces a second.
NOT_SOONER: Final = 0.01

Read: TypeAlias = Callable[[Bookmark], AbstractAsyncContextManager[AsyncIterator[bytes]]]


class PauseLost(Exception):
    """A transfer that was paused cannot go on where it was. It says nothing of the file: from its start it may."""


class Link:
    """Everything that is transferred in this process goes through here, and so through one scheduler.

    ``nursery`` is where the clock is watched, as long as something waits.
    """

    def __init__(self, scheduler: Scheduler, bandwidth: Bandwidth, nursery: trio.Nursery) -> None:
        self._scheduler = scheduler
        self._bandwidth = bandwidth
        self._nursery = nursery
        self._passages: dict[Load, Passage] = {}
        self._decided = trio.current_time()
        self._watching = False

    @contextmanager
    def passage(
        self,
        priority: Priority,
        source: str,
        size: int | None,
        *,
        modest: bool = False,
        beside: bool = False,
        foreseen: bool = False,
    ) -> Iterator[Passage]:
        """A transfer of ``size`` bytes, if it is known how many, from the cache ``source``. It waits for its turn.

        ``modest`` is one of many small ones in a row, ``beside`` one that interrupts nothing, ``foreseen`` one that a
        start is known to read, see ``Load``.
        """
        passage = Passage(self, Load(priority, source, size, modest, beside, foreseen))
        self._passages[passage.load] = passage
        self._scheduler.add(passage.load)
        self.decide()
        try:
            yield passage
        finally:
            self.leave(passage)

    def leave(self, passage: Passage) -> None:
        """Everything of it came, or nothing more is wanted."""
        if self._passages.pop(passage.load, None) is not None:
            self._scheduler.remove(passage.load)
            self.decide()

    def decide(self) -> None:
        """Have what should run now run, and nothing else."""
        self._decided = trio.current_time()
        for load in self._scheduler.decide(self._decided):
            self._passages[load].turn_changed()
        if not self._watching and self._scheduler.looks_again() is not None:
            self._watching = True
            self._nursery.start_soon(self._watch, name="look at the link")

    @property
    def rate(self) -> float:
        """See ``Scheduler.rate``."""
        return self._scheduler.rate

    def round_trip(self, source: str) -> float:
        """See ``Scheduler.round_trip``."""
        return self._scheduler.round_trip(source)

    def asked(self, load: Load) -> None:
        """A request is being sent."""
        self._scheduler.asked(load, trio.current_time())

    async def received(self, load: Load, count: int) -> None:
        """So many bytes came; returns when more may be read."""
        now = trio.current_time()
        first = not load.flows
        self._scheduler.received(load, count, now)
        if first or now - self._decided >= NOT_SOONER:
            self.decide()
        await self.pay(count)

    async def pay(self, count: int) -> None:
        """So many bytes came, also by another way than a passage; returns when more may be read."""
        await self._bandwidth.pay(count)

    def fed(self, load: Load, waited: float, took: float) -> None:
        """See ``Scheduler.fed``."""
        self._scheduler.fed(load, waited, took)

    async def _watch(self) -> None:
        try:
            while (pause := self._scheduler.looks_again()) is not None:
                await trio.sleep(pause)
                self.decide()
        finally:
            self._watching = False


def open_link(
    nursery: trio.Nursery, limits: LinkLimits | None = None, bandwidth: Bandwidth | None = None
) -> Link:
    """A link within ``limits``, and within ``bandwidth``, which others may owe something too."""
    return Link(Scheduler(limits or LinkLimits()), bandwidth or Bandwidth(0), nursery)


class Passage:
    """One transfer's way over the link."""

    def __init__(self, link: Link, load: Load) -> None:
        self.load = load
        self._link = link
        self._changed = trio.Event()
        self._receiving: trio.CancelScope | None = None
        self._bookmark = Bookmark()
        self._paused_at: int | None = None  # how many bytes had come when it was last paused
        self._held = False
        self._begun = False
        self._waited = 0.0  # for the last piece
        self._handed: float | None = None  # when that was given away
        self.paused_or_resumed: Callable[[bool], None] = lambda _: None

    @property
    def waits(self) -> bool:
        """Whether it has not begun."""
        return self.load.state is LoadState.WAITING

    @property
    def paused(self) -> bool:
        """Whether it has begun, and waits for more urgent ones."""
        return self.load.state is LoadState.PAUSED

    @property
    def resumed(self) -> float:
        """When it last began, or went on; long ago if it never did."""
        return self.load.resumed

    def become(self, priority: Priority) -> None:
        """It is as urgent as this from now on."""
        if self.load.priority is not priority:
            self.load.priority = priority
            self._link.decide()

    async def turn(self) -> None:
        """Return when it may run. Nothing starves, so that is some time, unless it is given up."""
        while self.load.state is not LoadState.RUNNING:
            await self._changed.wait()

    def turn_changed(self) -> None:
        """Called by the link: the load's state is another."""
        self._changed.set()
        self._changed = trio.Event()
        if self.load.state is not LoadState.WAITING and self._begun:
            self.paused_or_resumed(self.load.state is LoadState.PAUSED)
        self._begun = self._begun or self.load.state is LoadState.RUNNING
        if self.load.state is LoadState.PAUSED:
            self._paused_at = self._bookmark.received
            self._handed = None
            if self._receiving is not None and self._can_resume():
                self._receiving.cancel()

    async def pieces(self, read: Read, resumed: Callable[[int], None]) -> AsyncGenerator[bytes]:
        """The bytes that ``read`` gives, which opens the file where a bookmark says, as they come when it is its turn.

        While it is paused the response is closed, and what is missing is asked for afterwards: ``resumed`` is told how
        many bytes are here then. Where the cache cannot send the rest alone the response is kept, and not read. Raises
        as ``Substituter.nar`` does, and ``PauseLost``.
        """
        ended = False
        while not ended:
            await self.turn()
            if self._bookmark.received:
                resumed(self._bookmark.received)
            self._link.asked(self.load)
            async with read(self._bookmark) as stream:
                while await self._goes_on():
                    piece = await self._receive(stream)
                    if piece is None:
                        ended = True
                        break
                    if not piece:
                        break
                    yield piece
        self._link.leave(self)

    async def _goes_on(self) -> bool:
        """Whether to read on from the response that there is; waits, if it is the only one."""
        if self.load.state is LoadState.RUNNING:
            return True
        if self._can_resume():
            return False
        self.load.holds = self._held = True
        await self.turn()
        self.load.holds = False
        return True

    def _can_resume(self) -> bool:
        """Whether its response may be closed: the rest can be had alone, or nothing is lost by it."""
        return self._bookmark.received == 0 or self._bookmark.resumable is True

    def _lost_by_pausing(self) -> bool:
        """Whether an error now is for having been paused: what was asked for after that never came."""
        return self._held or self._paused_at == self._bookmark.received

    async def _receive(self, stream: AsyncIterator[bytes]) -> bytes | None:
        """The next piece; empty where the transfer was paused before one came, ``None`` at the end."""
        began = trio.current_time()
        if self._handed is not None:
            self._link.fed(self.load, self._waited, began - self._handed)
        try:
            self.load.waits_since = began
            with trio.CancelScope() as self._receiving:
                piece = await anext(stream, None)
        except Unavailable as error:
            if self._lost_by_pausing():
                raise PauseLost(str(error)) from error
            raise
        finally:
            self.load.waits_since = None
            receiving, self._receiving = self._receiving, None
        if receiving is not None and receiving.cancelled_caught:
            return b""
        if piece:
            await self._link.received(self.load, len(piece))
            self._handed = trio.current_time()
            self._waited = self._handed - began
        return piece
