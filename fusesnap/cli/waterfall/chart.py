"""What a picture of a start shows, whatever draws it: its words, its rows, its scale."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from fusesnap.cli.status import size
from fusesnap.daemon.telemetry.records import Phase
from fusesnap.daemon.telemetry.start import Row, Start

# Rows that a person can still look at.
MOST_ROWS: Final = 60
HASH_SHOWN: Final = 6
HASH: Final = 33  # characters of a base name before the name: the hash and a hyphen
TICKS: Final = 8  # at most

WORDS: Final = {
    Phase.QUEUED: "waiting for its turn",
    Phase.ASKING: "asking a cache",
    Phase.TRANSFER: "transferring",
    Phase.PAUSED: "paused for others",
    Phase.VERIFY: "verifying, committing",
    Phase.DISK: "reading the local disk",
}
WHY: Final = {
    Phase.QUEUED: "waiting for a turn: more urgent transfers, or earlier ones, had the link",
    Phase.ASKING: "round trips: a cache was asked, and no byte had come",
    Phase.TRANSFER: "the link: bytes came as fast as they could",
    Phase.PAUSED: "a pause: more urgent transfers had the link",
    Phase.VERIFY: "this machine: checking and committing what had come",
    Phase.DISK: "the local disk: looking at what is there",
}


# Of a path that nobody waited for: why it was fetched.
AHEAD: Final = {
    "reader": "ahead, for what was read",
    "trace": "ahead, for what was read",
    "rest": "ahead, with its image",
    "completion": "in the background",
    "prefetch": "prefetched",
}


@dataclass(frozen=True, slots=True)
class Fact:
    """A figure and what it is."""

    value: str
    label: str


@dataclass(frozen=True, slots=True)
class ChartRow:
    """A row with its words: ``label`` names the path as a person knows it, ``by`` says who asked first."""

    row: Row
    label: str
    by: str
    measure: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture. ``seconds`` is its length, ``ticks`` where its axis has a number."""

    start: Start
    title: str
    subtitle: str
    verdict: str
    why: str
    facts: tuple[Fact, ...]
    rows: tuple[ChartRow, ...]
    folded: str
    seconds: float
    ticks: tuple[float, ...]


def chart(start: Start) -> Chart:
    """The picture of ``start``."""
    start = legible(start)
    shown, hidden = choose(start.rows)
    labels = labels_of(shown)
    length = max(start.seconds, 1e-3)
    return Chart(
        start=start,
        title=start.key.rpartition("/")[2],
        subtitle=subtitle(start),
        verdict=verdict(start),
        why=why(start),
        facts=tuple(facts(start)),
        rows=tuple(
            ChartRow(row, label, asked_by(row), measure(row))
            for row, label in zip(shown, labels, strict=True)
        ),
        folded=folded(hidden),
        seconds=length,
        ticks=tuple(ticks(length)),
    )


def legible(start: Start) -> Start:
    """``start`` without characters that move a terminal's cursor or that XML has not: anybody may name a file so."""
    rows = []
    for row in start.rows:
        waits = tuple(
            replace(wait, command=_printable(wait.command), file=_printable(wait.file))
            for wait in row.waits
        )
        error = None if row.error is None else _printable(row.error)
        caches = tuple(map(_printable, row.caches))
        path = _printable(row.path)
        rows.append(replace(row, path=path, waits=waits, error=error, caches=caches))
    by_cache = {_printable(cache): count for cache, count in start.bytes_by_cache.items()}
    return replace(start, key=_printable(start.key), rows=tuple(rows), bytes_by_cache=by_cache)


def _printable(words: str) -> str:
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in words)


def subtitle(start: Start) -> str:
    """Where and when."""
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(start.began))
    begins = "Prepare" if start.prepared is not None else "the first wait"
    return f"{start.key}, {when}; from {begins} to the last reader that was served"


def verdict(start: Start) -> str:
    """How much of it was waiting, in a sentence."""
    if not start.chain_waits:
        if start.fuse:
            return "Nothing in this container has waited for a store path."
        return "Everything was here before it started: nothing was waited for, and FUSE is not in its mount."
    waits = (
        "one wait" if start.chain_waits == 1 else f"{start.chain_waits} waits, one after another"
    )
    whole = 100 * start.chain / start.seconds if start.seconds > 0 else 100
    return f"The longest chain is {waits}: {seconds(start.chain)}, {whole:.0f} % of the start."


