"""When to ask again, and when to stop.

The rule is data (:class:`RetryPolicy`), its use over one undertaking is a small state machine
(:class:`Retries`); neither sends anything.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import trio

from fusesnap.errors import FusesnapError, Unavailable


class Refusal(Unavailable):
    """No answer, and the same request will meet the same fate until somebody changes something.

    Asking again at once is pointless (wrong credentials, a certificate that is not accepted, a
    server that cannot continue a file); another cache, or a later attempt from the start, may do.
    """


class CannotContinue(Refusal):
    """What has come of a file is lost, because its rest cannot be had alone. From its start it may be had."""


class PartsUnsupported(Refusal):
    """The cache sends this file whole or not at all. It has it, and is as good a cache as any other."""


class Throttled(Unavailable):
    """The cache said when to come back. ``retry_after`` is in seconds from when it said so."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def may_mend(error: FusesnapError | None) -> bool:
    """Whether asking again soon may help after ``error``."""
    return isinstance(error, Unavailable) and not isinstance(error, Refusal)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how long to try.

    ``attempts`` counts requests, the first included, that bring nothing. Between them are waits
    that double from ``first_wait`` up to ``longest_wait``, each between half and all of that by
    chance, so that nodes that lost the same cache do not come back in step. All waits since there
    was progress add up to at most ``total``. Times are in seconds. ``random`` gives numbers from 0
    to 1.
    """

    attempts: int = 4
    first_wait: float = 0.25
    longest_wait: float = 5.0
    total: float = 15.0
    random: Callable[[], float] = random.random
    sleep: Callable[[float], Awaitable[object]] = trio.sleep

    def start(self) -> Retries:
        """Begin an undertaking with all attempts ahead of it."""
        return Retries(self)


DEFAULT_RETRIES: Final = RetryPolicy()


class Retries:
    """How far one undertaking has come in its policy."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._failed = 0
        self._waited = 0.0

    def progressed(self) -> None:
        """Something came of the attempt that has failed now: neither it nor those before count."""
        self._failed = -1
        self._waited = 0.0

    def next_wait(self, *, at_least: float = 0.0) -> float | None:
        """Count a failed attempt; return the seconds to wait before the next, or None to give up.

        ``at_least`` is how long the cache asked to be left alone.
        """
        self._failed += 1
        policy = self._policy
        if self._failed >= policy.attempts:
            return None
        doubled = policy.first_wait * 2.0 ** min(max(self._failed - 1, 0), 32)
        wait = min(doubled, policy.longest_wait) * (0.5 + 0.5 * policy.random())
        wait = max(wait, at_least)
        if self._waited + wait > policy.total:
            return None
        self._waited += wait
        return wait

    async def begin(self) -> None:
        """An attempt is about to begin. Here nothing is in its way."""

    async def wait(self, error: Unavailable) -> None:
        """Count ``error`` as a failed attempt and sleep before the next; raise it to give up."""
        if not may_mend(error):
            raise error
        at_least = error.retry_after if isinstance(error, Throttled) else 0.0
        wait = self.next_wait(at_least=at_least)
        if wait is None:
            raise error
        await self._policy.sleep(wait)
