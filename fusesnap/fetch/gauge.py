"""What is measured of a link, from what comes over it. Times in seconds, sizes in bytes; the clock is the caller's."""

from __future__ import annotations

import math
from collections import deque


class Rate:
    """The most that came in a short time of late: what the link can carry, or those at its other end.

    A maximum, because less comes whenever nobody asks for more. It is remembered over a pause. Nothing is known before
    something was asked for all the time that is measured: a start's first small files say nothing of a link.
    """

    SLOT = 0.25  # shorter ones would measure how the kernel hands over what it has gathered
    KEPT = 40

    def __init__(self) -> None:
        self.value = 0.0  # bytes a second; 0 as long as nothing is known
        self._slots: deque[float] = deque(maxlen=self.KEPT)
        self._began = -math.inf
        self._count = 0
        self._known = False

    def received(self, count: int, now: float, asked_since: float) -> None:
        """``count`` more bytes came. From ``asked_since`` on there was always something to come."""
        if now - self._began >= self.SLOT:
            if now - self._began < 2 * self.SLOT:
                self._slots.append(self._count / (now - self._began))
                self._known = self._known or asked_since <= self._began
                self.value = max(self._slots) if self._known else 0.0
            self._began, self._count = now, 0
        self._count += count


class Lately:
    """The mean rate of the last seconds, between ``OVER`` and twice as many."""

    OVER = 1.0

    def __init__(self, now: float) -> None:
        self._marks = ((now, 0), (now, 0))  # (time, bytes by then) of two earlier moments
        self._received = 0

    def received(self, count: int, now: float) -> None:
        """``count`` more bytes came."""
        self._received += count
        if now - self._marks[1][0] >= self.OVER:
            self._marks = (self._marks[1], (now, self._received))

    def rate(self, now: float) -> float:
        """Bytes a second."""
        since, already = self._marks[0]
        return (self._received - already) / (now - since) if now > since else 0.0


class RoundTrip:
    """The shortest time of late from a request to the first byte of its answer: what no queue added to."""

    KEPT = 32

    def __init__(self) -> None:
        self.value = 0.0  # seconds; 0 as long as nothing is known
        self._times: deque[float] = deque(maxlen=self.KEPT)

    def took(self, seconds: float) -> None:
        """A request was answered after so many seconds."""
        self._times.append(seconds)
        self.value = min(self._times)


class Width:
    """How many transfers side by side bring more than one fewer would: found out by trying.

    One transfer fills a link, unless its server, or what the way there loses, holds each of them back.
    """

    EPOCH = 1.0  # seconds that a number of transfers is watched for
    GAIN = 1.15  # by which another one has to make the rate grow
    AGAIN = 15.0  # seconds until it is tried again

    def __init__(self, most: int) -> None:
        self.value = 1
        self._most = most
        self._epoch: tuple[float, int] | None = None  # when it began, and what had come by then
        self._before: float | None = None  # the rate with one fewer, while one more is tried
        self._next_try = -math.inf

    def look(self, now: float, received: int, *, limits: bool) -> None:
        """``received`` bytes came ever; ``limits``: more transfers would run if there might be more."""
        if not limits:
            self._epoch = None
            return
        if self._epoch is None:
            self._epoch = (now, received)
        elif now - self._epoch[0] >= self.EPOCH:
            self._judge(now, (received - self._epoch[1]) / (now - self._epoch[0]))
            self._epoch = (now, received)

    def _judge(self, now: float, rate: float) -> None:
        if self._before is not None and rate < self._before * self.GAIN:
            self.value -= 1
            self._before = None
            self._next_try = now + self.AGAIN
        elif now >= self._next_try and self.value < self._most:
            self.value += 1
            self._before = rate
        else:
            self._before = None
