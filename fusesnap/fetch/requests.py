"""What was asked for ahead and has not begun: any number of paths, of which few at a time become flights."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Final

import trio

from fusesnap.fetch.flight import Flight
from fusesnap.fetch.priority import Priority
from fusesnap.nix.store_path import StorePath

# Flights that wait for their turn on the link: enough for it to choose from, and to fill it with small ones.
AHEAD: Final = 16


class Requests:
    """Paths by priority, and by when they were asked for. ``begin`` makes a flight of one, or none if there is no need.

    A flight begins only when the one before it waits in the line of the link, so that an order is kept there too.
    ``nursery`` sees flights off, which may last longer than there is anything to begin.
    """

    def __init__(
        self, begin: Callable[[StorePath, Priority], Flight | None], nursery: trio.Nursery
    ) -> None:
        self._begin = begin
        self._nursery = nursery
        self._beginning = False
        self._heap: list[tuple[Priority, int, StorePath]] = []
        self._wanted: dict[StorePath, Priority] = {}
        self._numbers = itertools.count()
        self._waiting: set[Flight] = set()
        self._changed = trio.Event()

    def __len__(self) -> int:
        return len(self._wanted)

    def counts(self) -> dict[Priority, int]:
        """How many paths wait, by how urgent they are."""
        return dict(sorted(Counter(self._wanted.values()).items()))

    def add(self, path: StorePath, priority: Priority) -> None:
        """``path`` is wanted, behind those that are as urgent, unless it is wanted so much already."""
        before = self._wanted.get(path)
        if before is not None and before <= priority:
            return
        self._wanted[path] = priority
        heapq.heappush(self._heap, (priority, next(self._numbers), path))
        self._wake()

    async def begin_all(self) -> None:
        """Make flights of them as their turn comes, until none is left; nothing where that is being done already."""
        if self._beginning:
            return
        self._beginning = True
        try:
            # Nothing may be awaited between the last look at the heap and the end: what is added then would stay there.
            while self._heap:
                await self._begin_next()
        finally:
            self._beginning = False

    async def _begin_next(self) -> None:
        priority, _, path = self._heap[0]
        # Those that are less urgent do not keep it waiting.
        if sum(flight.priority <= priority for flight in self._waiting) >= AHEAD:
            await self._changed.wait()
            return
        heapq.heappop(self._heap)
        flight = self._take(path, priority)
        if flight is not None:
            self._waiting.add(flight)
            self._nursery.start_soon(self._see_off, flight)
            await flight.in_line()

    def _take(self, path: StorePath, priority: Priority) -> Flight | None:
        if self._wanted.get(path) is not priority:
            return None  # it had its turn when it was more urgent
        del self._wanted[path]
        return self._begin(path, priority)

    async def _see_off(self, flight: Flight) -> None:
        await flight.departed()
        self._waiting.discard(flight)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
