"""Hints of starts, from the services process, which hears of them, to the worker, which fetches."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import trio

from fusesnap.daemon import control
from fusesnap.errors import FusesnapError
from fusesnap.fetch.traces.recording import Start
from fusesnap.fetch.traces.traces import Traces
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.startup_trace import StartupTrace
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.trace_labels import TRACE_LABEL_PREFIX, parse_trace_labels

log = logging.getLogger(__name__)

Programs: TypeAlias = Sequence[Sequence[str]]
# Whether a trace says by now what a start reads.
IsForeseen: TypeAlias = Callable[[], Awaitable[bool]]
# What a container above the snapshot of a name may run; see ``UnpackedImages``.
FindPrograms: TypeAlias = Callable[[str], Awaitable[Programs]]


@dataclass(frozen=True, slots=True)
class HeardHints:
    """What the worker does about hints, in tasks of ``nursery``: it answers before it goes about it.

    ``open`` is for when an image begins to be pulled, of which nothing is known.
    When ``bundled`` has looked for what a bundle tells of a closure, ``learn`` is told which paths may be fetched; and
    if it does not bring their start, ``get_ready`` too, and ``follow`` what they may run.
    """

    store_dir: StoreDir
    traces: Traces
    get_ready: Callable[[frozenset[StorePath]], Awaitable[object]]
    bundled: Callable[[ClosureDigest, frozenset[StorePath]], Awaitable[bool]]
    learn: Callable[[frozenset[StorePath]], object]
    follow: Callable[[frozenset[StorePath], Programs, IsForeseen], Awaitable[object]]
    open: Callable[[], Awaitable[object]]
    nursery: trio.Nursery

    @property
    def calls(self) -> Mapping[str, control.Answer]:
        """For the control socket. Thousands of paths are read in a thread: readers wait for the loop."""
        return {
            "start": self._start,
            "pull": self._pull,
            "foresee": self._foresee,
            "programs": self._programs,
            "end": self._end,
        }

    async def _start(self, question: Mapping[str, Any]) -> dict[str, Any]:
        start = await trio.to_thread.run_sync(self._start_in, question)
        self.nursery.start_soon(self.traces.begin, start)
        self.nursery.start_soon(self._learn_of, start.closure, start.paths, start.lazy)
        return {}

    async def _pull(self, question: Mapping[str, Any]) -> dict[str, Any]:
        self.nursery.start_soon(self.open)
        return {}

    async def _foresee(self, question: Mapping[str, Any]) -> dict[str, Any]:
        closure, paths, carried = await trio.to_thread.run_sync(self._image_in, question)
        self.nursery.start_soon(self.traces.foresee, closure, paths, carried)
        self.nursery.start_soon(self._learn_of, closure, paths, paths)
        return {}

    async def _programs(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """All of ``paths`` can be had; containers that show them may run ``programs``, the places of each."""
        paths = await trio.to_thread.run_sync(self._paths_in, question, "paths")
        programs = [[str(place) for place in places] for places in question["programs"]]
        self.nursery.start_soon(self._follow, paths, programs)
        return {}

    async def _end(self, question: Mapping[str, Any]) -> dict[str, Any]:
        self.nursery.start_soon(self.traces.end, str(question["key"]))
        return {}

    async def _learn_of(
        self, closure: ClosureDigest, paths: frozenset[StorePath], lazy: frozenset[StorePath]
    ) -> None:
        if not await self.bundled(closure, paths):
            self.nursery.start_soon(self.get_ready, lazy)
        self.learn(lazy)

    async def _follow(self, paths: frozenset[StorePath], programs: Programs) -> None:
        closure = await trio.to_thread.run_sync(ClosureDigest.of, paths, self.store_dir)
        if not await self.bundled(closure, paths):
            await self.follow(paths, programs, partial(self.traces.knows, closure))

    def _paths_in(self, question: Mapping[str, Any], field: str) -> frozenset[StorePath]:
        return frozenset(self.store_dir.parse(path) for path in question[field])

    def _start_in(self, question: Mapping[str, Any]) -> Start:
        lazy = self._paths_in(question, "lazy")
        paths = self._paths_in(question, "there") | lazy
        closure = ClosureDigest.of(paths, self.store_dir)
        return Start(str(question["key"]), str(question["upper"]), closure, paths, lazy)

    def _image_in(
        self, question: Mapping[str, Any]
    ) -> tuple[ClosureDigest, frozenset[StorePath], StartupTrace | None]:
        paths = self._paths_in(question, "paths")
        try:
            carried = parse_trace_labels(question["labels"])
        except FusesnapError as error:
            log.warning("the trace that an image carries is not used: %s", error)
            carried = None
        return ClosureDigest.of(paths, self.store_dir), paths, carried


class HintedStarts:
    """Tells the worker of starts. A hint that does not arrive costs time, nothing else.

    ``programs``, if the worker is to be told of them, finds what a container above a snapshot may run.
    """

    def __init__(
        self,
        store_dir: StoreDir,
        worker: Path,
        nursery: trio.Nursery,
        programs: FindPrograms | None = None,
    ) -> None:
        self._store_dir = store_dir
        self._worker = worker
        self._nursery = nursery
        self._programs = programs

    def pull_begins(self) -> None:
        """Something is about to be pulled: perhaps an image of Nix packages."""
        self._nursery.start_soon(self._hint, "pull", {})

    def begins(
        self, key: str, upper: Path, paths: frozenset[StorePath], lazy: frozenset[StorePath]
    ) -> None:
        """See ``Starts``."""
        self._nursery.start_soon(self._begins, key, upper, paths, lazy)

    def foreseen(self, paths: frozenset[StorePath], labels: Mapping[str, str]) -> None:
        """See ``Starts``."""
        self._nursery.start_soon(self._foreseen, paths, labels)

    def admitted(self, name: str, paths: frozenset[StorePath]) -> None:
        """See ``Starts``."""
        if self._programs is not None:
            self._nursery.start_soon(self._admitted, name, paths, self._programs)

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

    async def _admitted(
        self,
        name: str,
        paths: frozenset[StorePath],
        programs: FindPrograms,
    ) -> None:
        try:
            found = [list(places) for places in await programs(name)]
        except FusesnapError as error:
            log.info("%s: it is not known what its containers start with: %s", name, error)
            return
        if found:
            names = [self._store_dir.format(path) for path in paths]
            await self._hint("programs", {"paths": names, "programs": found})

    async def _hint(self, call: str, arguments: Mapping[str, Any]) -> None:
        try:
            await control.ask(self._worker, call, **arguments)
        except FusesnapError as error:
            log.info("the worker did not take a hint (%s): %s", call, error)
