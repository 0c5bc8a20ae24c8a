"""What a node does about the starts of its images: fetches in the order of the last one, and records the next.

A trace is only ever a saving. What goes wrong here is logged, and the container starts without.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import trio

from fusesnap.errors import FusesnapError
from fusesnap.fetch.traces.database import Origin, TraceDatabase, Unfinished
from fusesnap.fetch.traces.recorder import Recorder
from fusesnap.fetch.traces.recording import Conditions, Draft, Recording, Start, lacking
from fusesnap.fetch.traces.search import TraceSearch
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.hash import Hash
from fusesnap.nix.startup_trace import Ending, StartupTrace
from fusesnap.nix.store_path import StorePath
from fusesnap.store.local_store import LocalStore

log = logging.getLogger(__name__)

# Seconds between two looks whether a start is over, and the number of looks after which what was recorded is saved.
LOOK_EVERY: Final = 1.0
SAVE_EVERY: Final = 5
# Seconds between two looks at who reads: a look reads the mounts of the node, which may be thousands.
LOOK_AGAIN: Final = 0.05
# Seconds that a process which is told to end may take to save.
SAVE_WITHIN: Final = 5.0


@dataclass(frozen=True, slots=True)
class Policy:
    """``record`` starts, ``replay`` traces of starts, and ``ask`` caches for some.

    ``version`` is ours, ``readahead`` the kernel's in bytes.

    ``boot`` names the time since this machine was started: as long as it lasts the kernel may keep what it was shown.
    """

    record: bool
    replay: bool
    ask: bool
    version: str
    readahead: int
    boot: str


class Traces:
    """The traces of one state directory, for one process that serves its mount.

    ``foresee`` has fetched what a trace says; ``awaited`` says for which paths somebody waits; ``owner_of`` tells the
    upper directory of the container that a thread is in, in a thread of ours; ``search`` asks caches; ``clock`` gives
    seconds since 1970. ``bundled`` tells whether a startup bundle brings what a closure's start reads.
    """

    def __init__(
        self,
        open_database: Callable[[], TraceDatabase],
        recorder: Recorder,
        store: LocalStore,
        foresee: Callable[[StartupTrace], object],
        awaited: Callable[[], Collection[StorePath]],
        owner_of: Callable[[int], str | None],
        search: TraceSearch,
        clock: Callable[[], float],
        policy: Policy,
        bundled: Callable[[ClosureDigest, Collection[StorePath]], Awaitable[bool]],
    ) -> None:
        self._open_database = open_database
        self._recorder = recorder
        self._store = store
        self._foresee = foresee
        self._awaited = awaited
        self._owner_of = owner_of
        self._search = search
        self._clock = clock
        self._policy = policy
        self._bundled = bundled
        self._database: TraceDatabase | None = None
        self._opened = trio.Event()

    async def run(self) -> None:
        """Record, until cancelled. What is being recorded then goes on in the next process."""
        try:
            await self._open()
        except FusesnapError as error:
            log.warning("nothing is recorded of starts: %s", error)
            self._opened.set()
            await trio.sleep_forever()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._know_readers)
                nursery.start_soon(self._watch)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + SAVE_WITHIN):
                await self._save(list(self._recorder.recordings()), orderly=True)
            if self._database is not None:
                self._database.close()

    async def begin(self, start: Start) -> None:
        """A container is about to start. As long as that start is not over, further calls for it do nothing."""
        await self._opened.wait()
        database = self._database
        if database is None or start.key in self._recorder:
            return
        with logged(start.key):
            conditions, trace = await trio.to_thread.run_sync(self._prepare, database, start)
            if start.key in self._recorder:
                return
            if self._policy.record:
                await self._record(database, start, conditions)
            bundled = await self._bundled(start.closure, start.paths)
            if trace is not None and self._policy.replay:
                with logged(start.key):
                    self.replay(start, trace)
            if bundled:
                return
            if self._policy.ask and (trace is None or not trace.circumstances.complete):
                found = await self._search.find(database, start.closure, start.paths)
                if found is not None and self._policy.replay:
                    self.replay(start, found)

    async def foresee(
        self, closure: ClosureDigest, paths: frozenset[StorePath], carried: StartupTrace | None
    ) -> None:
        """An image is unpacked that shows ``paths``, and will probably be started; ``carried`` is what it brought."""
        await self._opened.wait()
        database = self._database
        if database is None:
            return
        with logged(f"closure {closure}"):
            if carried is not None:
                trace, now = self._search.judged(carried, closure, paths), int(self._clock())
                await trio.to_thread.run_sync(database.put, trace, Origin.IMAGE, now)
        with logged(f"closure {closure}"):
            there = await trio.to_thread.run_sync(self._store.committed_among, paths)
            if len(there) == len(paths) or await self._bundled(closure, paths):
                return
            if self._policy.ask:
                await self._search.find(database, closure, paths)

    async def knows(self, closure: ClosureDigest) -> bool:
        """Whether a trace of ``closure`` is here that a start would be fetched by. Asks no cache."""
        await self._opened.wait()
        database = self._database
        if database is None or not self._policy.replay:
            return False
        with logged(f"closure {closure}"):
            now = int(self._clock())
            return await trio.to_thread.run_sync(database.best, closure, now) is not None
        return False

    def replay(self, start: Start, trace: StartupTrace) -> None:
        """Have fetched what an earlier start has read, in its order, before this one asks.

        Raises ``InvalidData`` for a trace with paths that are not of the closure.
        """
        trace.check_closure(start.paths)
        self._foresee(trace)
        log.info("%s: starts by a trace of %d paths", start.key, len(trace.paths))

    async def end(self, key: str) -> None:
        """The container of ``key`` is gone."""
        await self._opened.wait()
        recording = self._recorder.remove(key)
        if recording is not None:
            await self._finish(recording, Ending.EXIT)

    # ---------------------------------------------------------------- private

    async def _open(self) -> None:
        def open_() -> tuple[TraceDatabase, list[Unfinished], set[int]]:
            database = self._open_database()
            return database, database.unfinished(), database.shown(self._policy.boot)

        self._database, unfinished, shown = await trio.to_thread.run_sync(open_)
        self._recorder.shown(shown)
        for each in unfinished if self._policy.record else ():
            self._recorder.add(self._continued(each))
        self._opened.set()

    def _continued(self, unfinished: Unfinished) -> Recording:
        said = unfinished.trace.circumstances
        conditions = Conditions(said.recorded, said.version, said.readahead, dict(said.lacks))
        recording = Recording(unfinished.start, conditions, trio.current_time, unfinished.trace)
        recording.interrupted = not unfinished.orderly
        return recording

    def _prepare(
        self, database: TraceDatabase, start: Start
    ) -> tuple[Conditions, StartupTrace | None]:
        """What has to be known of a start. Blocking."""
        now, policy = int(self._clock()), self._policy
        lacks = lacking(start, self._perhaps_cached(start.lazy))
        conditions = Conditions(now, policy.version, policy.readahead, lacks)
        stored = database.best(start.closure, now)
        return conditions, None if stored is None else stored.trace

    def _perhaps_cached(self, paths: Iterable[StorePath]) -> Iterator[StorePath]:
        """Those of ``paths`` that the kernel may remember: fetched anew, a path has its old inodes."""
        shown = self._recorder.shown_before()
        if shown:  # a question to the database each
            for path in paths:
                pin = self._store.pinned(path)
                if pin is not None and pin.ordinal in shown:
                    yield path

    async def _record(self, database: TraceDatabase, start: Start, conditions: Conditions) -> None:
        recording = Recording(start, conditions, trio.current_time)
        given_up = self._recorder.add(recording)
        empty = recording.draft(Ending.IDLE)
        await trio.to_thread.run_sync(lambda: database.begin(start, self._trace(empty)))
        if given_up is not None:
            await trio.to_thread.run_sync(database.end, given_up.start.key)

    async def _know_readers(self) -> None:
        """Find out in which containers the processes are that read, as soon as they do."""
        while True:
            threads = await self._recorder.unknown()
            self._recorder.found(await trio.to_thread.run_sync(self._owners, threads))
            await trio.sleep(LOOK_AGAIN)

    def _owners(self, threads: Collection[int]) -> dict[int, str | None]:
        return {thread: self._owner_of(thread) for thread in threads}

    async def _watch(self) -> None:
        for look in itertools.count(1):
            await trio.sleep(LOOK_EVERY)
            for recording, ending in self._recorder.over(self._awaited()):
                self._recorder.remove(recording.start.key)
                await self._finish(recording, ending)
            if look % SAVE_EVERY == 0:
                changed = [each for each in self._recorder.recordings() if each.changed]
                await self._save(changed, orderly=False)

    async def _save(self, recordings: Sequence[Recording], *, orderly: bool) -> None:
        shown = self._recorder.take_newly_shown()
        drafts = {each.start.key: each.draft(Ending.IDLE) for each in recordings}
        for recording in recordings:
            recording.changed = False

        def save(database: TraceDatabase) -> None:
            database.save(
                {key: self._trace(draft) for key, draft in drafts.items()}, orderly=orderly
            )
            database.add_shown(shown)

        if self._database is not None and (drafts or shown):
            with logged("what is being recorded"):
                await trio.to_thread.run_sync(save, self._database)

    async def _finish(self, recording: Recording, ending: Ending) -> None:
        draft = recording.draft(ending)

        def keep(database: TraceDatabase) -> None:
            trace = self._trace(draft)
            if trace.paths and recording.credible:
                kept = database.merge(trace, int(self._clock()))
                tell(recording, trace, kept)
            database.end(recording.start.key)

        if self._database is not None:
            with logged(recording.start.key):
                await trio.to_thread.run_sync(keep, self._database)

    def _trace(self, draft: Draft) -> StartupTrace:
        return draft.trace(self._nar_hash, self._store.tree)

    def _nar_hash(self, ordinal: int) -> Hash | None:
        pin = self._store.pin_of(ordinal)
        return None if pin is None else pin.info.nar_hash


@contextmanager
def logged(what: str) -> Iterator[None]:
    """Let a container start without a trace, and a trace be lost, rather than anything else go wrong."""
    try:
        yield
    except FusesnapError as error:
        log.warning("startup traces: %s: %s", what, error)


def tell(recording: Recording, trace: StartupTrace, kept: StartupTrace) -> None:
    """Log that a start was recorded."""
    log.info(
        "%s: its start read %d bytes in %d files of %d paths; the trace of closure %s is %s",
        recording.start.key,
        trace.size,
        len(trace.files),
        len(trace.paths),
        trace.closure,
        "complete" if kept.circumstances.complete else "partial",
    )
