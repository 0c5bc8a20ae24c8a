"""A snapshotter whose calls are timed, and whose containers' starts are noted."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Final

import trio

from fusesnap.daemon.telemetry.keeper import Telemetry
from fusesnap.daemon.telemetry.records import StartRecord
from fusesnap.errors import (
    AlreadyExists,
    FailedPrecondition,
    FusesnapError,
    InvalidArgument,
    NotFound,
)
from fusesnap.filesystem.error_counts import kind_of
from fusesnap.nix.store_path import StorePath
from fusesnap.snapshots.interface import Info, Mount, Snapshots, Usage

log = logging.getLogger(__name__)

# What containerd is told in the ordinary course of things.
ANSWERS: Final = (
    (NotFound, "no such snapshot"),
    (AlreadyExists, "exists"),
    (FailedPrecondition, "precondition"),
    (InvalidArgument, "argument"),
)
UPPER: Final = "upperdir="
LOWER: Final = "lowerdir="


class ObservedSnapshots(Snapshots):
    """``inner``, with what its calls take told to ``telemetry``.

    ``clock`` gives seconds since the epoch. ``paths_of`` says, in a thread, which store paths stand in the chain of a
    committed snapshot; it is asked in ``nursery``, once for each, because nobody waits for the answer. ``state`` is the
    state directory, as mounts name it.
    """

    def __init__(
        self,
        inner: Snapshots,
        telemetry: Telemetry,
        clock: Callable[[], float],
        paths_of: Callable[[str], frozenset[StorePath]],
        state: str,
        nursery: trio.Nursery,
    ) -> None:
        self._inner = inner
        self._telemetry = telemetry
        self._clock = clock
        self._paths_of = paths_of
        self._state = state
        self._nursery = nursery
        self._known: set[str] = set()

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount]:
        """See ``Snapshots``."""
        began = self._clock()
        async with self._timed("prepare", snapshot=key, parent=parent):
            mounts = await self._inner.prepare(key, parent, labels)
        self.prepared(key, parent, mounts, began)
        return mounts

    def prepared(self, key: str, parent: str, mounts: Sequence[Mount], began: float) -> None:
        """A snapshot was prepared; ``began`` in seconds since the epoch. Notes its start, if it is a container's."""
        start = start_of(mounts, self._state)
        if start is not None:
            upper, fuse = start
            self._telemetry.started(StartRecord(key, parent, upper, began, self._clock(), fuse))
            if parent not in self._known:
                self._known.add(parent)
                self._nursery.start_soon(self._note_chain, parent)

    def span(self, call: str, **attributes: str) -> AbstractContextManager[object]:
        """The span of a call, in any thread."""
        return self._telemetry.spans.call(call, **attributes)

    def took(self, call: str, seconds: float) -> None:
        """A call has been answered; in any thread."""
        self._telemetry.counters.observe("fusesnap_snapshot_call_seconds", seconds, call=call)

    async def _note_chain(self, parent: str) -> None:
        try:
            paths = await trio.to_thread.run_sync(self._paths_of, parent)
        except FusesnapError as error:  # it may be gone by now
            self._known.discard(parent)
            log.debug("%s: its store paths are not noted: %s", parent, error)
            return
        self._telemetry.chain(parent, frozenset(path.base_name for path in paths))

    async def view(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount]:
        """See ``Snapshots``."""
        async with self._timed("view", snapshot=key, parent=parent):
            return await self._inner.view(key, parent, labels)

    async def mounts(self, key: str) -> Sequence[Mount]:
        """See ``Snapshots``."""
        async with self._timed("mounts", snapshot=key):
            return await self._inner.mounts(key)

    async def commit(
        self, name: str, key: str, labels: Mapping[str, str], parent: str = ""
    ) -> None:
        """See ``Snapshots``."""
        async with self._timed("commit", snapshot=key, name=name):
            await self._inner.commit(name, key, labels, parent)

    async def remove(self, key: str) -> None:
        """See ``Snapshots``."""
        async with self._timed("remove", snapshot=key):
            await self._inner.remove(key)

    async def stat(self, key: str) -> Info:
        """See ``Snapshots``."""
        async with self._timed("stat"):
            return await self._inner.stat(key)

    async def update(self, info: Info, fields: Sequence[str] = ()) -> Info:
        """See ``Snapshots``."""
        async with self._timed("update"):
            return await self._inner.update(info, fields)

    async def usage(self, key: str) -> Usage:
        """See ``Snapshots``."""
        async with self._timed("usage"):
            return await self._inner.usage(key)

    async def walk(self, matches: Callable[[Info], bool] | None = None) -> Sequence[Info]:
        """See ``Snapshots``."""
        async with self._timed("list"):
            return await self._inner.walk(matches)

    async def cleanup(self) -> None:
        """See ``Snapshots``."""
        async with self._timed("cleanup"):
            await self._inner.cleanup()

    @asynccontextmanager
    async def _timed(self, call: str, **attributes: str) -> AsyncIterator[None]:
        began, outcome = trio.current_time(), "cancelled"
        try:
            with self.span(call, **attributes):
                yield
            outcome = "ok"
        except FusesnapError as error:
            outcome = told_as(error)
            raise
        finally:
            self.took(call, trio.current_time() - began)
            if outcome not in ("ok", "cancelled"):
                self._telemetry.counters.add(
                    "fusesnap_snapshot_call_errors", call=call, kind=outcome
                )


def told_as(error: FusesnapError) -> str:
    """A word or two for what containerd is told."""
    return next((name for kind, name in ANSWERS if isinstance(error, kind)), kind_of(error))


def start_of(mounts: Sequence[Mount], state: str) -> tuple[str, bool] | None:
    """The upper directory of a mount that shows the store, and whether FUSE is in it; ``None`` of any other."""
    for mount in mounts:
        upper = _option(mount, UPPER)
        lowers = _option(mount, LOWER).split(":")
        # Idmapped clones of the state directory lie below it.
        ours = [lower for lower in lowers if lower.startswith(f"{state}/")]
        fuse = any("/lazy/" in lower[len(state) :] for lower in ours)
        if upper and (fuse or any("/farms/" in lower[len(state) :] for lower in ours)):
            return upper, fuse
    return None


def _option(mount: Mount, name: str) -> str:
    return next((each[len(name) :] for each in mount.options if each.startswith(name)), "")
