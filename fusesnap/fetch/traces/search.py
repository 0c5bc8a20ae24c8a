"""Looks for the trace of a closure in binary caches, and judges what strangers offer.

A trace decides what is fetched, and in which order, so it is used only if a trusted key has signed it, like a narinfo,
and if every path that it names belongs to the closure that it is for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

import trio

from fusesnap.errors import FusesnapError, InvalidData, PathNotFound, Unavailable
from fusesnap.fetch.traces.database import Origin, TraceDatabase
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.startup_trace import StartupTrace
from fusesnap.nix.startup_trace_text import MAX_TRACE_SIZE, check_trace_trust, parse_trace
from fusesnap.nix.store_path import StorePath

log = logging.getLogger(__name__)

HOUR: Final = 3600
# Seconds for which a cache is not asked again: as long as for a narinfo that it has not; and, because a trace gets
# better with the starts that are merged into it, not as long as for one that it has.
ABSENT_FOR: Final = HOUR
PRESENT_FOR: Final = 24 * HOUR


class Cache(Protocol):
    """A binary cache, as far as it matters here; see ``Substituter``."""

    @property
    def url(self) -> str:
        """Its name in messages."""
        ...

    async def small_file(self, name: str, limit: int) -> bytes:
        """Read a file whole."""
        ...


def file_name(closure: ClosureDigest) -> str:
    """The name, within a cache, of the trace of ``closure``."""
    return f"trace/{closure.hex}"


class TraceSearch:
    """Asks ``caches``, all at once, within so many seconds; the first in their order that has one gives it.

    ``clock`` gives seconds since 1970.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        keys: TrustedKeys,
        clock: Callable[[], float],
        within: float,
    ) -> None:
        self._caches = caches
        self._keys = keys
        self._clock = clock
        self._within = within

    def judged(
        self, trace: StartupTrace, closure: ClosureDigest, paths: Iterable[StorePath]
    ) -> StartupTrace:
        """``trace``, a stranger's. Raises ``UntrustedPath``, and ``InvalidData`` if it is not for this closure."""
        if trace.closure != closure:
            raise InvalidData(f"startup trace of closure {trace.closure}, expected {closure}")
        check_trace_trust(trace, self._keys)
        trace.check_closure(paths)
        return trace

    async def find(
        self, database: TraceDatabase, closure: ClosureDigest, paths: frozenset[StorePath]
    ) -> StartupTrace | None:
        """The trace that a cache has, which is kept; ``None`` if none has one, or all were asked not long ago.

        A cache that could not answer is asked again the next time. Raises ``StorageFailure``.
        """
        now = int(self._clock())
        urls = await trio.to_thread.run_sync(database.to_be_asked, closure, self._urls(), now)
        found: dict[str, StartupTrace] = {}
        answered: dict[str, int] = {}

        async def ask(cache: Cache) -> None:
            try:
                data = await cache.small_file(file_name(closure), MAX_TRACE_SIZE)
                found[cache.url] = self.judged(parse_trace(data), closure, paths)
                answered[cache.url] = now + PRESENT_FOR
            except PathNotFound:
                answered[cache.url] = now + ABSENT_FOR
            except FusesnapError as error:
                log.warning("%s: %s is not used: %s", cache.url, file_name(closure), error)
                if not isinstance(error, Unavailable):  # a wrong answer stays wrong for a while
                    answered[cache.url] = now + ABSENT_FOR

        with trio.move_on_after(self._within):
            async with trio.open_nursery() as nursery:
                for cache in self._caches:
                    if cache.url in urls:
                        nursery.start_soon(ask, cache)
        best = next((found[url] for url in self._urls() if url in found), None)

        def keep() -> None:
            database.note_answers(closure, answered)
            if best is not None:
                database.put(best, Origin.CACHE, now)

        if answered:
            await trio.to_thread.run_sync(keep)
        return best

    def _urls(self) -> list[str]:
        return [cache.url for cache in self._caches]
