"""What a start of a container waited for, found out from the journal's records.

A start begins when its snapshot is prepared, and is over when nothing in the container has waited for a while. Times
are seconds from its beginning.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fusesnap.daemon.telemetry.records import HERE, FetchRecord, Phase, StartRecord, WaitRecord

# Seconds without a wait after which what is waited for next is no part of the same start.
QUIET: Final = 30.0
# Seconds from Prepare to the first wait beyond which the container was made long before it was started.
LONG_BEFORE: Final = 60.0
# Of what is done at the same time for one path, what is told.
NEAREST: Final = (Phase.TRANSFER, Phase.VERIFY, Phase.ASKING, Phase.PAUSED, Phase.QUEUED)
# How finely the use of the link is drawn.
LINK_STEPS: Final = 80


@dataclass(frozen=True, slots=True)
class Segment:
    """``phase`` from ``begin`` to ``end``."""

    phase: Phase
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Wait:
    """A process was blocked. ``probable``: it is who last opened the file. ``on_chain``: the start waited for this."""

    begin: float
    end: float
    pid: int | None
    command: str
    probable: bool
    operation: str
    file: str
    error: str | None
    on_chain: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One store path, ``path`` its base name. ``received`` bytes of ``expected`` came from ``caches``.

    ``reason``: for whom it was asked for first. ``mine``: it belongs to the container. ``retries``: how often a
    transfer began again.
    """

    path: str
    reason: str
    mine: bool
    asked: float
    segments: tuple[Segment, ...]
    waits: tuple[Wait, ...]
    caches: tuple[str, ...]
    received: int
    expected: int | None
    retries: int
    error: str | None

    @property
    def on_chain(self) -> bool:
        """Whether the start waited for it."""
        return any(wait.on_chain for wait in self.waits)


@dataclass(frozen=True, slots=True)
class Link:
    """One step of the use of the link: bytes for this start and for others, in ``seconds``."""

    begin: float
    seconds: float
    mine: float
    others: float


@dataclass(frozen=True, slots=True)
class Start:
    """One start. ``began`` is in seconds since the epoch, ``prepared`` when Prepare had answered.

    ``blocked``: seconds in which somebody waited; ``chain``: seconds of the longest chain of waits, one after another,
    and ``chain_phases`` what they were for. ``bytes_by_cache`` are those that came for this container meanwhile, and
    ``bytes_of_others`` what came for others over the same link. ``later``: waits after the start was over.
    """

    key: str
    image: str
    began: float
    seconds: float
    prepared: float | None
    fuse: bool
    rows: tuple[Row, ...]
    links: tuple[Link, ...]
    blocked: float
    chain: float
    chain_waits: int
    chain_phases: Mapping[Phase, float]
    bytes_by_cache: Mapping[str, int]
    bytes_of_others: int
    later: int

    @property
    def bytes_received(self) -> int:
        """For this container, over the link."""
        return sum(count for cache, count in self.bytes_by_cache.items() if cache != HERE)

    @property
    def transferring(self) -> float:
        """Seconds in which bytes came for this container."""
        spans = [
            (segment.begin, segment.end)
            for row in self.rows
            if row.mine
            for segment in row.segments
            if segment.phase is Phase.TRANSFER
        ]
        return union(spans)


def bursts(waits: Sequence[WaitRecord]) -> list[list[WaitRecord]]:
    """The starts in the waits of one container, which are in the order of their beginning."""
    found: list[list[WaitRecord]] = []
    quiet_since = float("-inf")
    for wait in waits:
        if not found or wait.began - quiet_since > QUIET:
            found.append([])
        found[-1].append(wait)
        quiet_since = max(quiet_since, wait.ended if wait.ended is not None else wait.began)
    return found


def longest_chain(waits: Sequence[tuple[float, float]]) -> list[int]:
    """Which of these spans of time follow one another and are longest together; their numbers in order of time.

    No two of them overlap: whoever waits for the last of them could not have been served sooner by fewer waits than
    these. Weighted interval scheduling.
    """
    order = sorted(range(len(waits)), key=lambda number: waits[number][1])
    ends = [waits[number][1] for number in order]
    best: list[tuple[float, int]] = [(0.0, -1)]  # (seconds, the last of the order that is taken)
    before: list[int] = []
    for place, number in enumerate(order):
        begin, end = waits[number]
        follows = bisect_right(ends, begin, 0, place)
        before.append(follows)
        taken = best[follows][0] + end - begin
        best.append((taken, place) if taken > best[-1][0] else best[-1])
    chain: list[int] = []
    place = best[-1][1]
    while place >= 0:
        chain.append(order[place])
        place = best[before[place]][1]
    return chain[::-1]


def merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same moments in spans of time that do not overlap, in order."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that are in any of these spans of time."""
    return sum(end - begin for begin, end in merged(spans))


def segments_of(fetch: FetchRecord, end: float) -> list[Segment]:
    """The phases of a fetch; ``end`` is when it was last seen, where it has not ended."""
    if not fetch.steps:
        return []
    last = max(fetch.landed if fetch.landed is not None else end, fetch.steps[-1].at)
    ends = [*(step.at for step in fetch.steps[1:]), last]
    return [
        Segment(step.phase, step.at, until)
        for step, until in zip(fetch.steps, ends, strict=True)
        if until > step.at
    ]


def flattened(segments: Iterable[Segment]) -> list[Segment]:
    """What is done at each moment, where several parts of a path are under way: that which is nearest to its end."""
    edges = [(each.begin, 1, each.phase) for each in segments]
    edges += [(each.end, -1, each.phase) for each in segments]
    under_way: Counter[Phase] = Counter()
    found: list[Segment] = []
    before = 0.0
    for moment, change, phase in sorted(edges, key=lambda edge: edge[0]):
        now = next((each for each in NEAREST if under_way[each]), None)
        if now is not None and moment > before:
            if found and found[-1].phase is now and found[-1].end == before:
                before = found.pop().begin
            found.append(Segment(now, before, moment))
        under_way[phase] += change
        before = moment
    return found


def cut(segments: Iterable[Segment], begin: float, end: float) -> dict[Phase, float]:
    """Seconds of each phase between ``begin`` and ``end``; what is in none of them, the disk was waited for."""
    found: dict[Phase, float] = defaultdict(float)
    for segment in segments:
        shared = min(end, segment.end) - max(begin, segment.begin)
        if shared > 0:
            found[segment.phase] += shared
    rest = end - begin - sum(found.values())
    if rest > 0:
        found[Phase.DISK] += rest
    return found


def start_of(
    waits: Sequence[WaitRecord],
    fetches: Sequence[FetchRecord],
    record: StartRecord,
    chain_paths: frozenset[str],
    *,
    later: int = 0,
    first: bool = True,
) -> Start:
    """One start, of the waits of one burst and of all fetches of its time.

    ``first``: it is the first one after ``record``'s Prepare. ``later``: how many waits came after it.
    """
    began, end = span_of(waits, record, first=first)
    mine = chain_paths | {wait.path for wait in waits}
    spans = [
        (wait.began - began, (wait.ended if wait.ended is not None else end) - began)
        for wait in waits
    ]
    chain = longest_chain(spans)
    fetches = [fetch for fetch in fetches if fetch.landed is None or fetch.landed >= began]
    rows = _rows(waits, spans, set(chain), fetches, mine, began, end)
    phases: dict[Phase, float] = defaultdict(float)
    by_path = {row.path: row for row in rows}
    for number in chain:
        for phase, seconds in cut(by_path[waits[number].path].segments, *spans[number]).items():
            phases[phase] += seconds
    own, others = _bytes(fetches, mine, began, end)
    return Start(
        key=record.key,
        image=record.parent,
        began=began,
        seconds=end - began,
        prepared=record.ended - began if first and began == record.began else None,
        fuse=record.fuse,
        rows=tuple(rows),
        links=tuple(_links(fetches, mine, began, end)),
        blocked=union(spans),
        chain=sum(spans[number][1] - spans[number][0] for number in chain),
        chain_waits=len(chain),
        chain_phases={phase: phases[phase] for phase in Phase if phases[phase] > 0},
        bytes_by_cache=own,
        bytes_of_others=others,
        later=later,
    )


def span_of(
    waits: Sequence[WaitRecord], record: StartRecord, *, first: bool
) -> tuple[float, float]:
    """When a start began and when its last reader was served, in seconds since the epoch."""
    began = record.began
    if waits and not (first and waits[0].began - record.ended <= LONG_BEFORE):
        began = waits[0].began
    ends = [wait.ended if wait.ended is not None else wait.began for wait in waits]
    return began, max([record.ended if began == record.began else began, *ends])


