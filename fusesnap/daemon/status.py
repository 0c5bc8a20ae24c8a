"""What ``fusesnap status`` shows, gathered from the worker's objects."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from fusesnap.daemon.build import Node
from fusesnap.fetch.flight import FlightState
from fusesnap.filesystem.waiting import WaitingState
from fusesnap.substituter.watched import CacheState

# What a worker that cannot be asked may have had.
NOTHING_KNOWN: dict[str, Any] = {
    "fetching": [],
    "requested": {},
    "link": None,
    "waiting": [],
    "errors": [],
}


def node_status(node: Node) -> dict[str, Any]:
    """What every process of ours knows of a node, as JSON values."""
    counts = node.store.counts()
    return {
        "state": str(node.settings.root),
        "store_dir": node.store_dir.path,
        "address": str(node.settings.socket),
        "fuse_mount": str(node.settings.root / "lazy"),
        "stall_timeout": node.settings.fetch.stall_timeout,
        "paths": {"committed": counts.committed, "valid": counts.valid, "missing": counts.pinned},
        "caches": [cache(state) for state in node.pool.states()],
    }


def worker_status(node: Node) -> dict[str, Any]:
    """This moment of the worker, as JSON values. Sizes in bytes, times in seconds."""
    return {
        **node_status(node),
        "worker": {"pid": os.getpid()},
        "fetching": [flight(node, state) for state in node.realiser.flights()],
        "requested": {
            priority.name.lower(): count for priority, count in node.realiser.requested().items()
        },
        "link": link(node),
    }


def status_of_wait(node: Node, state: WaitingState) -> dict[str, Any]:
    """One request that waits: who, since when, for what, and how long it may go on without progress."""
    question, transfer = state.question, state.flight
    stall = node.settings.fetch.stall_timeout
    return {
        "operation": question.operation,
        "path": node.store_dir.format(question.path),
        "file": os.fsdecode(question.file),
        "probable_readers": [asdict(reader) for reader in state.readers],
        "asked": state.asked,
        "seconds": round(state.seconds, 3),
        "for": waits_for(transfer),
        "cache": transfer.cache if transfer else None,
        "received": transfer.received if transfer else 0,
        "expected": transfer.expected if transfer else None,
        "rate": round(transfer.rate, 1) if transfer else 0.0,
        "idle": round(transfer.idle, 3) if transfer else 0.0,
        "gives_up_in": round(max(0.0, stall - transfer.idle), 3) if transfer else None,
    }


def link(node: Node) -> dict[str, Any]:
    """What was measured of the link: bytes a second at most of late, and seconds that a request takes at least."""
    caches = [state.url for state in node.pool.states()]
    return {
        "rate": round(node.link.rate, 1),
        "round_trips": {url: round(node.link.round_trip(url), 4) for url in caches},
    }


def waits_for(transfer: FlightState | None) -> str:
    """What a request waits for, in a word."""
    if transfer is None:
        return "disk"
    if transfer.queued:
        return "turn"
    if transfer.cache is None:
        return "narinfo"
    if transfer.paused:
        return "pause"
    return "verify" if transfer.verifying else "transfer"


def cache(state: CacheState) -> dict[str, Any]:
    """One substituter."""
    return {
        "url": state.url,
        "priority": state.priority,
        "reachable": state.reachable,
        "last_error": state.last_error,
        "narinfos": state.narinfos_asked,
        "bytes": state.bytes_received,
        "breaker": state.breaker.value,
        "failures": state.failures,
        "retry_in": round(state.retry_in, 3),
        "bad_nars": state.bad_nars,
        "avoided_for": round(state.avoided_for, 3),
    }


def flight(node: Node, state: FlightState) -> dict[str, Any]:
    """One path that is being fetched."""
    return {
        "path": node.store_dir.format(state.path),
        "cache": state.cache,
        "received": state.received,
        "expected": state.expected,
        "seconds": round(state.seconds, 3),
        "waiting": state.waiting,
        "for": waits_for(state),
        "rate": round(state.rate, 1),
        "idle": round(state.idle, 3),
        "priority": state.priority.name.lower(),
        "paused": state.paused,
        "probable_readers": [asdict(reader) for reader in state.readers],
    }
