"""What ``fusesnap status`` shows, gathered from the worker's objects."""

from __future__ import annotations

import os
from typing import Any

from fusesnap.daemon.build import Node
from fusesnap.fetch.flight import FlightState
from fusesnap.substituter.watched import CacheState


def worker_status(node: Node) -> dict[str, Any]:
    """This moment of the worker, as JSON values. Sizes in bytes, times in seconds."""
    counts = node.store.counts()
    return {
        "state": str(node.settings.root),
        "store_dir": node.store_dir.path,
        "address": str(node.settings.socket),
        "fuse_mount": str(node.settings.root / "lazy"),
        "worker": {"pid": os.getpid()},
        "paths": {"committed": counts.committed, "valid": counts.valid, "missing": counts.pinned},
        "caches": [cache(state) for state in node.pool.states()],
        "fetching": [flight(node, state) for state in node.realiser.flights()],
    }


def cache(state: CacheState) -> dict[str, Any]:
    """One substituter."""
    return {
        "url": state.url,
        "priority": state.priority,
        "reachable": state.reachable,
        "last_error": state.last_error,
        "narinfos": state.narinfos_asked,
        "bytes": state.bytes_received,
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
        "probable_readers": [
            {"pid": reader.pid, "command": reader.command} for reader in state.readers
        ],
    }
