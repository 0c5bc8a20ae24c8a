"""Gives events their times and makes records of them. It lives in the loop's thread, and waits for nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Final, TypeAlias, TypeVar

from fusesnap.daemon.telemetry.journal import Batch
from fusesnap.daemon.telemetry.records import FetchRecord, WaitRecord
from fusesnap.daemon.telemetry.under_way import LONGEST_ERROR, FetchUnderWay
from fusesnap.fetch.events import Asked, FetchEvent, Landed, Part, Rebuilt
from fusesnap.filesystem.wait_events import Answered, Blocked, WaitEvent
from fusesnap.nix.store_path import StorePath

T = TypeVar("T")

# Ended records that may wait to be written: when the disk is full, or more happens than anybody will look at, the
# oldest are let go.
UNWRITTEN: Final = 4096

# A path, and which part of it.
Fetched: TypeAlias = tuple[StorePath, Part | None]


class Recorder:
    """Records of one process, whose ``session`` is no other's. ``clock`` gives seconds since the epoch.

    ``upper_of`` says in which container a reader is, by its pid.
    """

    def __init__(
        self, session: str, clock: Callable[[], float], upper_of: Callable[[int], str | None]
    ) -> None:
        self.session = session
        self._clock = clock
        self._upper_of = upper_of
        self._numbers = 0
        self._fetches: dict[Fetched, FetchUnderWay] = {}
        self._waits: dict[int, WaitRecord] = {}
        self._changed_fetches: dict[int, FetchUnderWay] = {}
        self._returned: dict[int, FetchRecord] = {}  # what could not be written
        self._changed_waits: dict[int, WaitRecord] = {}

    def fetch(self, event: FetchEvent) -> None:
        """Something happened to a path."""
        which, now = (event.path, event.part), self._clock()
        if isinstance(event, Rebuilt):
            self._numbers += 1
            fetch = FetchUnderWay.rebuilt(self.session, self._numbers, event, now)
        elif isinstance(event, Asked):
            self._numbers += 1
            fetch = FetchUnderWay(self.session, self._numbers, event, now)
            self._fetches[which] = fetch
        elif (known := self._fetches.get(which)) is not None:
            fetch = known
            fetch.hear(event, now)
        else:
            return  # an observer must not fail, whatever it is told
        if fetch.number not in self._changed_fetches:
            self._changed_fetches[fetch.number] = fetch
            _keep_the_newest(self._changed_fetches)
        if isinstance(event, Landed):
            del self._fetches[which]

    def wait(self, event: WaitEvent) -> None:
        """A request begins to wait, or has waited."""
        if isinstance(event, Blocked):
            self._note(self._blocked(event))
            return
        before = self._waits.pop(event.number, None)
        if before is not None:
            record = replace(before, ended=self._clock(), error=_said(event))
            self._changed_waits[record.number] = record

    def _blocked(self, event: Blocked) -> WaitRecord:
        question = event.question
        uppers = ((reader, self._upper_of(reader.pid)) for reader in reversed(event.readers))
        # Several may have opened the file: the last one that is in a container is the most probable.
        found = sorted(uppers, key=lambda each: each[1] is None)
        reader, upper = found[0] if found else (None, None)
        return WaitRecord(
            session=self.session,
            number=event.number,
            upper=upper,
            pid=reader.pid if reader else None,
            command=reader.command if reader else "",
            asked=bool(question.pid),
            operation=question.operation,
            path=question.path.base_name,
            file=os.fsencode(question.file).decode(errors="replace"),
            began=self._clock(),
        )

    def _note(self, record: WaitRecord) -> None:
        self._waits[record.number] = self._changed_waits[record.number] = record
        _keep_the_newest(self._changed_waits)

    def take(self, batch: Batch) -> None:
        """Move what has changed into ``batch``."""
        changed = {number: fetch.record() for number, fetch in self._changed_fetches.items()}
        batch.fetches += (self._returned | changed).values()
        batch.waits += self._changed_waits.values()
        self._returned = {}
        self._changed_fetches.clear()
        self._changed_waits.clear()

    def give_back(self, batch: Batch) -> None:
        """``batch`` could not be written: try again later, unless something newer is known."""
        self._returned = {each.number: each for each in batch.fetches} | self._returned
        self._changed_waits = {each.number: each for each in batch.waits} | self._changed_waits
        _keep_the_newest(self._returned)
        _keep_the_newest(self._changed_waits)


def _keep_the_newest(records: dict[int, T]) -> None:
    while len(records) > UNWRITTEN:
        del records[next(iter(records))]


def _said(event: Answered) -> str | None:
    if event.cancelled:
        return "its worker stopped before there was an answer"
    return None if event.error is None else str(event.error)[:LONGEST_ERROR]
