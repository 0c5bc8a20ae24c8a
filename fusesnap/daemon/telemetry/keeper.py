"""Carries what one process recorded and counted into the journal, now and then, behind everybody's back."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeAlias

import trio

from fusesnap.daemon.telemetry.counting import Counters, Counting, Differences
from fusesnap.daemon.telemetry.journal import Batch, Journal
from fusesnap.daemon.telemetry.recorder import Recorder
from fusesnap.daemon.telemetry.records import StartRecord
from fusesnap.daemon.telemetry.spans import Spans, close_spans
from fusesnap.errors import FusesnapError
from fusesnap.fetch.events import FetchEvent
from fusesnap.filesystem.wait_events import WaitEvent

log = logging.getLogger(__name__)

EVERY: Final = 0.5  # seconds: what a kill may lose
PRUNE_EVERY: Final = 600.0
# Seconds for the last of it, when the process ends.
FAREWELL: Final = 2.0

Totals: TypeAlias = Callable[[], Iterable[tuple[str, Mapping[str, str], float]]]


class Telemetry:
    """Hears what happens in one process, and keeps it.

    ``clock`` gives seconds since the epoch. Where the journal cannot be written that is logged once, and tried again:
    what is served does not depend on it.
    """

    def __init__(
        self,
        root: Path,
        recorder: Recorder,
        counting: Counting,
        clock: Callable[[], float],
        spans: Spans,
    ) -> None:
        self._root = root
        self._recorder = recorder
        self._counting = counting
        self._clock = clock
        self.spans = spans
        self._differences = Differences(self.counters)
        self._totals: list[Totals] = []
        self._starts: list[StartRecord] = []
        self._chains: dict[str, frozenset[str]] = {}
        self._journal: Journal | None = None
        self._pruned = float("-inf")
        self._failing = False
        self._turn = trio.Lock()  # what is newer must not be overwritten by what is older

    @property
    def counters(self) -> Counters:
        """For what is counted elsewhere."""
        return self._counting.counters

    @property
    def session(self) -> str:
        """What names this process in records."""
        return self._recorder.session

    def fetch(self, event: FetchEvent) -> None:
        """See ``ObserveFetch``."""
        self._recorder.fetch(event)
        self._counting.fetch(event)
        self.spans.fetch(event)

    def wait(self, event: WaitEvent) -> None:
        """See ``ObserveWait``."""
        self._recorder.wait(event)
        self._counting.wait(event)
        self.spans.wait(event)

    def started(self, start: StartRecord) -> None:
        """A snapshot was prepared for a container."""
        self._starts.append(start)

    def chain(self, parent: str, paths: frozenset[str]) -> None:
        """The store paths of an image, by their base names."""
        self._chains[parent] = paths

    def watch(self, totals: Totals) -> None:
        """Look at these whenever something is written, and count what they grew by."""
        self._totals.append(totals)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Telemetry]:
        """Write what there is until the block is left, and then once more."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run)
                yield self
                nursery.cancel_scope.cancel()
        finally:
            with trio.move_on_after(FAREWELL, shield=True):
                await self.flush()
            if self._journal is not None:
                self._journal.close()
            await close_spans(self.spans)

    async def _run(self) -> None:
        while True:
            await trio.sleep(EVERY)
            await self.flush()

    async def flush(self) -> None:
        """Write what there is."""
        async with self._turn:
            await self._flush()

    async def _flush(self) -> None:
        for totals in self._totals:
            self._differences.look(totals())
        batch = Batch(starts=self._starts, chains=self._chains)
        self._starts, self._chains = [], {}
        self._recorder.take(batch)
        self.counters.take(batch)
        try:
            await trio.to_thread.run_sync(self._write, batch, self._clock())
        except FusesnapError as error:
            self._give_back(batch)
            if not self._failing:
                log.warning("%s; start reports and metrics will lack something", error)
            self._failing = True
        except trio.Cancelled:
            self._give_back(batch)
            raise
        else:
            self._failing = False

    def _give_back(self, batch: Batch) -> None:
        self._recorder.give_back(batch)
        self.counters.give_back(batch)
        self._starts, self._chains = batch.starts + self._starts, batch.chains | self._chains

    def _write(self, batch: Batch, now: float) -> None:
        if self._journal is None:
            self._journal = Journal(self._root)
        if batch:
            self._journal.write(batch)
        if now - self._pruned >= PRUNE_EVERY:
            self._journal.prune(now)
            self._pruned = now

    @property
    def journal(self) -> Journal:
        """To be read, in a thread. Raises ``StorageFailure``."""
        if self._journal is None:
            self._journal = Journal(self._root)
        return self._journal
