"""Whether a cache may be asked at all: a circuit breaker.

A cache that is down is not asked by everybody who waits for it, again and again: after a few failures in a row nobody
asks it for a while, then one request tries how it is, and what that one meets with holds for all. It is a state machine
on a clock that it is given; it sends nothing.

::

    closed ──(failures in a row)──> open ──(its pause is over)──> half-open
      ^                               ^                              │ one request tries
      └────────── success ────────────┼──────────── success ─────────┤
                                      └── failure: a longer pause ───┘
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class BreakerState(StrEnum):
    """``closed``: requests go. ``open``: none goes. ``half-open``: one goes, and decides."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """``failures`` in a row open the breaker. Times in seconds; ``random`` gives numbers from 0 to 1.

    The first pause is ``first_pause``; each that follows on another failure is twice as long, up to ``longest_pause``.
    Chance takes up to half of each, so that nodes that lost the same cache do not come back in step.
    """

    failures: int = 3
    first_pause: float = 1.0
    longest_pause: float = 10.0
    random: Callable[[], float] = random.random


DEFAULT_BREAKER: Final = BreakerPolicy()

# Seconds after which those ask again who wait for the one request that tries.
_TRYING: Final = 0.5


class Breaker:
    """The breaker of one cache. ``clock`` is a monotonic one, in seconds."""

    def __init__(self, clock: Callable[[], float], policy: BreakerPolicy = DEFAULT_BREAKER) -> None:
        self._clock = clock
        self._policy = policy
        self._failures = 0
        self._pauses = 0  # since it was last closed
        self._open_until: float | None = None  # None: closed
        self._trying = False

    @property
    def failures(self) -> int:
        """How many failures there were in a row."""
        return self._failures

    @property
    def state(self) -> BreakerState:
        """What it is now."""
        if self._open_until is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self._clock() < self._open_until else BreakerState.HALF_OPEN

    def wait(self) -> float:
        """Seconds for which no request may go; 0 if one may go now."""
        if self._open_until is None:
            return 0.0
        if self._trying:
            return _TRYING
        return max(0.0, self._open_until - self._clock())

    def begin(self) -> bool:
        """A request goes, which :meth:`wait` has allowed. Returns whether it is the one that tries."""
        if self.state is not BreakerState.HALF_OPEN or self._trying:
            return False
        self._trying = True
        return True

    def abandon(self) -> None:
        """The request that was to try ended without teaching anything: another may."""
        self._trying = False

    def succeed(self) -> None:
        """The cache answered as it should."""
        self._failures = self._pauses = 0
        self._open_until = None
        self._trying = False

    def fail(self) -> None:
        """The cache did not answer as it should. Requests that were under way when it opened count only once."""
        self._failures += 1
        state = self.state
        if state is BreakerState.HALF_OPEN or (
            state is BreakerState.CLOSED and self._failures >= self._policy.failures
        ):
            self._open()

    def _open(self) -> None:
        policy = self._policy
        pause = min(policy.first_pause * 2.0 ** min(self._pauses, 32), policy.longest_pause)
        self._pauses += 1
        self._open_until = self._clock() + pause * (0.5 + 0.5 * policy.random())
        self._trying = False
