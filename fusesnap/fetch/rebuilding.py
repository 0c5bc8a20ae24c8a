"""Chunks are made of what is here instead of being fetched.

What a tree does not say of a chunk is contents of files. They are read from the files of the same names and sizes in
seeds, paths that are much like this one; the hash parts that the index tells of are put where it says; and what comes
out is the chunk if it hashes to what the index lists, else nothing. So a seed may be anything: gone, damaged, another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import trio

from fusesnap.errors import ContentMismatch, FusesnapError
from fusesnap.fetch.seeds import Seeds
from fusesnap.nix.chunk_table import Chunk
from fusesnap.nix.hash_parts import with_hash_parts
from fusesnap.nix.nar_index import NarIndex
from fusesnap.nix.nar_layout import NarLayout
from fusesnap.nix.store_path import StorePath
from fusesnap.store.partial_nars import PartialNar
from fusesnap.store.seeds import Seed

log = logging.getLogger(__name__)

# Chunks that are tried in one go in a thread: some ten milliseconds, after which who waits for them goes on, and
# another who wants chunks of the path has his turn.
BATCH: Final = 16

Tried = Callable[[Sequence[int], Sequence[Chunk]], None]


class ChunkMaker:
    """Makes chunks of the path of ``index`` from ``seeds``, the most promising first. Blocking."""

    def __init__(self, index: NarIndex, seeds: Sequence[Seed]) -> None:
        self._index = index
        self._layout = NarLayout(index.tree)
        self._seeds = seeds

    def make(self, number: int) -> bytes | None:
        """The contents of chunk ``number``, verified; None where no seed has them."""
        chunk = self._index.chunks[number]
        for seed in self._seeds:
            data = self._filled(chunk, seed)
            if data is not None:
                try:
                    chunk.check(data)
                except ContentMismatch as error:
                    log.debug("%s: cannot be made: %s", self._index.store_path, error)
                else:
                    return data
        return None

    def make_all(self, numbers: Iterable[int], partial: PartialNar) -> list[Chunk]:
        """Make what can be made and write it to ``partial``; return that. Raises :class:`StorageFailure`."""
        made = []
        try:
            for number in numbers:
                data = self.make(number)
                if data is not None:
                    chunk = self._index.chunks[number]
                    partial.write(chunk, data)
                    made.append(chunk)
        finally:
            for seed in self._seeds:
                seed.rest()
        return made

    def _filled(self, chunk: Chunk, seed: Seed) -> bytes | None:
        pieces: list[bytes] = []
        for piece in self._layout.range(chunk.start, chunk.end):
            if isinstance(piece, bytes):
                pieces.append(piece)
                continue
            names = [name for name in self._index.tree.path(piece.entry).split(b"/") if name]
            size = self._index.tree.entries[piece.entry].size
            data = seed.read(names, size, piece.offset, piece.size)
            if data is None:
                return None
            pieces.append(data)
        chunks = self._index.chunks
        found = chunks.occurrences_in(chunk.number)
        return with_hash_parts(b"".join(pieces), chunk.start, found, chunks.hash_parts)


class Rebuilding:
    """The chunks of one path. Each is tried once; ``threads`` is what all paths share."""

    def __init__(self, index: NarIndex, seeds: Seeds, threads: trio.CapacityLimiter) -> None:
        self._index = index
        self._seeds = seeds
        self._threads = threads
        self._turn = trio.Lock()
        self._untried = bytearray(b"\1") * len(index.chunks)
        self._named_like: list[StorePath] = []
        self._maker: ChunkMaker | None = None

    async def look(self) -> None:
        """Look for seeds by their names. Where there are none, nothing will be tried. Raises ``StorageFailure``."""
        self._named_like = await self._seeds.named_like(self._index.store_path)
        if not self._named_like:
            self._give_up()

    def untried(self, numbers: Iterable[int]) -> list[int]:
        """Those of ``numbers`` of which it is not known whether they can be made."""
        return [number for number in numbers if self._untried[number]]

    async def rebuild(self, numbers: Sequence[int], partial: PartialNar, tried: Tried) -> None:
        """Make what can be made of chunks ``numbers`` and write it to ``partial``.

        ``tried`` is told of some of ``numbers`` at a time, in their order, and which of those are here now. What cannot
        be made, or not written, is tried none the less.
        """
        left = list(numbers)
        while left:
            size = BATCH if self.untried(left) else len(left)
            batch, left = left[:size], left[size:]
            # Two at once would read by the same descriptors; and in turn nobody waits for all of another's.
            async with self._turn:
                made = await self._batch(partial.missing(self.untried(batch)), partial)
            for number in batch:
                self._untried[number] = 0
            tried(batch, made)
        if not any(self._untried):
            self._maker = None  # with what it knows of its seeds

    async def _batch(self, batch: Sequence[int], partial: PartialNar) -> list[Chunk]:
        if not batch:
            return []
        try:
            if self._maker is None:
                self._maker = await trio.to_thread.run_sync(
                    self._maker_from_seeds, limiter=self._threads
                )
            if self._maker is not None:
                return await trio.to_thread.run_sync(
                    self._maker.make_all, batch, partial, limiter=self._threads
                )
            self._give_up()
        except (
            FusesnapError
        ) as error:  # it is fetched, and who fetches is told what is wrong with the disk
            log.debug("%s: is not made of what is here: %s", self._index.store_path, error)
        return []

    def _give_up(self) -> None:
        self._untried = bytearray(len(self._untried))

    def _maker_from_seeds(self) -> ChunkMaker | None:
        seeds = self._seeds.open(self._named_like)
        return ChunkMaker(self._index, seeds) if seeds else None
