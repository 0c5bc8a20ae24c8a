"""The inside of store paths that are not committed yet, however it can be had.

By the chunk where a trusted index says how, else whole. What goes wrong with chunks ends in the whole NAR, from
whatever cache has it; a reader sees nothing of that but the time that it takes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

import trio

from fusesnap.errors import (
    DeadlineExceeded,
    FusesnapError,
    InvalidData,
    PathNotFound,
    StorageFailure,
    Unavailable,
    UntrustedPath,
)
from fusesnap.fetch.chunked_path import ChunkedPath
from fusesnap.fetch.chunked_paths import ChunkedPaths
from fusesnap.fetch.flight import Flight
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.realiser import Realiser
from fusesnap.nix.store_path import StorePath
from fusesnap.nix.tree import Tree
from fusesnap.store.local_store import LocalStore

log = logging.getLogger(__name__)

# Indexes that are asked for ahead at a time. They are small, and what they cost is round trips.
_AHEAD: Final = 16
# Seconds without a read after which the files of a path are closed.
UNUSED: Final = 120.0


def _nobody(flight: Flight) -> None:
    """Nobody wants to see what is waited for."""


class Contents:
    """What readers ask. ``nursery`` holds what is fetched ahead."""

    def __init__(
        self,
        store: LocalStore,
        realiser: Realiser,
        chunked: ChunkedPaths,
        nursery: trio.Nursery,
    ) -> None:
        self._store = store
        self._realiser = realiser
        self._chunked = chunked
        self._nursery = nursery
        self._ahead = trio.CapacityLimiter(_AHEAD)

    def cached_tree(self, ordinal: int) -> Tree | None:
        """The tree behind an ordinal, if it is in memory: never waits."""
        return self._realiser.cached_tree(ordinal)

    def forget_tree(self, ordinal: int) -> None:
        """Look at the path behind an ordinal again at the next question."""
        self._realiser.forget_tree(ordinal)

    async def tree(
        self,
        path: StorePath,
        pid: int | None = None,
        watch: Callable[[Flight], None] = _nobody,
        priority: Priority = Priority.READER,
    ) -> Tree:
        """The tree of ``path``: verified, as every byte of it that is read afterwards.

        Raises as ``Realiser.realise``.
        """
        chunked = await self._by_chunk(path)
        if chunked is None:
            return await self._realiser.realise(path, pid, watch, priority)
        self._realiser.know_tree(chunked.pin.ordinal, chunked.tree)
        return chunked.tree

    def at_hand(self, ordinal: int, path: StorePath, offset: int, size: int) -> bytes | None:
        """What :meth:`read` would give of the pin with this ordinal, if that needs no waiting."""
        chunked = self._chunked.opened(path)
        if chunked is None or chunked.pin.ordinal != ordinal:
            return None
        return chunked.at_hand(offset, size)

    async def read(
        self,
        path: StorePath,
        offset: int,
        size: int,
        pid: int | None = None,
        watch: Callable[[Flight], None] = _nobody,
        priority: Priority = Priority.READER,
    ) -> bytes | None:
        """``size`` bytes of the NAR of ``path`` from ``offset``; None once it is committed, and to be read there.

        Raises as ``Realiser.realise``.
        """
        chunked = await self._by_chunk(path)
        if chunked is not None:
            try:
                data = await chunked.read(offset, size, watch, priority)
            except DeadlineExceeded:
                raise  # the reader has waited long enough
            except (Unavailable, PathNotFound, InvalidData, UntrustedPath, StorageFailure) as error:
                await self._chunked.give_up(chunked, error)
            else:
                return data
        await self._realiser.realise(path, pid, watch, priority)
        return None

    def close_unused(self) -> None:
        """Let go of files that nobody has read for a while; they are opened again at the next read."""
        self._chunked.close_unused(UNUSED)

    def request(self, paths: Sequence[StorePath], priority: Priority) -> None:
        """Have ``paths`` fetched ahead.

        For readers to come, of a path that can be had by the chunk the index is enough; where nobody may ever read it,
        all of it is wanted.
        """
        if priority >= Priority.COMPLETION:
            self._realiser.request(paths, priority)
        else:
            self._nursery.start_soon(self._request, tuple(paths), priority)

    async def _request(self, paths: Sequence[StorePath], priority: Priority) -> None:
        whole: set[StorePath] = set()

        async def prepare(path: StorePath) -> None:
            async with self._ahead:
                try:
                    if await self._by_chunk(path) is None:
                        whole.add(path)
                except FusesnapError as error:
                    log.debug("%s: not fetched ahead: %s", path, error)

        async with trio.open_nursery() as nursery:
            for path in paths:
                nursery.start_soon(prepare, path)
        if whole:
            self._realiser.request([path for path in paths if path in whole], priority)

    async def _by_chunk(self, path: StorePath) -> ChunkedPath | None:
        if self._store.is_committed(path):
            return None
        return await self._chunked.find(path)