def why(start: Start) -> str:
    """What most of the longest chain was, in a sentence; nothing where there is none."""
    if start.chain <= 0:
        return ""
    worst = max(start.chain_phases, key=lambda phase: start.chain_phases[phase])
    share = 100 * start.chain_phases[worst] / start.chain
    return f"Most of it ({share:.0f} %) was {WHY[worst]}."


def facts(start: Start) -> list[Fact]:
    """The figures on top."""
    mine = [row for row in start.rows if row.mine]
    fetched = [row for row in mine if row.received]
    found = [
        Fact(seconds(start.seconds), "the start"),
        Fact(seconds(start.blocked), "somebody was blocked"),
    ]
    if fetched:
        waited = sum(1 for row in fetched if row.waits)
        found += [
            Fact(f"{waited} of {len(fetched)}", "fetched paths were waited for"),
            Fact(size(start.bytes_received), "came for it"),
        ]
    if start.transferring > 0:
        rate = 8 * start.bytes_received / start.transferring / 1e6
        found.append(Fact(f"{rate:.1f} Mbit/s", "while bytes came"))
    both = start.bytes_received + start.bytes_of_others
    if both:
        found.append(Fact(f"{100 * start.bytes_received / both:.0f} %", "of the link's bytes"))
    return found


def choose(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Those to draw, in their order, and the rest: what was waited for comes before what was not."""
    mine = [row for row in rows if row.mine]
    ranked = sorted(
        mine,
        key=lambda row: (not row.on_chain, -sum(wait.end - wait.begin for wait in row.waits)),
    )
    kept = {row.path for row in ranked[:MOST_ROWS]}
    return [row for row in mine if row.path in kept], [
        row for row in rows if row.path not in kept or not row.mine
    ]


def folded(rows: Sequence[Row]) -> str:
    """The rest in a line; nothing if there is no rest."""
    mine = [row for row in rows if row.mine]
    others = [row for row in rows if not row.mine and row.received]
    parts = [
        f"{len(some)} more {'path' if len(some) == 1 else 'paths'} {whose}, {size(sum(row.received for row in some))}"
        for some, whose in ((mine, "of this container"), (others, "for others meanwhile"))
        if some
    ]
    return f"and {'; '.join(parts)}" if parts else ""


def labels_of(rows: Sequence[Row]) -> list[str]:
    """Names without their hashes, but for those that would be the same."""
    names = Counter(row.path[HASH:] or row.path for row in rows)
    return [
        name if names[name] == 1 else f"{name} ({row.path[:HASH_SHOWN]})"
        for row in rows
        for name in [row.path[HASH:] or row.path]
    ]


def asked_by(row: Row) -> str:
    """Who wanted it first, as far as that is known."""
    if not row.waits:
        return AHEAD.get(row.reason, row.reason)
    first = min(row.waits, key=lambda wait: wait.begin)
    doubt = "?" if first.probable else ""
    who = f"{first.command}{doubt} ({first.pid})" if first.pid else "unknown"
    more = len({wait.pid for wait in row.waits}) - 1
    return f"{who} {first.operation}" + (f", {more} more" if more > 0 else "")


def measure(row: Row) -> str:
    """How much, and how long."""
    begin = min([segment.begin for segment in row.segments], default=row.asked)
    end = max([segment.end for segment in row.segments], default=row.asked)
    amount = f"{size(row.received)}, " if row.received else ""
    return f"{amount}{seconds(end - begin)}"


def ticks(length: float) -> list[float]:
    """Round moments from 0 to ``length`` seconds."""
    step = 1e-4
    for factor in (2, 2.5, 2) * 12:
        if length / step <= TICKS:
            break
        step *= factor
    return [number * step for number in range(int(length / step) + 1)]


def seconds(count: float) -> str:
    """Seconds for people."""
    return f"{count:.2f} s" if count >= 1 else f"{1000 * count:.0f} ms"
