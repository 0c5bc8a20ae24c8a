"""The inside of store paths that are not committed yet, however it can be had.

By the chunk where a trusted index says how, else whole. What goes wrong with chunks ends in the whole NAR, from
whatever cache has it; a reader sees nothing of that but the time that it takes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
from fusesnap.nix.startup_trace import StartupTrace
from fusesnap.nix.store_path import StorePath
from fusesnap.nix.tree import Entry, EntryKind, Tree
from fusesnap.store.local_store import LocalStore

log = logging.getLogger(__name__)

# Indexes that are asked for ahead at a time. They are small, and what they cost is round trips.
_AHEAD: Final = 16
# Paths of a closure whose indexes are asked for before anybody looks into them: a request each.
LEARNT_AT_MOST: Final = 250
# Bytes of the compressed file up to which a path is small.
SMALL_PATH: Final = 200 * 1024
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

    def learn(self, paths: Collection[StorePath]) -> None:
        """Have the indexes of ``paths`` here before somebody looks into them, where there are any and not too many."""
        if len(paths) <= LEARNT_AT_MOST:
            self._nursery.start_soon(self._each_by_chunk, tuple(sorted(paths)), lambda _: None)

    async def guess_small(self, paths: Collection[StorePath]) -> None:
        """Have those of a closure fetched whole that are small, behind everybody who waits for something.

        Not those with programs or libraries, of which those tell that need them, and of which less is read.
        """

        def guess(chunked: ChunkedPath) -> None:
            if _is_small(chunked) and not chunked.is_foreseen:
                chunked.want([(0, chunked.pin.info.nar_size)], Priority.REST)

        if len(paths) <= LEARNT_AT_MOST:
            await self._each_by_chunk(sorted(paths), guess)

    async def _each_by_chunk(
        self, paths: Iterable[StorePath], do: Callable[[ChunkedPath], object]
    ) -> None:
        """Find out which of ``paths`` can be fetched by the chunk, and ``do`` something with each of these."""

        async def look(path: StorePath) -> None:
            async with self._ahead:
                with suppress(FusesnapError):  # whoever looks into it will be told
                    chunked = await self._by_chunk(path)
                    if chunked is not None:
                        do(chunked)

        async with trio.open_nursery() as nursery:
            for path in paths:
                nursery.start_soon(look, path)

    def foresee(self, trace: StartupTrace) -> None:
        """Have fetched what a start is about to read: chunks where that can be, else whole paths, in its order."""
        self._nursery.start_soon(self._foresee, trace, name="fetch by a startup trace")

    async def _foresee(self, trace: StartupTrace) -> None:
        parts = parts_by_path(trace)
        found: dict[StorePath, ChunkedPath | None] = {}
        known = {traced.path: trio.Event() for traced in trace.paths}

        async def find(path: StorePath) -> None:
            async with self._ahead:
                try:
                    found[path] = await self._by_chunk(path)
                except FusesnapError as error:  # whoever reads it will be told
                    log.debug("%s: not fetched ahead: %s", path, error)
            known[path].set()

        async with trio.open_nursery() as nursery:
            for path in known:
                nursery.start_soon(find, path)
            for traced in trace.paths:  # in its order, as soon as that is known
                await known[traced.path].wait()
                chunked = found.get(traced.path)
                if chunked is not None and chunked.pin.info.nar_hash == traced.nar_hash:
                    chunked.foresee()
                    chunked.want(ranges_of(chunked.tree, parts[traced.path]), Priority.TRACE)
        whole = [path for path in known if path in found and found[path] is None]
        if whole:
            self._realiser.request(whole, Priority.TRACE)

    async def want_file(self, path: StorePath, entry: Entry) -> None:
        """Have all of a file fetched that will be read here and there, behind everybody who waits for something.

        Not where a trace says what of it will be.
        """
        await self.want_parts(path, entry, [(0, entry.size)], Priority.REST)

    async def want_parts(
        self, path: StorePath, entry: Entry, parts: Iterable[tuple[int, int]], priority: Priority
    ) -> None:
        """The same for parts of a file, each from its offset up to its end, as urgent as this."""
        chunked = await self._by_chunk(path)
        if chunked is not None and not chunked.is_foreseen:
            ranges = [
                (entry.offset + start, entry.offset + min(end, entry.size)) for start, end in parts
            ]
            chunked.want([(start, end) for start, end in ranges if start < end], priority)

    def is_streamed(self, path: StorePath) -> bool:
        """Whether a stream is bringing what a start reads of ``path``: then there is nothing to guess at."""
        chunked = self._chunked.opened(path)
        return chunked is not None and chunked.is_streamed

    async def _by_chunk(self, path: StorePath) -> ChunkedPath | None:
        if self._store.is_committed(path):
            return None
        return await self._chunked.find(path)


def _is_small(chunked: ChunkedPath) -> bool:
    return chunked.file_size <= SMALL_PATH and not chunked.tree.may_have_programs


@dataclass(frozen=True, slots=True)
class Part:
    """``length`` bytes from ``offset`` of a file of ``size`` bytes, the ``entry``-th of its path in NAR order."""

    entry: int
    size: int
    offset: int
    length: int


def parts_by_path(trace: StartupTrace) -> dict[StorePath, list[Part]]:
    """What a trace says was read of each of its paths."""
    parts: dict[StorePath, list[Part]] = {traced.path: [] for traced in trace.paths}
    for extent in trace.extents:
        file = trace.files[extent.file]
        path = trace.paths[file.path].path
        parts[path].append(Part(file.entry, file.size, extent.offset, extent.length))
    return parts


def ranges_of(tree: Tree, parts: Iterable[Part]) -> Iterator[tuple[int, int]]:
    """Where ``parts`` are in the NAR of ``tree``. Those that the tree does not have are left out."""
    for part in parts:
        if part.entry < len(tree.entries):
            entry = tree.entries[part.entry]
            if entry.kind is EntryKind.REGULAR and entry.size == part.size:
                start = entry.offset + part.offset
                yield start, min(start + part.length, entry.offset + entry.size)
