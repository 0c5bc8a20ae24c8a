"""Starts that a report can be about, with everything that it can meet."""

from __future__ import annotations

from fusesnap.daemon.telemetry.records import (
    Attempt,
    FetchRecord,
    Phase,
    StartRecord,
    Step,
    WaitRecord,
)
from fusesnap.daemon.telemetry.start import Start, start_of

BEGAN = 1_790_000_000.0
UPPER = "/var/lib/fusesnap/snapshots/7/fs"
WHOLE = (Phase.QUEUED, Phase.ASKING, Phase.TRANSFER, Phase.VERIFY)
CACHE, MIRROR = "https://cache.example.org", "https://mirror.example.org"
RECORD = StartRecord(
    "k8s.io/12/0123456789abcdef", "k8s.io/11/sha256:aa", UPPER, BEGAN, BEGAN + 0.02, fuse=True
)


def base(digit: int, name: str) -> str:
    """A store path's base name."""
    return f"{digit:x}" * 32 + f"-{name}"


def fetch(
    number: int,
    name: str,
    times: tuple[float, float, float, float, float],
    size: int = 1_000_000,
    *,
    priority: str = "reader",
    cache: str = CACHE,
) -> FetchRecord:
    """A fetch; ``times`` are when it was asked for, a cache was, the first and the last byte came, and it landed."""
    asked, began, first, last, landed = (BEGAN + each for each in times)
    steps = zip((asked, began, first, last), WHOLE, strict=True)
    return FetchRecord(
        session="one",
        number=number,
        path=base(number, name),
        priority=priority,
        asked=asked,
        steps=tuple(Step(at, phase) for at, phase in steps),
        landed=landed,
        expected=size,
        received=size,
        attempts=(Attempt(began, cache),),
        marks=((first, 0), (last, size)),
    )


def wait(
    number: int, path: str, begin: float, end: float | None, *, pid: int = 42, asked: bool = True
) -> WaitRecord:
    """A wait of a process."""
    return WaitRecord(
        session="one",
        number=number,
        upper=UPPER,
        pid=pid,
        command="redis-server",
        asked=asked,
        operation="open",
        path=path,
        file="bin/<redis> & co",
        began=BEGAN + begin,
        ended=None if end is None else BEGAN + end,
    )


FETCHES = [
    fetch(1, "redis-7.0.15", (0.1, 0.1, 0.35, 0.9, 1.0)),
    fetch(2, "glibc-2.40-66", (1.0, 1.3, 1.5, 2.6, 2.7), 2_600_000, cache=MIRROR),
    fetch(3, "openssl-3.4.1", (1.05, 1.05, 1.2, 2.0, 2.1), priority="trace"),
    fetch(
        4, "a-name-so-long-that-nobody-could-want-to-read-all-of-it-1.0", (1.1, 1.4, 1.6, 1.7, 1.8)
    ),
    fetch(5, "java-of-another-container", (0.0, 0.0, 0.2, 2.4, 2.5), 4_000_000),
]
WAITS = [
    wait(1, FETCHES[0].path, 0.1, 1.0),
    wait(2, FETCHES[1].path, 1.02, 2.7),
    wait(3, FETCHES[2].path, 1.2, 2.1, pid=43, asked=False),
    wait(4, base(6, "here-already"), 2.71, 2.74),
]
CHAIN = frozenset(each.path for each in FETCHES[:4])


def sample() -> Start:
    """A start that waited for some paths, while another container fetched too."""
    return start_of(WAITS, FETCHES, RECORD, CHAIN, later=2)


def nothing() -> Start:
    """A start for which everything was there."""
    record = StartRecord(RECORD.key, RECORD.parent, UPPER, BEGAN, BEGAN + 0.01, fuse=False)
    return start_of([], [], record, CHAIN)
