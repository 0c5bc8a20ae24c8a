"""Chunks of one path that come together, and who waits for them."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from fusesnap.errors import FusesnapError
from fusesnap.fetch.link import Passage
from fusesnap.fetch.part_events import PartEvents
from fusesnap.fetch.priority import Priority


class Run:
    """Chunks that are wanted together."""

    def __init__(self, numbers: Sequence[int], priority: Priority) -> None:
        self.numbers = numbers
        self.priority = priority
        self.passage: Passage | None = None
        self.error: FusesnapError | None = None
        self.withdrawn = False  # who waits for what has not come of it asks anew
        self.arrived = {number: trio.Event() for number in numbers}

    @property
    def waits(self) -> bool:
        """Whether nothing of it was asked for yet, and it can be left."""
        return False

    def want(self, priority: Priority) -> None:
        """It is wanted as urgently as this."""

    def withdraw(self) -> None:
        """It is not wanted any more as it is."""
        self.withdrawn = True


class RebuildRun(Run):
    """Chunks that are made of what is here, if that can be; where it ``fetches``, the others are fetched.

    Whoever waits for one asks anew when it was tried. So it is no more urgent because somebody is: what is left of a
    large file is not what he waits for.
    """

    def __init__(self, numbers: Sequence[int], priority: Priority, *, fetches: bool) -> None:
        super().__init__(numbers, priority)
        self.fetches = fetches
        self.withdraw()


class FetchRun(Run):
    """Chunks that one request carries, from the first to the last of ``numbers``.

    It is as urgent as the most urgent of those who want it.
    """

    def __init__(self, numbers: Sequence[int], priority: Priority, events: PartEvents) -> None:
        super().__init__(numbers, priority)
        self.events = events
        self.scope = trio.CancelScope()

    @property
    def waits(self) -> bool:
        """Whether nothing of it was asked for yet, and it can be left."""
        return self.passage is None or self.passage.waits

    def want(self, priority: Priority) -> None:
        """It is wanted as urgently as this, if that is more than before."""
        self.priority = min(self.priority, priority)
        if self.passage is not None:
            self.passage.become(self.priority)

    def withdraw(self) -> None:
        """It is not wanted any more as it is."""
        super().withdraw()
        self.scope.cancel()
