"""Several caches as one: asked in order, failing over, with what they said remembered."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Final, TypeVar

import trio

from fusesnap.errors import (
    DeadlineExceeded,
    FusesnapError,
    InvalidData,
    PathNotFound,
    Unavailable,
    UntrustedPath,
)
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.store_path import HashPart, StoreDir, StorePath
from fusesnap.nix.trust import check_trust
from fusesnap.substituter.base import Bookmark, Meter, Substituter, unmetered
from fusesnap.substituter.breaker import DEFAULT_BREAKER, BreakerPolicy
from fusesnap.substituter.lookup import Lookup
from fusesnap.substituter.narinfo_cache import NarInfoCache
from fusesnap.substituter.patience import DEFAULT_PATIENCE, Patience, PatientSubstituter, Traffic
from fusesnap.substituter.retry import CannotContinue, RetryPolicy, may_mend
from fusesnap.substituter.watched import FAILURE_MEMORY, CacheState, WatchedSubstituter

__all__ = ["CacheState", "Offer", "SubstituterPool"]

# Lookups that are under way at a time. More would only wait for one another: HTTP/2 servers allow
# 100 or 128 streams. A lookup's deadline begins when it is its turn.
_AT_A_TIME: Final = 128
# Seconds for other caches to say that they have a path whose transfer has trouble.
_ELSEWHERE: Final = 5.0
# Connections that are opened ahead, a round trip each, with TLS more: a start asks for so many files at once.
_READY_CONNECTIONS: Final = 4
# Answers that may wait in memory while others are still being asked for.
_UNWRITTEN: Final = 256
# Narinfos whose signatures are not checked again: those of a closure.
_TRUSTED: Final = 2048

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Found:
    """A narinfo that is trusted, and the cache that has it."""

    watched: WatchedSubstituter
    narinfo: NarInfo


@dataclass(frozen=True, slots=True)
class Offer:
    """A narinfo that is trusted, and the cache that gives its NAR."""

    substituter: Substituter
    narinfo: NarInfo

    def read(self, bookmark: Bookmark) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Read the NAR's file on from ``bookmark``, see :class:`~.base.Substituter`."""
        return self.substituter.nar(self.narinfo, bookmark=bookmark)


