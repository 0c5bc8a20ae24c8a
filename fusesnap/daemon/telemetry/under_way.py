"""A fetch that is being recorded. Thousands of pieces a second come: hearing of one must cost next to nothing."""

from __future__ import annotations

from typing import Final

from fusesnap.daemon.telemetry.phases import phase_after
from fusesnap.daemon.telemetry.records import HERE, Attempt, FetchRecord, Phase, Step
from fusesnap.fetch.events import Asked, FetchEvent, Landed, Rebuilt, Received, TransferBegun

# Marks of one fetch: a small picture of when its bytes came. When there are more, every second is dropped.
MARKS: Final = 64
MARK_EVERY: Final = 0.05  # seconds, to begin with
ATTEMPTS: Final = 16
STEPS: Final = 64
# A reason is for people; a stranger's answer may be in it.
LONGEST_ERROR: Final = 500


class FetchUnderWay:
    """One fetch, from the event that somebody ``asked`` for it at ``now``. See ``FetchRecord``."""

    def __init__(self, session: str, number: int, asked: Asked, now: float) -> None:
        self.number = number
        self._session = session
        self._event = asked
        self._asked = now
        self._phase = Phase.QUEUED
        self._steps = [Step(now, Phase.QUEUED)]
        self._attempts: list[Attempt] = []
        self._marks: list[tuple[float, int]] = []
        self._mark_due = float("-inf")
        self._mark_every = MARK_EVERY
        self._expected: int | None = None
        self._received = 0
        self._landed: float | None = None
        self._error: str | None = None

    def hear(self, event: FetchEvent, now: float) -> None:
        """Something happened to it."""
        phase = phase_after(event, self._phase)
        if phase is not self._phase:
            self._phase = phase
            self._steps = [*self._steps, Step(now, phase)][-STEPS:]
        if isinstance(event, Received):
            self._received += event.count
            if now >= self._mark_due:
                self._mark(now)
        elif isinstance(event, TransferBegun):
            self._expected, self._received = event.expected, event.kept
            attempt = Attempt(now, event.cache, event.kept)
            self._attempts = [*self._attempts, attempt][-ATTEMPTS:]
        elif isinstance(event, Landed):
            self._landed = now
            self._error = None if event.error is None else str(event.error)[:LONGEST_ERROR]

    @classmethod
    def rebuilt(cls, session: str, number: int, event: Rebuilt, now: float) -> FetchUnderWay:
        """One that was over at once: nothing had to come."""
        found = cls(session, number, Asked(event.path, event.priority, event.part), now)
        for step in (
            TransferBegun(event.path, HERE, event.size, part=event.part),
            Received(event.path, HERE, event.size, event.part),
            Landed(event.path, part=event.part),
        ):
            found.hear(step, now)
        return found

    def _mark(self, now: float) -> None:
        self._marks.append((now, self._received))
        if len(self._marks) > MARKS:
            self._marks = self._marks[1::2]
            self._mark_every *= 2
        self._mark_due = now + self._mark_every

    def record(self) -> FetchRecord:
        """What is known of it now."""
        return FetchRecord(
            session=self._session,
            number=self.number,
            path=self._event.path.base_name,
            priority=self._event.priority.name.lower(),
            asked=self._asked,
            steps=tuple(self._steps),
            landed=self._landed,
            expected=self._expected,
            received=self._received,
            part=self._event.part,
            attempts=tuple(self._attempts),
            marks=tuple(self._marks),
            error=self._error,
        )
