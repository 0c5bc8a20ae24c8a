"""Startup traces in the process that serves the mount, and the hints by which it learns of starts."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import trio

from fusesnap.daemon import control
from fusesnap.daemon.build import Node
from fusesnap.daemon.readers import container_of
from fusesnap.errors import FusesnapError
from fusesnap.fetch.traces.database import NAME, TraceDatabase
from fusesnap.fetch.traces.recorder import Bounds, Recorder
from fusesnap.fetch.traces.recording import Start
from fusesnap.fetch.traces.search import TraceSearch
from fusesnap.fetch.traces.traces import Policy, Traces
from fusesnap.filesystem.waiting import WaitingRequests
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.startup_trace import StartupTrace
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.trace_labels import TRACE_LABEL_PREFIX, parse_trace_labels

log = logging.getLogger(__name__)

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

    async def bundled(closure: ClosureDigest, paths: Collection[StorePath]) -> bool:
        return (await node.bundles.find(closure, paths)).brings

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
        bundled,
    )


def calls(
    store_dir: StoreDir,
    traces: Traces,
    bundled: Callable[[ClosureDigest, frozenset[StorePath]], Awaitable[object]],
    learn: Callable[[frozenset[StorePath]], object],
    nursery: trio.Nursery,
) -> Mapping[str, control.Answer]:
    """What the worker is told of starts. It answers before it goes about it.

    ``learn`` is told which paths they show, when ``bundled`` has looked for what a bundle tells of them.

    Thousands of paths are read in a thread: readers wait for the loop.
    """

    def paths_in(question: Mapping[str, Any], field: str) -> frozenset[StorePath]:
        return frozenset(store_dir.parse(path) for path in question[field])

    def start_in(question: Mapping[str, Any]) -> Start:
        lazy = paths_in(question, "lazy")
        paths = paths_in(question, "there") | lazy
        closure = ClosureDigest.of(paths, store_dir)
        return Start(str(question["key"]), str(question["upper"]), closure, paths, lazy)

    def image_in(
        question: Mapping[str, Any],
    ) -> tuple[ClosureDigest, frozenset[StorePath], StartupTrace | None]:
        paths = paths_in(question, "paths")
        try:
            carried = parse_trace_labels(question["labels"])
        except FusesnapError as error:
            log.warning("the trace that an image carries is not used: %s", error)
            carried = None
        return ClosureDigest.of(paths, store_dir), paths, carried

    async def learn_of(
        closure: ClosureDigest, paths: frozenset[StorePath], lazy: frozenset[StorePath]
    ) -> None:
        await bundled(closure, paths)
        learn(lazy)

    async def start(question: Mapping[str, Any]) -> dict[str, Any]:
        start = await trio.to_thread.run_sync(start_in, question)
        nursery.start_soon(traces.begin, start)
        nursery.start_soon(learn_of, start.closure, start.paths, start.lazy)
        return {}

    async def foresee(question: Mapping[str, Any]) -> dict[str, Any]:
        closure, paths, carried = await trio.to_thread.run_sync(image_in, question)
        nursery.start_soon(traces.foresee, closure, paths, carried)
        nursery.start_soon(learn_of, closure, paths, paths)
        return {}

    async def end(question: Mapping[str, Any]) -> dict[str, Any]:
        nursery.start_soon(traces.end, str(question["key"]))
        return {}

    return {"start": start, "foresee": foresee, "end": end}


class HintedStarts:
    """Tells the worker of starts. A hint that does not arrive costs time, nothing else."""

    def __init__(self, store_dir: StoreDir, worker: Path, nursery: trio.Nursery) -> None:
        self._store_dir = store_dir
        self._worker = worker
        self._nursery = nursery

    def begins(
        self, key: str, upper: Path, paths: frozenset[StorePath], lazy: frozenset[StorePath]
    ) -> None:
        """See ``Starts``."""
        self._nursery.start_soon(self._begins, key, upper, paths, lazy)

    def foreseen(self, paths: frozenset[StorePath], labels: Mapping[str, str]) -> None:
        """See ``Starts``."""
        self._nursery.start_soon(self._foreseen, paths, labels)

    def ended(self, key: str) -> None:
        """See ``Starts``."""
        self._nursery.start_soon(self._hint, "end", {"key": key})

    async def _begins(
        self, key: str, upper: Path, paths: frozenset[StorePath], lazy: frozenset[StorePath]
    ) -> None:
        there, missing = (
            [self._store_dir.format(path) for path in each] for each in (paths - lazy, lazy)
        )
        question = {"key": key, "upper": str(upper), "there": there, "lazy": missing}
        await self._hint("start", question)

    async def _foreseen(self, paths: frozenset[StorePath], labels: Mapping[str, str]) -> None:
        names = [self._store_dir.format(path) for path in paths]
        said = {key: value for key, value in labels.items() if key.startswith(TRACE_LABEL_PREFIX)}
        await self._hint("foresee", {"paths": names, "labels": said})

    async def _hint(self, call: str, arguments: Mapping[str, Any]) -> None:
        try:
            await control.ask(self._worker, call, **arguments)
        except FusesnapError as error:
            log.info("the worker did not take a hint (%s): %s", call, error)
