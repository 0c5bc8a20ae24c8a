"""Parts of one NAR that a stream is about to bring: nobody asks for them otherwise, as long as it keeps coming."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import trio

from fusesnap.fetch.flight import Flight
from fusesnap.fetch.priority import Priority
from fusesnap.store.byte_ranges import ByteRanges


class Bringer(Protocol):
    """A stream, as whoever waits for what it brings sees it."""

    @property
    def is_paused(self) -> bool:
        """Whether more urgent ones have the link."""

    def awaited(self) -> AbstractContextManager[None]:
        """Somebody is blocked on it meanwhile."""

    def give_up(self, why: str) -> None:
        """It has taken too long; what it has promised will be withdrawn."""


class Promised:
    """What streams have promised of one NAR, by each of them. It is true as long as one of them runs."""

    def __init__(self) -> None:
        self._by: dict[Bringer, tuple[Flight, ByteRanges]] = {}
        self._changed = trio.Event()

    def __bool__(self) -> bool:
        return bool(self._by)

    @property
    def flight(self) -> Flight | None:
        """What is under way, for people to see."""
        return next((flight for flight, ranges in self._by.values() if ranges), None)

    def add(self, by: Bringer, flight: Flight, ranges: Iterable[tuple[int, int]]) -> None:
        """``by`` will bring these ranges, each from its start up to its end; ``flight`` is what people see of that."""
        promised = ByteRanges()
        for start, end in ranges:
            promised.add(start, end)
        self._by[by] = flight, promised

    def kept(self, by: Bringer, start: int, end: int) -> None:
        """Bytes ``start`` up to ``end`` are here."""
        self._by[by][1].remove(start, end)
        self.wake()

    def withdraw(self, by: Bringer) -> list[tuple[int, int]]:
        """``by`` brings no more; returns what it has not brought."""
        _, left = self._by.pop(by)
        self.wake()
        return list(left)

    def wake(self) -> None:
        """Something came: whoever waits looks again."""
        self._changed.set()
        self._changed = trio.Event()

    def without(self, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """The parts of ``ranges`` that nobody has promised."""
        left = list(ranges)
        for _, promised in self._by.values():
            left = [gap for start, end in left for gap in promised.gaps(start, end)]
        return left

    async def wait(
        self,
        gaps: Sequence[tuple[int, int]],
        watch: Callable[[Flight], None],
        priority: Priority,
        stall: float,
    ) -> None:
        """Return when something came, or nothing more will; ``gaps`` are promised.

        ``watch`` is told what is waited for. Only for readers the stream becomes more urgent; and one that brings
        nothing of this NAR for ``stall`` seconds, while it may, is given up for them.
        """
        by = next(by for by, (_, has) in self._by.items() if list(has.gaps(*gaps[0])) != [gaps[0]])
        watch(self._by[by][0])
        changed = self._changed
        if priority is not Priority.READER:
            await changed.wait()
            return
        with by.awaited():
            with trio.move_on_after(stall):
                await changed.wait()
            if not changed.is_set() and not by.is_paused:
                by.give_up(f"nothing that somebody waits for came for {stall:g} s")
                await changed.wait()
