"""A limit to what a node takes of its link."""

from __future__ import annotations

import math

import trio


class Bandwidth:
    """At most ``rate`` bytes a second in the long run, after a pause ``BURST`` seconds' worth at once; 0: no limit.

    What came is paid for by waiting before more is read: the sender then waits too, because TCP has it wait. What is
    small, and comes before anybody knows what to wait for, is owed: it waits for nothing, and what comes next pays.
    """

    BURST = 0.25

    def __init__(self, rate: int) -> None:
        self._seconds_per_byte = 1 / rate if rate else 0.0
        self._paid_until = -math.inf

    async def pay(self, count: int) -> None:
        """Wait until ``count`` bytes, which came just now, are within the limit. Whoever comes first goes on first."""
        if self._seconds_per_byte:
            self.owe(count)
            await trio.sleep_until(self._paid_until)

    def owe(self, count: int) -> None:
        """``count`` bytes came just now, for which others are to wait."""
        if self._seconds_per_byte:
            idle_since = trio.current_time() - self.BURST
            self._paid_until = max(self._paid_until, idle_since) + count * self._seconds_per_byte
