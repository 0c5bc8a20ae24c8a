"""Gives events their times and makes records of them. It lives in the loop's thread, and waits for nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Final, TypeAlias

from fusesnap.daemon.telemetry.journal import Batch
from fusesnap.daemon.telemetry.phases import phase_after
from fusesnap.daemon.telemetry.records import (
    Attempt,
    FetchRecord,
    Phase,
    Step,
    WaitRecord,
)
from fusesnap.fetch.events import Asked, FetchEvent, Landed, Part, Received, TransferBegun
from fusesnap.filesystem.wait_events import Answered, Blocked, WaitEvent

# Ended records that may wait to be written: when the disk is full, or more happens than anybody will look at, the
# oldest are let go.
UNWRITTEN: Final = 4096
# Marks of one fetch: a small picture of when its bytes came. When there are more, every second is dropped.
MARKS: Final = 64
MARK_EVERY: Final = 0.05  # seconds, to begin with
ATTEMPTS: Final = 16
STEPS: Final = 64
# A reason is for people; a stranger's answer may be in it.
LONGEST_ERROR: Final = 500

# A path, and which part of it.
Fetched: TypeAlias = tuple[str, Part | None]


class Recorder:
    """Records of one process, whose ``session`` is no other's. ``clock`` gives seconds since the epoch.

    ``upper_of`` says in which container a reader is, by its pid.
    """

    def __init__(
        self, session: str, clock: Callable[[], float], upper_of: Callable[[int], str | None]
    ) -> None:
        self._session = session
        self._clock = clock
        self._upper_of = upper_of
        self._numbers = 0
        self._fetches: dict[Fetched, FetchRecord] = {}
        self._mark_every: dict[Fetched, float] = {}
        self._waits: dict[int, WaitRecord] = {}
        self._changed_fetches: dict[int, FetchRecord] = {}
        self._changed_waits: dict[int, WaitRecord] = {}

    def fetch(self, event: FetchEvent) -> None:
        """Something happened to a path."""
        which, now = (event.path.base_name, event.part), self._clock()
        if isinstance(event, Asked):
            self._numbers += 1
            priority = event.priority.name.lower()
            steps = (Step(now, Phase.QUEUED),)
            begun = FetchRecord(
                self._session, self._numbers, which[0], priority, now, steps, part=event.part
            )
            self._keep(begun)
            return
        before = self._fetches.get(which)
        if before is None:  # pragma: no cover - each path is asked for first
            return
        self._keep(self._after(before, event, now))
        if isinstance(event, Landed):
            del self._fetches[which]
            self._mark_every.pop(which, None)

    def _after(self, before: FetchRecord, event: FetchEvent, now: float) -> FetchRecord:
        record = stepped(before, event, now)
        match event:
            case TransferBegun(_, cache, expected, kept):
                attempts = (*before.attempts, Attempt(now, cache, kept))[-ATTEMPTS:]
                return replace(record, attempts=attempts, expected=expected, received=kept)
            case Received(_, _, count):
                return self._received(record, count, now)
            case Landed(_, error):
                said = None if error is None else str(error)[:LONGEST_ERROR]
                return replace(record, landed=now, error=said)
        return record

    def _received(self, before: FetchRecord, count: int, now: float) -> FetchRecord:
        received = before.received + count
        marks = before.marks
        which = before.path, before.part
        every = self._mark_every.setdefault(which, MARK_EVERY)
        if not marks or now - marks[-1][0] >= every:
            marks = (*marks, (now, received))
            if len(marks) > MARKS:
                marks = marks[1::2]
                self._mark_every[which] = every * 2
        return replace(before, received=received, marks=marks)

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
            session=self._session,
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

    def _keep(self, record: FetchRecord) -> None:
        self._fetches[record.path, record.part] = record
        self._changed_fetches[record.number] = record
        while len(self._changed_fetches) > UNWRITTEN:
            del self._changed_fetches[next(iter(self._changed_fetches))]

    def _note(self, record: WaitRecord) -> None:
        self._waits[record.number] = self._changed_waits[record.number] = record
        while len(self._changed_waits) > UNWRITTEN:
            del self._changed_waits[next(iter(self._changed_waits))]

    def take(self, batch: Batch) -> None:
        """Move what has changed into ``batch``."""
        batch.fetches += self._changed_fetches.values()
        batch.waits += self._changed_waits.values()
        self._changed_fetches.clear()
        self._changed_waits.clear()

    def give_back(self, batch: Batch) -> None:
        """``batch`` could not be written: try again later, unless something newer is known."""
        self._changed_fetches = {
            each.number: each for each in batch.fetches
        } | self._changed_fetches
        self._changed_waits = {each.number: each for each in batch.waits} | self._changed_waits


def stepped(record: FetchRecord, event: FetchEvent, now: float) -> FetchRecord:
    """``record`` after ``event``; no step is added where it does the same as before."""
    before = record.steps[-1].phase
    phase = phase_after(event, before)
    if phase is before:
        return record
    return replace(record, steps=(*record.steps, Step(now, phase))[-STEPS:])


def _said(event: Answered) -> str | None:
    if event.cancelled:
        return "its worker stopped before there was an answer"
    return None if event.error is None else str(event.error)[:LONGEST_ERROR]
