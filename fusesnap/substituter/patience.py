"""How long one cache is waited for in the middle of a NAR, and when another is tried instead.

What has come of a NAR is worth something: as long as no other cache has the path, a transfer that broke is continued
for as long as its reader would wait. Where another has it, and answers, a few quick attempts are enough. That other
cache is asked at the very moment: one that is behind the same link that broke is no help, and what came would be lost.

Slow is not broken. A transfer is given up for its slowness only where another cache has the path, and only if it gets
less than ``min_rate`` although that is not what everybody gets; see :class:`Pace`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from fusesnap.errors import DeadlineExceeded, FusesnapError, InvalidData, Unavailable
from fusesnap.nix.cache_info import CacheInfo
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.store_path import HashPart, StorePath
from fusesnap.substituter.base import Bookmark, StoredFile
from fusesnap.substituter.retry import (
    CannotContinue,
    PartsUnsupported,
    Retries,
    RetryPolicy,
    Throttled,
    may_mend,
)

# Seconds after which trouble is no hiccup any more: then others are asked.
_HASTE: Final = 3.0
# Seconds from one time that others are asked to the next; doubled each time.
_ASK_ELSEWHERE_AFTER: Final = 5.0
# Seconds of waiting for bytes after which a transfer's pace is judged, and which it is averaged over.
WINDOW: Final = 10.0
# A transfer that gets less than this part of what it would get if all got the same is slow by itself.
_UNFAIR: Final = 8


@dataclass(frozen=True, slots=True)
class Patience:
    """``stall``: seconds without progress after which a transfer is given up. 0: after the retry policy's attempts.

    ``min_rate``: bytes a second below which a transfer that others outrun is had from another cache, if one has it; 0:
    never. ``window``: seconds that this is averaged over.
    """

    stall: float = 0.0
    min_rate: float = 1024.0
    window: float = WINDOW


DEFAULT_PATIENCE: Final = Patience()


@dataclass(slots=True)
class Traffic:
    """All transfers of a pool together: bytes that came so far, and how many are under way."""

    received: int = 0
    transfers: int = 0


class Gate(Protocol):
    """The one cache, as its transfers have to heed it."""

    @property
    def url(self) -> str: ...

    @property
    def priority(self) -> int | None: ...

    @property
    def silence(self) -> float:
        """Seconds for which it is left alone."""

    async def cache_info(self) -> CacheInfo: ...

    async def narinfo(self, path: StorePath | HashPart) -> NarInfo: ...

    def pieces(
        self, info: StoredFile, retries: Retries, bookmark: Bookmark | None
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """The file's pieces, without any judgement of how they come."""

    def part(
        self, info: NarInfo, start: int, end: int, retries: Retries
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]: ...

    async def small_file(self, name: str, limit: int) -> bytes: ...

    def check_silence(self) -> None:
        """Raise :class:`Throttled` where it is left alone."""

    def begin(self) -> bool:
        """A request goes. Returns whether it is the one that tries how the cache is."""

    def abandon(self) -> None:
        """That request taught nothing."""

    def note_failure(self, error: FusesnapError) -> None: ...

    def note_piece(self, count: int) -> None:
        """``count`` bytes of a NAR have come."""


class PatientRetries(Retries):
    """When a transfer goes on that broke: see the module. ``elsewhere`` tells whether another cache has the path."""

    def __init__(
        self,
        policy: RetryPolicy,
        gate: Gate,
        stall: float,
        elsewhere: Callable[[], Awaitable[bool]],
        clock: Callable[[], float],
    ) -> None:
        super().__init__(policy)
        self._gate = gate
        self._stall = stall
        self._elsewhere = elsewhere
        self._clock = clock
        self._progressed_at = clock()
        self._trouble_since: float | None = None
        self._asking_after = _HASTE
        self._trying = False
        self.noted: FusesnapError | None = None  # the newest failure that the cache was told

    async def begin(self) -> None:
        """Wait until the cache may be asked.

        Where that is too long, raises what the transfer last met with, or :class:`Throttled`.
        """
        while (silence := self._gate.silence) > 0:
            if self._is_too_long(silence):
                if self.noted is not None:
                    raise self.noted
                self._gate.check_silence()
            await self._policy.sleep(silence)
        self._trying = self._gate.begin()

    def progressed(self) -> None:
        super().progressed()
        self._progressed_at = self._clock()
        self._trouble_since = None
        self._asking_after = _HASTE

    async def wait(self, error: Unavailable) -> None:
        """Count a failed attempt and sleep before the next; raise ``error`` to give up."""
        self._note(error)
        if not may_mend(error):
            raise error
        at_least = error.retry_after if isinstance(error, Throttled) else 0.0
        wait = self.next_wait(at_least=at_least)
        if self._is_worth_asking_elsewhere(error, wait) and await self._elsewhere():
            raise error
        if wait is None:
            wait = max(self._longest_wait(), at_least)
            if not self._stall:
                raise error
        if self._stall and self._is_too_long(wait):
            raise error
        await self._policy.sleep(wait)

    def end(self) -> None:
        """The transfer is over, however it ended."""
        if self._trying:
            self._trying = False
            self._gate.abandon()

    def answered(self) -> None:
        """The cache sends bytes."""
        self._trying = False

    def _note(self, error: FusesnapError) -> None:
        self._trying = False
        self.noted = error
        self._gate.note_failure(error)
        if self._trouble_since is None:
            self._trouble_since = self._clock()

    def _is_worth_asking_elsewhere(self, error: FusesnapError, wait: float | None) -> bool:
        """Not at every hiccup, and not again at once."""
        lasting = self._clock() - (self._trouble_since or self._clock())
        slow = isinstance(error, DeadlineExceeded | Throttled)
        first = self._asking_after == _HASTE
        if not (lasting >= self._asking_after or (first and (slow or wait is None))):
            return False
        self._asking_after = lasting + max(_ASK_ELSEWHERE_AFTER, lasting)
        return True

    def _is_too_long(self, wait: float) -> bool:
        limit = self._stall or self._policy.total
        return self._clock() + wait > self._progressed_at + limit

    def _longest_wait(self) -> float:
        return self._policy.longest_wait * (0.5 + 0.5 * self._policy.random())