class SubstituterPool:
    """The caches of one user, in his order where their priorities are equal.

    ``deadline`` is in seconds, for one lookup over all caches, from the moment that it begins.
    ``retry`` says how often those caches are asked again that could not answer, when no other has
    the path. ``clock`` is a monotonic one in seconds, and ``failure_memory`` the time for which a
    cache that failed is asked last. ``breaker`` says when a cache is not asked at all, ``patience``
    how long a NAR is waited for that breaks off or comes slowly, ``meter`` is told what its own
    requests bring.
    """

    def __init__(
        self,
        substituters: Iterable[Substituter],
        *,
        store_dir: StoreDir,
        trusted_keys: TrustedKeys,
        narinfo_cache: NarInfoCache,
        retry: RetryPolicy,
        deadline: float,
        clock: Callable[[], float] = trio.current_time,
        failure_memory: float = FAILURE_MEMORY,
        breaker: BreakerPolicy = DEFAULT_BREAKER,
        patience: Patience = DEFAULT_PATIENCE,
        meter: Meter = unmetered,
    ) -> None:
        unique: dict[str, Substituter] = {}
        for substituter in substituters:
            unique.setdefault(substituter.url, substituter)
        self._watched = [
            WatchedSubstituter(
                substituter,
                order,
                store_dir=store_dir,
                narinfo_cache=narinfo_cache,
                clock=clock,
                failure_memory=failure_memory,
                breaker=breaker,
                meter=meter,
            )
            for order, substituter in enumerate(unique.values())
        ]
        self._store_dir = store_dir
        # An offer is looked for more than once, and remembered; what is not trusted raises, and is not.
        self._check_trust = lru_cache(maxsize=_TRUSTED)(partial(check_trust, keys=trusted_keys))
        self._narinfo_cache = narinfo_cache
        self._retry = retry
        self._deadline = deadline
        self._clock = clock
        self._patience = patience
        self._traffic = Traffic()
        self._turns = trio.Semaphore(_AT_A_TIME)
        self._finding = 0
        self._writing = False

    async def find(
        self, path: StorePath | HashPart, *, exclude: frozenset[str] = frozenset()
    ) -> Offer:
        """Find the first cache that offers ``path``, leaving out those whose URL is in ``exclude``.

        Of a hash part it offers the path that has it; which one that is, the signature says too.

        Raises PathNotFound where every cache said no, UntrustedPath where some offer it but none
        so that it can be trusted, and Unavailable where some could not answer or were left out; the
        message says what each cache said.
        """
        try:
            offer = await self._find_in_turn(path, exclude)
        except FusesnapError:
            await self._save_answers()
            raise
        await self._save_answers()
        return offer

    async def introduce(self) -> None:
        """Have caches say their priorities, where these are not known: whoever looks a path up next need not wait.

        Does not fail; a cache that cannot say it is met with again then.
        """

        async def ask(watched: WatchedSubstituter) -> None:
            with trio.move_on_after(self._deadline), suppress(FusesnapError):
                await watched.cache_info()

        async with trio.open_nursery() as nursery:
            for watched in self._watched:
                if watched.needs_asking():
                    nursery.start_soon(ask, watched)
        await self._save_answers()  # so that other processes need not ask

    async def get_ready(self) -> None:
        """Have whoever asks for the first NARs not wait for connections, nor for what caches say of themselves."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.introduce)
            for watched in self._watched:
                for _ in range(_READY_CONNECTIONS if watched.silence <= 0 else 0):
                    nursery.start_soon(watched.connect)

    async def report_bad(self, offer: Offer, error: FusesnapError) -> None:
        """An offer did not hold: its file is gone, cannot be had, or is not what was announced.

        Its narinfo is forgotten, and its cache is asked last for a while, except where nothing but
        the one file was missing.
        """
        if not isinstance(error, CannotContinue):  # says nothing of what was offered
            self._narinfo_cache.forget(offer.substituter.url, offer.narinfo.store_path)
        for watched in self._watched:
            if watched.url == offer.substituter.url:
                _note_bad_offer(watched, error)
        await self._save_answers()

    def caches(self) -> Sequence[WatchedSubstituter]:
        """The caches themselves, in the user's order, for files that belong to no store path."""
        return self._watched

    def states(self) -> list[CacheState]:
        """What is known of each cache, in the user's order."""
        return [watched.state() for watched in self._watched]

    async def _find_in_turn(self, path: StorePath | HashPart, exclude: frozenset[str]) -> Offer:
        self._finding += 1
        try:
            async with self._turns:
                return await self._find(path, exclude)
        finally:
            self._finding -= 1

    async def _find(self, path: StorePath | HashPart, exclude: frozenset[str]) -> Offer:
        urls = (watched.url for watched in self._watched)
        lookup = Lookup(path, self._store_dir, self._deadline, urls)
        included = []
        for watched in self._watched:
            if watched.url in exclude:
                lookup.note(watched.url, Unavailable("left out, because its offer did not hold"))
            else:
                included.append(watched)
        await self._learn_priorities(lookup, included)
        offer = await self._search(lookup, sorted(included, key=WatchedSubstituter.place))
        if offer is None:
            raise lookup.failure()
        return self._patient(offer, exclude)

    def _patient(self, offer: _Found, exclude: frozenset[str]) -> Offer:
        others = exclude | {offer.watched.url}
        path = offer.narinfo.store_path
        cache = PatientSubstituter(
            offer.watched,
            self._retry,
            self._patience,
            self._traffic,
            lambda: self._is_offered(path, others),
            self._clock,
        )
        return Offer(cache, offer.narinfo)

    async def _is_offered(self, path: StorePath, exclude: frozenset[str]) -> bool:
        """Whether a cache but for ``exclude`` answers right now that it has ``path``."""
        asked = [each for each in self._watched if each.url not in exclude and each.silence <= 0]
        seconds = min(self._deadline, _ELSEWHERE)
        lookup = Lookup(path, self._store_dir, seconds, (watched.url for watched in asked))
        ordered = sorted(asked, key=WatchedSubstituter.place)
        return await self._ask_each(ordered, lookup) is not None

    async def _learn_priorities(
        self, lookup: Lookup, included: Sequence[WatchedSubstituter]
    ) -> None:
        """Ask caches for their priorities, all at once; what cannot be learnt is an answer."""
        unknown = [watched for watched in included if watched.needs_asking()]
        if not unknown:
            return
        share = lookup.share(len(included))
        async with trio.open_nursery() as nursery:
            for watched in unknown:
                nursery.start_soon(self._bounded, watched, lookup, share, watched.cache_info)

    async def _search(self, lookup: Lookup, ordered: Sequence[WatchedSubstituter]) -> _Found | None:
        """Ask one cache after another; those last whose remembered answer may be out of date."""
        unsure: list[WatchedSubstituter] = []
        for asked, watched in enumerate(ordered):
            if lookup.said(watched.url) is None:
                left = len(ordered) - asked + len(unsure)
                offer = await self._ask(watched, lookup, left, self._remembered_offer)
                if offer is not None:
                    return offer
                if lookup.said(watched.url) is None:
                    unsure.append(watched)
        offer = await self._ask_each(unsure, lookup)
        return offer or await self._ask_again(ordered, lookup)

    async def _ask_each(
        self, caches: Sequence[WatchedSubstituter], lookup: Lookup
    ) -> _Found | None:
        for asked, watched in enumerate(caches):
            offer = await self._ask(watched, lookup, len(caches) - asked, self._live_offer)
            if offer is not None:
                return offer
        return None

    async def _ask_again(
        self, ordered: Sequence[WatchedSubstituter], lookup: Lookup
    ) -> _Found | None:
        """Go on asking those caches that could not answer, as the retry policy allows."""
        retries = self._retry.start()
        while again := [watched for watched in ordered if may_mend(lookup.said(watched.url))]:
            silence = min(watched.silence for watched in again)
            wait = retries.next_wait(at_least=silence)
            if wait is None or wait >= lookup.remaining():
                return None
            await self._retry.sleep(wait)
            talking = [watched for watched in again if watched.silence <= 0]
            offer = await self._ask_each(talking, lookup)
            if offer is not None:
                return offer
        return None

    async def _ask(
        self,
        watched: WatchedSubstituter,
        lookup: Lookup,
        left: int,
        ask: Callable[[WatchedSubstituter, StorePath | HashPart], Awaitable[_Found | None]],
    ) -> _Found | None:
        """Ask one of ``left`` caches, for no longer than its share of the time that remains."""
        return await self._bounded(
            watched, lookup, lookup.share(left), lambda: ask(watched, lookup.path)
        )

    async def _bounded(
        self,
        watched: WatchedSubstituter,
        lookup: Lookup,
        seconds: float,
        ask: Callable[[], Awaitable[T]],
    ) -> T | None:
        """Ask with a deadline; an error becomes the cache's answer in ``lookup``."""
        if seconds <= 0:
            lookup.note(watched.url, DeadlineExceeded(f"{watched.url}: not asked in time"))
            return None
        try:
            with trio.move_on_after(seconds):
                return await ask()
            late = DeadlineExceeded(f"{watched.url}: no answer within {seconds:.3g} s")
            watched.note_failure(late)
            lookup.note(watched.url, late)
        except FusesnapError as error:
            lookup.note(watched.url, error)
        return None

    async def _remembered_offer(
        self, watched: WatchedSubstituter, path: StorePath | HashPart
    ) -> _Found | None:
        """What the cache offers, by memory if it was asked not long ago.

        None where it had nothing then, or nothing that is trusted now: to be asked again before
        the path is given up, because meanwhile it may have it.
        """
        await watched.cache_info()
        cached = self._narinfo_cache.answer(watched.url, path, self._store_dir)
        if cached is None:
            return await self._live_offer(watched, path)
        if cached.info is None or not self._is_trusted(cached.info):
            return None
        return _Found(watched, cached.info)

    async def _live_offer(self, watched: WatchedSubstituter, path: StorePath | HashPart) -> _Found:
        await watched.cache_info()
        try:
            info = await watched.narinfo(path)
        except PathNotFound:
            self._narinfo_cache.remember(watched.url, path, None)
            raise
        self._check_trust(info)
        self._narinfo_cache.remember(watched.url, path, info)
        return _Found(watched, info)

    def _is_trusted(self, info: NarInfo) -> bool:
        try:
            self._check_trust(info)
        except UntrustedPath:
            return False
        return True

    async def _save_answers(self) -> None:
        """Write what was learnt, many answers at a time, by whoever comes when it is due."""
        if self._writing:
            return
        self._writing = True
        try:
            while self._is_writing_due():
                await trio.to_thread.run_sync(self._narinfo_cache.flush)
        finally:
            self._writing = False

    def _is_writing_due(self) -> bool:
        return self._narinfo_cache.pending > (_UNWRITTEN if self._finding else 0)


def _note_bad_offer(watched: WatchedSubstituter, error: FusesnapError) -> None:
    if isinstance(error, InvalidData):
        watched.note_bad_nar(error)
    elif not isinstance(error, PathNotFound):
        watched.demote(error)
