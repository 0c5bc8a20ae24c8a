"""What the journal holds, as values. Times are seconds since the epoch, sizes bytes of compressed NARs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeVar

from pydantic import TypeAdapter, ValidationError

from fusesnap.errors import InvalidData

T = TypeVar("T")

# In the place of a cache's URL: chunks that were made of other paths.
HERE: Final = "paths that were here"


class Phase(Enum):
    """What a path does on its way. The values are for scripts and metrics."""

    QUEUED = "queued"  # its turn has not come
    ASKING = "asking"  # a cache was asked, and no byte has come: round trips
    TRANSFER = "transfer"  # bytes come
    PAUSED = "paused"  # some came, and more urgent ones have the link
    VERIFY = "verify"  # all came; they are checked and committed
    DISK = "disk"  # a reader waits for something that is here


@dataclass(frozen=True, slots=True)
class Step:
    """``phase`` begins at ``at``."""

    at: float
    phase: Phase


@dataclass(frozen=True, slots=True)
class Attempt:
    """At ``at`` bytes were asked of ``cache``, beyond those ``kept`` from an earlier attempt."""

    at: float
    cache: str
    kept: int = 0


@dataclass(frozen=True, slots=True)
class FetchRecord:
    """A path on its way from a cache into the store. ``path`` is its base name.

    ``part`` is which bytes of the compressed NAR, where single chunks are fetched.
    ``session`` names the process that fetched, ``number`` the fetch in it. ``priority``: for whom it was asked for.
    ``steps`` are what it did one after the other, from ``asked`` to ``landed``; ``marks`` are pairs of a time and of
    the bytes that were there by then. Without ``landed`` it is under way, or ended with its process; with ``error`` it
    is not in the store.
    """

    session: str
    number: int
    path: str
    priority: str
    asked: float
    steps: tuple[Step, ...] = ()
    landed: float | None = None
    expected: int | None = None
    received: int = 0
    part: tuple[int, int] | None = None
    attempts: tuple[Attempt, ...] = ()
    marks: tuple[tuple[float, int], ...] = ()
    error: str | None = None

    @property
    def last_byte(self) -> float:
        """When the last byte came that is here."""
        verified = [step.at for step in self.steps if step.phase is Phase.VERIFY]
        last = self.marks[-1][0] if self.marks else self.asked
        return max(last, *verified[-1:], self.asked)

    def received_at(self, time: float) -> float:
        """How many bytes were there at ``time``, taken as if they came evenly between two marks."""
        before = (self.attempts[0].at if self.attempts else self.asked, 0)
        if time <= before[0]:
            return 0.0
        for mark in (*self.marks, (self.last_byte, self.received)):
            if mark[0] >= time:
                span = mark[0] - before[0]
                share = (time - before[0]) / span if span > 0 else 1.0
                return before[1] + (mark[1] - before[1]) * min(1.0, max(0.0, share))
            before = mark
        return float(self.received)


@dataclass(frozen=True, slots=True)
class WaitRecord:
    """A request of a reader that was blocked. ``upper`` is the upper directory of the container's root, if it has one.

    ``asked``: the process asked, otherwise it is who last opened the file, so the probable one. ``file`` is within
    ``path``, a base name, where it is known. Without ``ended`` it waits, or its worker died; then the next worker was
    asked the same.
    """

    session: str
    number: int
    upper: str | None
    pid: int | None
    command: str
    asked: bool
    operation: str
    path: str
    file: str
    began: float
    ended: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StartRecord:
    """A snapshot was prepared for a container: by ``key``, on ``parent``, between ``began`` and ``ended``.

    ``fuse``: something was missing then, so that the mount has our FUSE mount among its layers.
    """

    key: str
    parent: str
    upper: str
    began: float
    ended: float
    fuse: bool


FETCH: Final = TypeAdapter(FetchRecord)
WAIT: Final = TypeAdapter(WaitRecord)
START: Final = TypeAdapter(StartRecord)


def parse(kind: TypeAdapter[T], text: str) -> T:
    """A record from its JSON text. Raises ``InvalidData``: it may be of another release."""
    try:
        return kind.validate_json(text)
    except ValidationError as error:
        raise InvalidData(f"journal: {error.errors()[0]['msg']}: {text[:200]}") from error