class Pace:
    """Whether one transfer is slow by itself, rather than because its link is.

    It is when ``window`` seconds of waiting brought less than ``min_rate`` bytes a second, and either everything
    together did (then nothing is lost by trying another cache), or it got far less than its share of what came.
    """

    def __init__(self, patience: Patience, traffic: Traffic, clock: Callable[[], float]) -> None:
        self._patience = patience
        self._traffic = traffic
        self._clock = clock
        self._window = patience.window
        self._begin()

    def received(self, count: int, waited: float) -> bool:
        """``count`` bytes came after ``waited`` seconds. Returns whether the pace of late is one to do something about.

        After each such time it is judged over twice as long.
        """
        self._count += count
        self._waited += waited
        if self._waited < self._window:
            return False
        slow = self._is_slow()
        if slow:
            self._window *= 2
        self._begin()
        return slow

    def _is_slow(self) -> bool:
        rate = self._count / self._waited
        if rate >= self._patience.min_rate:
            return False
        seconds = max(self._clock() - self._began, self._waited)
        together = (self._traffic.received - self._before) / seconds
        fair = together / max(self._traffic.transfers, 1)
        return together < self._patience.min_rate or rate < fair / _UNFAIR

    def _begin(self) -> None:
        self._count, self._waited = 0, 0.0
        self._began, self._before = self._clock(), self._traffic.received


class PatientSubstituter:
    """The cache of an offer, see :class:`~.base.Substituter`. ``elsewhere`` tells whether another has the path too."""

    def __init__(
        self,
        gate: Gate,
        policy: RetryPolicy,
        patience: Patience,
        traffic: Traffic,
        elsewhere: Callable[[], Awaitable[bool]],
        clock: Callable[[], float],
    ) -> None:
        self._gate = gate
        self._policy = policy
        self._patience = patience
        self._traffic = traffic
        self._elsewhere = elsewhere
        self._clock = clock

    @property
    def url(self) -> str:
        return self._gate.url

    @property
    def priority(self) -> int | None:
        return self._gate.priority

    async def cache_info(self) -> CacheInfo:
        return await self._gate.cache_info()

    async def narinfo(self, path: StorePath | HashPart) -> NarInfo:
        return await self._gate.narinfo(path)

    @asynccontextmanager
    async def nar(
        self, info: StoredFile, retries: Retries | None = None, bookmark: Bookmark | None = None
    ) -> AsyncGenerator[AsyncIterator[bytes]]:
        """As the protocol says. Retries of its own."""
        async with self._patiently(
            info, lambda own: self._gate.pieces(info, own, bookmark)
        ) as pieces:
            yield pieces

    @asynccontextmanager
    async def part(
        self, info: NarInfo, start: int, end: int, retries: Retries | None = None
    ) -> AsyncGenerator[AsyncIterator[bytes]]:
        """As the protocol says. Retries of its own."""
        async with self._patiently(
            info, lambda own: self._gate.part(info, start, end, own)
        ) as pieces:
            yield pieces

    @asynccontextmanager
    async def _patiently(
        self,
        info: StoredFile,
        read: Callable[[Retries], AbstractAsyncContextManager[AsyncIterator[bytes]]],
    ) -> AsyncGenerator[AsyncIterator[bytes]]:
        patient = PatientRetries(
            self._policy, self._gate, self._patience.stall, self._elsewhere, self._clock
        )
        self._traffic.transfers += 1
        try:
            async with (
                read(patient) as pieces,
                aclosing(self._judged(info, pieces, patient)) as judged,
            ):
                yield judged
        finally:
            self._traffic.transfers -= 1
            patient.end()

    async def small_file(self, name: str, limit: int) -> bytes:
        return await self._gate.small_file(name, limit)

    async def _judged(
        self, info: StoredFile, pieces: AsyncIterator[bytes], patient: PatientRetries
    ) -> AsyncGenerator[bytes]:
        try:
            pace = Pace(self._patience, self._traffic, self._clock)
            asked_at = self._clock()
            async for piece in pieces:
                patient.answered()
                self._gate.note_piece(len(piece))
                self._traffic.received += len(piece)
                slow = pace.received(len(piece), self._clock() - asked_at)
                yield piece
                if slow:
                    await self._give_up_if_elsewhere(info)
                asked_at = self._clock()
        except (CannotContinue, PartsUnsupported):
            raise  # of the way in which the cache serves: it is as good as before
        except (Unavailable, InvalidData) as error:
            if error is not patient.noted:
                self._gate.note_failure(error)
            raise

    async def _give_up_if_elsewhere(self, info: StoredFile) -> None:
        if await self._elsewhere():
            raise Unavailable(
                f"{self.url}: {info.url}: less than {self._patience.min_rate:g} bytes a second,"
                " and another cache has it too"
            )