def _rows(
    waits: Sequence[WaitRecord],
    spans: Sequence[tuple[float, float]],
    chain: set[int],
    fetches: Sequence[FetchRecord],
    mine: frozenset[str] | set[str],
    began: float,
    end: float,
) -> list[Row]:
    waits_of: dict[str, list[Wait]] = defaultdict(list)
    for number, (wait, span) in enumerate(zip(waits, spans, strict=True)):
        waits_of[wait.path].append(_wait(wait, span, on_chain=number in chain))
    fetches_of: dict[str, list[FetchRecord]] = defaultdict(list)
    for fetch in fetches:
        fetches_of[fetch.path].append(fetch)
    paths = [*waits_of, *(path for path in fetches_of if path not in waits_of)]
    rows = [
        _row(path, fetches_of[path], waits_of.get(path, []), path in mine, began, end)
        for path in paths
    ]
    return sorted(rows, key=lambda row: (row.asked, row.path))


def _row(
    path: str,
    fetches: Sequence[FetchRecord],
    waits: Sequence[Wait],
    mine: bool,
    began: float,
    end: float,
) -> Row:
    segments = [
        Segment(segment.phase, segment.begin - began, segment.end - began)
        for fetch in fetches
        for segment in segments_of(fetch, end)
    ]
    segments = flattened(segments)
    shown = [*segments, *_disk(waits, segments)]
    attempts = [attempt for fetch in fetches for attempt in fetch.attempts]
    begins = [*(wait.begin for wait in waits), *(fetch.asked - began for fetch in fetches)]
    return Row(
        path=path,
        reason=fetches[0].priority if fetches else "reader",
        mine=mine,
        asked=min(begins),
        segments=tuple(sorted(shown, key=lambda segment: segment.begin)),
        waits=tuple(waits),
        caches=tuple(dict.fromkeys(attempt.cache for attempt in attempts)),
        received=sum(fetch.received for fetch in fetches),
        expected=sum(fetch.expected or 0 for fetch in fetches) or None,
        retries=sum(max(0, len(fetch.attempts) - 1) for fetch in fetches),
        error=fetches[-1].error if fetches else None,
    )


def _disk(waits: Sequence[Wait], segments: Sequence[Segment]) -> list[Segment]:
    """Where somebody waited while nothing was under way."""
    under_way = merged((segment.begin, segment.end) for segment in segments)
    found = []
    for begin, end in merged((wait.begin, wait.end) for wait in waits):
        for taken, until in under_way:
            if begin < min(taken, end):
                found.append(Segment(Phase.DISK, begin, min(taken, end)))
            begin = max(begin, min(until, end))  # noqa: PLW2901 - what is left of it
        if begin < end:
            found.append(Segment(Phase.DISK, begin, end))
    return found


def _wait(wait: WaitRecord, span: tuple[float, float], *, on_chain: bool) -> Wait:
    return Wait(
        begin=span[0],
        end=span[1],
        pid=wait.pid,
        command=wait.command,
        probable=not wait.asked,
        operation=wait.operation,
        file=wait.file,
        error=wait.error,
        on_chain=on_chain,
    )


def _bytes(
    fetches: Iterable[FetchRecord], mine: frozenset[str] | set[str], began: float, end: float
) -> tuple[dict[str, int], int]:
    own: dict[str, int] = defaultdict(int)
    others = 0
    for fetch in fetches:
        came = round(fetch.received_at(end) - fetch.received_at(began))
        if came <= 0 or not fetch.attempts:
            continue
        if fetch.path in mine:
            own[fetch.attempts[-1].cache] += came
        else:
            others += came
    return dict(own), others


def _links(
    fetches: Sequence[FetchRecord], mine: frozenset[str] | set[str], began: float, end: float
) -> list[Link]:
    step = (end - began) / LINK_STEPS
    if step <= 0:
        return []
    came = [[0.0, 0.0] for _ in range(LINK_STEPS)]
    for fetch in fetches:
        if not fetch.marks or fetch.attempts[-1].cache == HERE:
            continue
        # Only where its bytes came: there may be thousands of fetches.
        first = max(0, int((fetch.attempts[0].at - began) / step))
        last = min(LINK_STEPS - 1, int((fetch.last_byte - began) / step))
        before = fetch.received_at(began + first * step)
        for number in range(first, last + 1):
            after = fetch.received_at(began + (number + 1) * step)
            came[number][fetch.path not in mine] += after - before
            before = after
    return [Link(number * step, step, own, others) for number, (own, others) in enumerate(came)]
