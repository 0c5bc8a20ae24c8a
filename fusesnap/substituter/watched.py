"""One cache of a pool, and what has been seen of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Final

import trio

from fusesnap.errors import (
    FusesnapError,
    InvalidConfiguration,
    InvalidData,
    Unavailable,
)
from fusesnap.nix.cache_info import CacheInfo
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.quoting import quote
from fusesnap.nix.store_path import HashPart, StoreDir, StorePath
from fusesnap.substituter.answers import MISSING_CACHE_INFO
from fusesnap.substituter.base import DEFAULT_PRIORITY, Substituter
from fusesnap.substituter.narinfo_cache import NarInfoCache
from fusesnap.substituter.retry import Refusal, Throttled, may_mend

# Seconds for which a failure puts a cache last; Nix disables it for as long.
FAILURE_MEMORY: Final = 60.0
# Seconds for which Retry-After is obeyed at most: it is a stranger's number.
_LONGEST_SILENCE: Final = 300.0
# Seconds after which a running process asks a cache anew what it says of itself.
_CACHE_INFO_LIFETIME: Final = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class CacheState:
    """What is known of a cache, for people.

    ``priority`` and ``reachable`` are None as long as nothing has been asked. ``last_error`` is the
    message of the failure that makes it unreachable, or why it is refused. ``narinfos_asked`` counts
    requests, not those answered from disk. ``bytes_received`` counts NARs, as they were stored.
    """

    url: str
    priority: int | None
    reachable: bool | None
    last_error: str | None
    narinfos_asked: int
    bytes_received: int


@dataclass(slots=True)
class _Question:
    """A request for ``nix-cache-info`` that is under way, and what others learn from it."""

    answered: trio.Event = field(default_factory=trio.Event)
    error: FusesnapError | None = None


class _Silent(Throttled):
    """No request was sent, because the cache had asked for that."""


class WatchedSubstituter:
    """A substituter that remembers how it fared; see :class:`~.base.Substituter`.

    ``order`` is its place among those of the same priority. ``clock`` is a monotonic one, in
    seconds.
    """

    def __init__(
        self,
        substituter: Substituter,
        order: int,
        *,
        store_dir: StoreDir,
        narinfo_cache: NarInfoCache,
        clock: Callable[[], float],
        failure_memory: float = FAILURE_MEMORY,
    ) -> None:
        self._substituter = substituter
        self._order = order
        self._store_dir = store_dir
        self._narinfo_cache = narinfo_cache
        self._clock = clock
        self._failure_memory = failure_memory
        self._info: CacheInfo | None = None
        self._info_until = float("-inf")
        self._question: _Question | None = None
        self._error: FusesnapError | None = None
        self._answered = False
        self._last_until = float("-inf")
        self._silent_until = float("-inf")
        self._narinfos_asked = 0
        self._bytes_received = 0

    @property
    def url(self) -> str:
        return self._substituter.url

    @property
    def priority(self) -> int | None:
        return self._substituter.priority

    @property
    def silence(self) -> float:
        """Seconds for which the cache asked to be left alone; 0 if it did not."""
        return max(0.0, self._silent_until - self._clock())

    def place(self) -> tuple[bool, int, int]:
        """What the pool sorts by: whether to ask last, priority, order."""
        return not self._has_its_turn(), self._priority(), self._order

    def needs_asking(self) -> bool:
        """Whether its priority is not known, and it is not one to be asked last."""
        return self._fresh_info() is None and self._has_its_turn()

    def state(self) -> CacheState:
        """What is known of it now."""
        known = self._answered or self._error is not None
        error = self._error
        if self._info is not None and not self._is_ours(self._info):
            error = self._refusal(self._info)
        return CacheState(
            url=self.url,
            priority=None if self._info is None else self._priority(),
            reachable=error is None if known else None,
            last_error=None if error is None else str(error),
            narinfos_asked=self._narinfos_asked,
            bytes_received=self._bytes_received,
        )

    async def cache_info(self) -> CacheInfo:
        """As the protocol says, asked once and then remembered.

        Raises also InvalidConfiguration where the cache is for another store directory. Of any
        number of callers one asks, and what it meets with holds for all.
        """
        while (info := self._fresh_info()) is None:
            question = self._question
            if question is None:
                await self._ask_cache_info()
            else:
                await question.answered.wait()
                if question.error is not None:
                    kind = Unavailable if may_mend(question.error) else Refusal
                    raise kind(str(question.error))
        if not self._is_ours(info):
            raise self._refusal(info)
        return info

    async def narinfo(self, path: StorePath | HashPart) -> NarInfo:
        with self._noting():
            self._check_silence()
            self._narinfos_asked += 1
            return await self._substituter.narinfo(path)

    @asynccontextmanager
    async def nar(self, info: NarInfo) -> AsyncGenerator[AsyncIterator[bytes]]:
        async with (
            self._substituter.nar(info) as pieces,
            aclosing(self._counted(pieces)) as counted,
        ):
            yield counted

    def note_failure(self, error: FusesnapError) -> None:
        """The cache failed: it goes last for a while."""
        if isinstance(error, _Silent):
            return  # it is known, and its time must not begin anew
        now = self._clock()
        self._error = error
        self._last_until = now + self._failure_memory
        if isinstance(error, Throttled):
            self._silent_until = now + min(error.retry_after, _LONGEST_SILENCE)

    def _has_its_turn(self) -> bool:
        """Whether to ask it in its order rather than last.

        A cache that failed is asked last for a while. When that is over, this is true once: one
        lookup tries how it is now, and for others it stays last until it has answered.
        """
        now = self._clock()
        if now < self._last_until:
            return False
        if self._error is not None:
            self._last_until = now + self._failure_memory
        return True

    def _note_success(self) -> None:
        self._answered = True
        self._error = None
        self._last_until = float("-inf")

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Learn from how a request ends; one that is cancelled teaches nothing."""
        try:
            yield
        except (Unavailable, InvalidData) as error:
            self.note_failure(error)
            raise
        except FusesnapError:
            self._note_success()
            raise
        self._note_success()

    async def _counted(self, pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
        with self._noting():
            async for piece in pieces:
                self._bytes_received += len(piece)
                yield piece

    def _check_silence(self) -> None:
        if self.silence > 0:
            raise _Silent(
                f"{self.url}: asked to be left alone for another {self.silence:g} s", self.silence
            )

    async def _ask_cache_info(self) -> None:
        question = self._question = _Question()
        try:
            self._info = self._narinfo_cache.cache_info(self.url)
            if self._info is None or not self._is_ours(self._info):
                self._info = await self._request_cache_info()
            self._info_until = self._clock() + (
                _CACHE_INFO_LIFETIME if self._is_ours(self._info) else self._failure_memory
            )
        except FusesnapError as error:
            question.error = error
            raise
        finally:
            self._question = None
            question.answered.set()

    async def _request_cache_info(self) -> CacheInfo:
        with self._noting():
            self._check_silence()
            info = await self._substituter.cache_info()
        # Neither what a mistake says, nor what was assumed for want of an answer, is kept for days.
        if self._is_ours(info) and info != MISSING_CACHE_INFO:
            self._narinfo_cache.remember_cache_info(self.url, info)
        return info

    def _fresh_info(self) -> CacheInfo | None:
        return self._info if self._clock() < self._info_until else None

    def _is_ours(self, info: CacheInfo) -> bool:
        return info.store_dir == self._store_dir.path

    def _refusal(self, info: CacheInfo) -> InvalidConfiguration:
        return InvalidConfiguration(
            f"{self.url}: refused: its store directory is {quote(info.store_dir)},"
            f" ours is {self._store_dir}"
        )

    def _priority(self) -> int:
        if self.priority is not None:
            return self.priority
        if self._info is None or self._info.priority is None:
            return DEFAULT_PRIORITY
        return self._info.priority
