"""The metrics of a node, as Prometheus has them (https://prometheus.io/docs/practices/naming/)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from fusesnap.daemon.telemetry.counting import INFINITY, labels_of
from fusesnap.daemon.telemetry.journal import CounterKey


@dataclass(frozen=True, slots=True)
class Described:
    """What a counter or a histogram means, and its labels in the order in which they are shown."""

    meaning: str
    labels: tuple[str, ...] = ()


COUNTERS: Final = {
    "fusesnap_fetched_bytes": Described(
        "Bytes of compressed NARs that came from a cache, by why they were fetched.",
        ("cache", "reason"),
    ),
    "fusesnap_rebuilt_bytes": Described(
        "Bytes of compressed NARs that no cache had to send, because they were made of other paths that are here.",
        ("reason",),
    ),
    "fusesnap_fetches": Described(
        "Store paths whose fetch has ended: committed, or the kind of the error.",
        ("reason", "outcome"),
    ),
    "fusesnap_narinfo_requests": Described("Requests for narinfos.", ("cache",)),
    "fusesnap_requests": Described(
        "Requests of the kernel that FUSE has taken: answered from the local store, or after a fetch.",
        ("operation", "source"),
    ),
    "fusesnap_read_bytes": Described("Bytes that reads through FUSE were answered with."),
    "fusesnap_reader_errors": Described(
        "Requests that got an error after they had waited, by its kind.", ("kind",)
    ),
    "fusesnap_snapshot_call_errors": Described(
        "Calls of containerd's that failed, by the kind of the error.", ("call", "kind")
    ),
    "fusesnap_worker_starts": Described("Workers that took the mount over, the first one too."),
    "fusesnap_evicted_paths": Described("Store paths that were removed to stay within the limits."),
    "fusesnap_evicted_bytes": Described("Bytes on disk that this freed."),
}
HISTOGRAMS: Final = {
    "fusesnap_reader_wait_seconds": Described(
        "How long requests waited for a store path, until they were answered.", ("operation",)
    ),
    "fusesnap_fetch_phase_seconds": Described(
        "How long fetches were in each phase: queued, asking, transfer, paused, verify.", ("phase",)
    ),
    "fusesnap_snapshot_call_seconds": Described("How long calls of containerd's took.", ("call",)),
}
# What requests wait for, and the states of a breaker: each is there also when nobody waits, to be graphed.
WAITS_FOR: Final = ("narinfo", "turn", "transfer", "pause", "verify", "disk")
BREAKERS: Final = ("closed", "half-open", "open")


@dataclass(frozen=True, slots=True)
class Picture:
    """One moment: counters of the journal, the answer of ``fusesnap status``, and what the disk says, in bytes."""

    counters: Mapping[CounterKey, float]
    status: Mapping[str, Any]
    store_bytes: int
    free_bytes: int
    version: str


class PictureCollector(Collector):
    """Gives a picture to prometheus_client."""

    def __init__(self, picture: Picture) -> None:
        self._picture = picture

    def collect(self) -> Iterator[Metric]:
        """Every family."""
        yield InfoMetricFamily(
            "fusesnap_build", "Which fusesnap this is.", {"version": self._picture.version}
        )
        yield from counters(self._picture.counters)
        yield from histograms(self._picture.counters)
        yield from gauges(self._picture)


def registry(picture: Picture) -> CollectorRegistry:
    """To be written out by prometheus_client."""
    found = CollectorRegistry()
    found.register(PictureCollector(picture))
    return found


def counters(values: Mapping[CounterKey, float]) -> Iterator[Metric]:
    """Every counter; one that never counted is there without a sample, but for those without labels."""
    families = {
        name: CounterMetricFamily(name, described.meaning, labels=described.labels)
        for name, described in COUNTERS.items()
    }
    for (name, text), value in sorted(values.items()):
        if name in families:
            families[name].add_metric(_values(COUNTERS[name], labels_of(text)), value)
    for name, described in COUNTERS.items():
        if not described.labels and (name, "") not in values:
            families[name].add_metric([], 0)
    yield from families.values()


def histograms(values: Mapping[CounterKey, float]) -> Iterator[Metric]:
    """Every histogram, from the counters that are its buckets, its sum and its count."""
    for name, described in HISTOGRAMS.items():
        buckets: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
        sums: dict[tuple[str, ...], float] = {}
        for (counter, text), value in values.items():
            labels = labels_of(text)
            if counter == f"{name}_bucket":
                buckets[tuple(_values(described, labels))][labels["le"]] = value
            elif counter == f"{name}_sum":
                sums[tuple(_values(described, labels))] = value
        family = HistogramMetricFamily(name, described.meaning, labels=described.labels)
        for which, found in sorted(buckets.items()):
            family.add_metric(
                which, sorted(found.items(), key=lambda each: _bound(each[0])), sums.get(which, 0.0)
            )
        yield family


def gauges(picture: Picture) -> Iterator[Metric]:
    """How things are now. Without a worker there is nothing of what only it knows."""
    status = picture.status
    worker = status["worker"]["pid"] is not None
    yield _gauge("fusesnap_worker_up", "Whether a worker answers.", float(worker))
    yield _gauge("fusesnap_store_bytes", "What the local store takes on disk.", picture.store_bytes)
    yield _gauge("fusesnap_disk_free_bytes", "What is free on its disk.", picture.free_bytes)
    paths = status["paths"]
    yield _labelled(
        "fusesnap_store_paths",
        "Store paths: committed (verified and here), valid (with all that they reference), missing.",
        "state",
        {state: paths[state] for state in ("committed", "valid", "missing")},
    )
    yield _gauge(
        "fusesnap_snapshots_on_fuse",
        "Mounted snapshots that need the daemon.",
        len(status["depend_on_fuse"]),
    )
    yield from caches(status["caches"])
    if worker:
        yield from work(status)


def work(status: Mapping[str, Any]) -> Iterator[Metric]:
    """What waits and what is fetched now."""
    waiting = status["waiting"]
    yield _labelled(
        "fusesnap_requests_waiting",
        "Requests that wait now, by what they wait for.",
        "for",
        {what: sum(1 for each in waiting if each["for"] == what) for what in WAITS_FOR},
    )
    yield _gauge(
        "fusesnap_longest_wait_seconds",
        "How long the one has waited that waits for the longest time.",
        max([each["seconds"] for each in waiting], default=0.0),
    )
    fetching = status["fetching"]
    queued = sum(1 for each in fetching if each["for"] == "turn")
    paused = sum(1 for each in fetching if each["for"] == "pause")
    yield _labelled(
        "fusesnap_transfers",
        "Store paths that are fetched now, that wait for their turn, and that gave way to others.",
        "state",
        {"running": len(fetching) - queued - paused, "queued": queued, "paused": paused},
    )


def caches(states: Iterable[Mapping[str, Any]]) -> Iterator[Metric]:
    """How each cache is, as the worker sees it."""
    up = GaugeMetricFamily(
        "fusesnap_cache_up",
        "Whether a cache answered when it was last asked; one that was not asked yet is not shown.",
        labels=["cache"],
    )
    breaker = GaugeMetricFamily(
        "fusesnap_cache_breaker",
        "1 for the state that a cache's circuit breaker is in, 0 for the others.",
        labels=["cache", "state"],
    )
    for each in states:
        if each["reachable"] is not None:
            up.add_metric([each["url"]], float(each["reachable"]))
        for state in BREAKERS:
            breaker.add_metric([each["url"], state], float(each["breaker"] == state))
    yield up
    yield breaker


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(name, meaning, value=value)


def _labelled(name: str, meaning: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=[label])
    for which, value in values.items():
        family.add_metric([which], value)
    return family


def _values(described: Described, labels: Mapping[str, str]) -> list[str]:
    return [labels.get(label, "") for label in described.labels]


def _bound(le: str) -> float:
    return float("inf") if le == INFINITY else float(le)
