"""Startup traces in the process that serves the mount."""

from __future__ import annotations

import time
from collections.abc import Collection
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Final

import trio

from fusesnap.daemon.build import Node
from fusesnap.daemon.readers import container_of
from fusesnap.fetch.bundles import Bundles
from fusesnap.fetch.traces.database import NAME, TraceDatabase
from fusesnap.fetch.traces.recorder import Bounds, Recorder
from fusesnap.fetch.traces.search import TraceSearch
from fusesnap.fetch.traces.traces import Policy, Traces
from fusesnap.filesystem.waiting import WaitingRequests
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.store_path import StorePath

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")  # random(4)


def make_recorder(node: Node, bounds: Bounds) -> Recorder:
    """What takes notice of a mount's requests."""

    def path_of(ordinal: int) -> StorePath | None:
        pin = node.store.pin_of(ordinal)
        return None if pin is None else pin.info.store_path

    return Recorder(path_of, trio.current_time, bounds)


def make_traces(node: Node, recorder: Recorder, waiting: WaitingRequests) -> Traces:
    """The traces of a node."""
    settings = node.settings
    return Traces(
        lambda: TraceDatabase(settings.root / NAME),
        recorder,
        node.store,
        node.contents.foresee,
        waiting.paths,
        container_of,
        TraceSearch(
            node.pool.caches(),
            TrustedKeys.parse(settings.trusted_public_keys),
            time.time,
            settings.fetch.lookup_timeout,
        ),
        time.time,
        Policy(
            record=settings.traces.record,
            replay=settings.traces.replay,
            ask=settings.traces.ask_caches,
            version=version("fusesnap"),
            readahead=settings.readahead_kib * 1024,
            boot=BOOT_ID.read_text(encoding="ascii").strip(),
        ),
        partial(bundled, node.bundles),
    )


async def bundled(bundles: Bundles, closure: ClosureDigest, paths: Collection[StorePath]) -> bool:
    """Whether a startup bundle brings what a start of ``closure`` reads; what it says is taken over then."""
    return (await bundles.find(closure, paths)).brings
