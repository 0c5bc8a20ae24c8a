"""One cache of a pool, and what has been seen of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    aclosing,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import dataclass, field
from typing import Final

import trio

from fusesnap.errors import (
    FusesnapError,
    InvalidConfiguration,
    InvalidData,
    Unavailable,
)
from fusesnap.nix.cache_info import MAX_CACHE_INFO_SIZE, CacheInfo
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.quoting import quote
from fusesnap.nix.store_path import HashPart, StoreDir, StorePath
from fusesnap.substituter.answers import MISSING_CACHE_INFO
from fusesnap.substituter.base import (
    CACHE_INFO_NAME,
    DEFAULT_PRIORITY,
    Bookmark,
    Meter,
    StoredFile,
    Substituter,
    unmetered,
)
from fusesnap.substituter.breaker import DEFAULT_BREAKER, Breaker, BreakerPolicy, BreakerState
from fusesnap.substituter.narinfo_cache import NarInfoCache
from fusesnap.substituter.retry import (
    PartsUnsupported,
    Refusal,
    Retries,
    RetryPolicy,
    Throttled,
    may_mend,
)

# Seconds for which a failure puts a cache last; Nix disables it for as long.
FAILURE_MEMORY: Final = 60.0
# Seconds for which Retry-After is obeyed at most: it is a stranger's number.
_LONGEST_SILENCE: Final = 300.0
# Seconds after which a running process asks a cache anew what it says of itself.
_CACHE_INFO_LIFETIME: Final = 24 * 3600.0
_ONCE: Final = RetryPolicy(attempts=1)


@dataclass(frozen=True, slots=True)
class CacheState:
    """What is known of a cache, for people.

    ``priority`` and ``reachable`` are None as long as nothing has been asked. ``last_error`` is the
    message of the failure that makes it unreachable, or why it is refused. ``narinfos_asked`` counts
    requests, not those answered from disk. ``bytes_received`` counts NARs, as they were stored.

    ``breaker`` says whether requests go to it at all, ``failures`` how many failed in a row, and ``retry_in`` for how
    many seconds none goes. ``bad_nars`` counts NARs that were not what their narinfo announced; for ``avoided_for``
    seconds it is asked last because of the newest of them.
    """

    url: str
    priority: int | None
    reachable: bool | None
    last_error: str | None
    narinfos_asked: int
    bytes_received: int
    breaker: BreakerState = BreakerState.CLOSED
    failures: int = 0
    retry_in: float = 0.0
    bad_nars: int = 0
    avoided_for: float = 0.0


@dataclass(frozen=True, slots=True)
class _SmallFile:
    """Something that nearly every cache has, and that is hardly larger than its headers."""

    url: str = CACHE_INFO_NAME
    file_size: int | None = None
    nar_size: int = MAX_CACHE_INFO_SIZE


@dataclass(slots=True)
class _Question:
    """A request for ``nix-cache-info`` that is under way, and what others learn from it."""

    answered: trio.Event = field(default_factory=trio.Event)
    error: FusesnapError | None = None


class Silenced(Throttled):
    """No request was sent: the cache had asked for that, or it failed too often in a row."""


class WatchedSubstituter:
    """A cache that remembers how it fared. Its methods are those of :class:`~.base.Substituter`, but for NARs.

    ``order`` is its place among those of the same priority. ``clock`` is a monotonic one, in
    seconds. ``meter`` is told how many bytes come that nobody reads.
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
        breaker: BreakerPolicy = DEFAULT_BREAKER,
        meter: Meter = unmetered,
    ) -> None:
        self._substituter = substituter
        self._order = order
        self._store_dir = store_dir
        self._narinfo_cache = narinfo_cache
        self._clock = clock
        self._failure_memory = failure_memory
        self._meter = meter
        self._info: CacheInfo | None = None
        self._info_until = float("-inf")
        self._question: _Question | None = None
        self._error: FusesnapError | None = None
        self._answered = False
        self._last_until = float("-inf")
        self._silent_until = float("-inf")
        self._breaker = Breaker(clock, breaker)
        self._bad_nar: FusesnapError | None = None
        self._bad_nars = 0
        self._avoided_until = float("-inf")
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
        """Seconds for which the cache is left alone: because it asked for that, or failed too often; else 0."""
        return max(self._asked_silence, self._breaker.wait())

    @property
    def _asked_silence(self) -> float:
        return max(0.0, self._silent_until - self._clock())

    @property
    def _avoided_for(self) -> float:
        return max(0.0, self._avoided_until - self._clock())

    def place(self) -> tuple[bool, int, int]:
        """What the pool sorts by: whether to ask last, priority, order."""
        return not self._has_its_turn(), self._priority(), self._order

    def needs_asking(self) -> bool:
        """Whether its priority is not known, and it is not one to be asked last."""
        return self._fresh_info() is None and self._has_its_turn()

    def state(self) -> CacheState:
        """What is known of it now."""
        error = self._error if self._avoided_for <= 0 else self._bad_nar
        known = self._answered or error is not None
        if self._info is not None and not self._is_ours(self._info):
            error = self._refusal(self._info)
        return CacheState(
            url=self.url,
            priority=None if self._info is None else self._priority(),
            reachable=error is None if known else None,
            last_error=None if error is None else str(error),
            narinfos_asked=self._narinfos_asked,
            bytes_received=self._bytes_received,
            breaker=self._breaker.state,
            failures=self._breaker.failures,
            retry_in=self.silence,
            bad_nars=self._bad_nars,
            avoided_for=self._avoided_for,
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

    async def connect(self) -> None:
        """Have one more connection for NARs open, by asking for a small file over it.

        Nothing is learnt from what fails: whoever asks for something is told.
        """
        with suppress(FusesnapError):
            async with self._substituter.nar(_SmallFile(), _ONCE.start()) as pieces:
                async for piece in pieces:
                    self._meter(len(piece))

    async def narinfo(self, path: StorePath | HashPart) -> NarInfo:
        self.check_silence()
        with self._noting():
            self._narinfos_asked += 1
            return await self._substituter.narinfo(path)

    def pieces(
        self, info: StoredFile, retries: Retries, bookmark: Bookmark | None
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """The NAR, without learning from how it goes: who reads it tells that."""
        return self._substituter.nar(info, retries, bookmark)

    def remember(self, infos: Iterable[NarInfo]) -> None:
        """It has said these, in another file than theirs; whoever asks for one need not ask again."""
        for info in infos:
            self._narinfo_cache.remember(self.url, info.store_path, info)

    def save(self) -> None:
        """Write what is remembered, of all caches, so that other processes have it. Call it from a thread."""
        self._narinfo_cache.flush()

    @asynccontextmanager
    async def stream(
        self, file: StoredFile, bookmark: Bookmark
    ) -> AsyncGenerator[AsyncIterator[bytes]]:
        """Read a file that belongs to no NAR as :meth:`~.base.Substituter.nar` reads a NAR's."""
        self.check_silence()
        with self._noting():
            async with (
                self._substituter.nar(file, bookmark=bookmark) as pieces,
                aclosing(self._counted(pieces)) as counted,
            ):
                yield counted

    async def _counted(self, pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
        async for piece in pieces:
            self.note_piece(len(piece))
            yield piece

    def part(
        self, info: NarInfo, start: int, end: int, retries: Retries
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """A part of it, in the same way."""
        return self._substituter.part(info, start, end, retries)

    async def small_file(self, name: str, limit: int) -> bytes:
        self.check_silence()
        with self._noting():
            return await self._substituter.small_file(name, limit)

    def begin(self) -> bool:
        """A request for a NAR goes. Returns whether it is the one that tries how the cache is."""
        return self._breaker.begin()

    def abandon(self) -> None:
        """That request ended without teaching anything."""
        self._breaker.abandon()

    def note_piece(self, count: int) -> None:
        """``count`` bytes of a file have come."""
        self._bytes_received += count
        if self._error is not None or not self._answered or self._breaker.failures:
            self._note_success()

    def note_failure(self, error: FusesnapError) -> None:
        """A request failed: the cache goes last for a while, and is not asked at all if it goes on like that."""
        self.demote(error)
        if isinstance(error, Throttled):
            self._silent_until = self._clock() + min(error.retry_after, _LONGEST_SILENCE)
        else:
            self._breaker.fail()

    def demote(self, error: FusesnapError) -> None:
        """What the cache offered could not be had: it goes last until it answers well, or for a while."""
        if isinstance(error, Silenced):
            return  # it is known, and its time must not begin anew
        self._error = error
        self._last_until = self._clock() + self._failure_memory

    def note_bad_nar(self, error: FusesnapError) -> None:
        """A NAR was not what its narinfo announced: the cache goes last for a while, however well it answers."""
        self._bad_nar = error
        self._bad_nars += 1
        self._avoided_until = self._clock() + self._failure_memory

    def _has_its_turn(self) -> bool:
        """Whether to ask it in its order rather than last.

        A cache that failed is asked last for a while. When that is over, this is true once: one
        lookup tries how it is now, and for others it stays last until it has answered.
        """
        now = self._clock()
        if now < self._last_until or now < self._avoided_until:
            return False
        if self._error is not None:
            self._last_until = now + self._failure_memory
        return True

    def _note_success(self) -> None:
        self._answered = True
        self._error = None
        self._last_until = float("-inf")
        self._breaker.succeed()

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Learn from how a request ends; one that is cancelled teaches nothing."""
        trying = self._breaker.begin()
        try:
            yield
        except PartsUnsupported:
            self._note_success()
            raise
        except (Unavailable, InvalidData) as error:
            self.note_failure(error)
            raise
        except FusesnapError:
            self._note_success()
            raise
        except BaseException:
            if trying:
                self._breaker.abandon()
            raise
        self._note_success()

    def check_silence(self) -> None:
        """Raise Silenced where it is left alone."""
        asked, pause = self._asked_silence, self._breaker.wait()
        if asked > 0 and asked >= pause:
            raise Silenced(f"{self.url}: asked to be left alone for another {asked:g} s", asked)
        if pause > 0:
            raise Silenced(
                f"{self.url}: not asked for another {pause:.3g} s, because it failed"
                f" {self._breaker.failures} times in a row; the last time: {self._last_failure()}",
                pause,
            )

    def _last_failure(self) -> str:
        return str(self._error).removeprefix(f"{self.url}: ")

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
        self.check_silence()
        with self._noting():
            info = await self._substituter.cache_info()
        # Neither what a mistake says, nor what was assumed for want of an answer, is kept for days. What `nix copy`
        # writes may be equal to that; it is an answer.
        if self._is_ours(info) and info is not MISSING_CACHE_INFO:
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
