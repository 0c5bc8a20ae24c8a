"""Counts what happens, under the names that Prometheus will see.

Counters are added up in the journal, over all processes of a state directory: they go on when one of them dies, is
replaced or reloaded, and never go back.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from fusesnap.daemon.telemetry.journal import Batch, CounterKey
from fusesnap.daemon.telemetry.phases import phase_after
from fusesnap.daemon.telemetry.records import Phase
from fusesnap.fetch.events import Asked, FetchEvent, Landed, Part, Rebuilt, Received
from fusesnap.filesystem.error_counts import kind_of
from fusesnap.filesystem.wait_events import Answered, Blocked, WaitEvent
from fusesnap.nix.store_path import StorePath

# Upper bounds in seconds. A wait is a round trip at least, and ends at the stall timeout of a slow link's large NAR.
BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
INFINITY: Final = "+Inf"


def key(name: str, labels: Mapping[str, str]) -> CounterKey:
    """A counter's key."""
    return name, "\n".join(f"{label}={labels[label]}" for label in sorted(labels))


def labels_of(text: str) -> dict[str, str]:
    """The labels in a counter's key."""
    return dict(line.split("=", 1) for line in text.split("\n") if line)


class Counters:
    """What counters grew by since they were last taken."""

    def __init__(self) -> None:
        self._grown: dict[CounterKey, float] = {}
        # Added up by whoever takes them: an observation costs whoever makes it nothing, and comes from any thread.
        self._observed: deque[tuple[_Series, float]] = deque()

    def add(self, name: str, amount: float = 1, /, **labels: str) -> None:
        """``name`` grows by ``amount``."""
        self.grow(key(name, labels), amount)

    def grow(self, which: CounterKey, amount: float) -> None:
        """The counter with this key grows by ``amount``."""
        self._grown[which] = self._grown.get(which, 0) + amount

    def observe(self, name: str, seconds: float, /, **labels: str) -> None:
        """A histogram gets one more value; in any thread."""
        self._observed.append((_series(name, tuple(labels.items())), seconds))

    def _add_up(self) -> None:
        """Put what was observed into buckets, which are cumulative, as Prometheus has them."""
        while self._observed:
            series, seconds = self._observed.popleft()
            for bound, bucket in series.buckets:
                # All buckets of a series are there from its first value: a quantile is wrong without the empty ones.
                self.grow(bucket, float(seconds <= bound))
            self.grow(series.sum, seconds)
            self.grow(series.count, 1)

    def take(self, batch: Batch) -> None:
        """Move what has grown into ``batch``."""
        self._add_up()
        batch.counters |= self._grown
        self._grown = {}

    def give_back(self, batch: Batch) -> None:
        """``batch`` could not be written."""
        for which, grown in batch.counters.items():
            self._grown[which] = self._grown.get(which, 0) + grown


@dataclass(frozen=True, slots=True)
class _Series:
    """The keys of a histogram with certain labels: each bound with that of its bucket, infinity the last."""

    buckets: tuple[tuple[float, CounterKey], ...]
    sum: CounterKey
    count: CounterKey


@lru_cache(maxsize=256)
def _series(name: str, labels: tuple[tuple[str, str], ...]) -> _Series:
    """A path has half a dozen values of them, and each value 17 keys."""
    named = dict(labels)
    bounds = [(bound, f"{bound:g}") for bound in BUCKETS] + [(math.inf, INFINITY)]
    buckets = tuple((bound, key(f"{name}_bucket", {"le": le, **named})) for bound, le in bounds)
    return _Series(buckets, key(f"{name}_sum", named), key(f"{name}_count", named))


@lru_cache(maxsize=256)
def fetched_bytes(cache: str, reason: str) -> CounterKey:
    """The key of a counter that grows thousands of times a second."""
    return key("fusesnap_fetched_bytes", {"cache": cache, "reason": reason})


@dataclass(slots=True)
class _Fetching:
    """A path that is under way: when its last step was, and who wants it."""

    reason: str
    since: float
    phase: Phase = Phase.QUEUED


@dataclass(slots=True)
class Counting:
    """Counts the events of one process. ``clock`` is a monotonic one, in seconds."""

    counters: Counters
    clock: Callable[[], float]
    _fetching: dict[tuple[StorePath, Part | None], _Fetching] = field(default_factory=dict)
    _blocked: dict[int, tuple[str, StorePath, float]] = field(default_factory=dict)
    _waiting: Counter[StorePath] = field(default_factory=Counter)

    def fetch(self, event: FetchEvent) -> None:
        """Something happened to a path."""
        which = event.path, event.part
        if isinstance(event, Rebuilt):
            reason = event.priority.name.lower()
            self.counters.add("fusesnap_rebuilt_bytes", event.size, reason=reason)
            return
        if isinstance(event, Asked):
            self._fetching[which] = _Fetching(event.priority.name.lower(), self.clock())
            return
        fetching = self._fetching.get(which)
        if fetching is None:
            return  # an observer must not fail, whatever it is told
        following = phase_after(event, fetching.phase)
        if following is not fetching.phase:
            self._end_phase(fetching)
            fetching.phase, fetching.since = following, self.clock()
        if isinstance(event, Received):
            reason = "reader" if self._waiting[event.path] else fetching.reason
            self.counters.grow(fetched_bytes(event.cache, reason), event.count)
        elif isinstance(event, Landed):
            self._end_phase(fetching)
            del self._fetching[which]
            outcome = "committed" if event.error is None else kind_of(event.error)
            self.counters.add("fusesnap_fetches", reason=fetching.reason, outcome=outcome)

    def _end_phase(self, fetching: _Fetching) -> None:
        seconds = self.clock() - fetching.since
        self.counters.observe("fusesnap_fetch_phase_seconds", seconds, phase=fetching.phase.value)

    def wait(self, event: WaitEvent) -> None:
        """A request begins to wait, or has waited."""
        match event:
            case Blocked(number, question):
                path = question.path
                self._blocked[number] = (question.operation, path, self.clock())
                self._waiting[path] += 1
            case Answered(number, error):
                if number not in self._blocked:
                    return
                operation, path, began = self._blocked.pop(number)
                self._waiting[path] -= 1
                if not self._waiting[path]:
                    del self._waiting[path]
                self.counters.observe(
                    "fusesnap_reader_wait_seconds", self.clock() - began, operation=operation
                )
                if error is not None:
                    self.counters.add("fusesnap_reader_errors", kind=kind_of(error))


class Differences:
    """Makes counters of totals that others keep, by what they grew."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._seen: dict[CounterKey, float] = {}

    def look(self, totals: Iterable[tuple[str, Mapping[str, str], float]]) -> None:
        """``totals`` are names, labels and what they are by now in this process."""
        for name, labels, total in totals:
            which = key(name, labels)
            grown = total - self._seen.get(which, 0)
            if grown > 0:
                self._counters.add(name, grown, **labels)
                self._seen[which] = total
