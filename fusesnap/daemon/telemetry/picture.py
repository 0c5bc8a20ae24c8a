"""Gathers one moment of a node for Prometheus."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

import trio
from prometheus_client import CollectorRegistry

from fusesnap.daemon.telemetry.keeper import Telemetry
from fusesnap.daemon.telemetry.metrics import Picture, registry
from fusesnap.store.disk_space import free_space
from fusesnap.store.local_store import LocalStore


async def gather(
    store: LocalStore, telemetry: Telemetry, moment: Callable[[], Awaitable[dict[str, Any]]]
) -> CollectorRegistry:
    """What is so now. ``moment`` gives the answer of ``fusesnap status``, also while the worker is away.

    Raises ``StorageFailure``.
    """
    status = await moment()
    await telemetry.flush()

    def look() -> Picture:
        return Picture(
            counters=telemetry.journal.counters(),
            status=status,
            store_bytes=store.size(),
            free_bytes=free_space(store.real),
            version=version("fusesnap"),
        )

    return registry(await trio.to_thread.run_sync(look))
