"""Verifies a published cache end to end: every byte that it offers, and every promise of an index."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Final

import trio

from fusesnap.errors import InvalidData, PathNotFound, UntrustedPath
from fusesnap.nix.chunk_table import Chunk, ChunkTable
from fusesnap.nix.compression import decompressor
from fusesnap.nix.hash import Hash, HashAlgorithm
from fusesnap.nix.index_reference import IndexReference
from fusesnap.nix.nar import FileData, NarParser, NeedData
from fusesnap.nix.nar_index import MAX_INDEX_SIZE, NarIndex, parse_nar_index
from fusesnap.nix.narinfo import MAX_NARINFO_SIZE, NarInfo, parse_narinfo
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.tree import TreeBuilder
from fusesnap.nix.trust import check_trust
from fusesnap.publish.destination import Destination, read_whole
from fusesnap.substituter.answers import narinfo_name

PATHS_AT_ONCE: Final = 4


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found of one narinfo, named by its file.

    ``faults`` is empty where all is well. ``indexed``: it has an index, so a chunk can be had alone. ``missing`` are
    references that this cache lacks: no fault where another cache has them.
    """

    name: str
    store_path: StorePath | None
    nar_size: int
    indexed: bool
    faults: tuple[str, ...]
    missing: tuple[StorePath, ...]


class Checker:
    """Checks paths of one cache against the keys that its readers trust."""

    def __init__(self, cache: Destination, keys: TrustedKeys, store_dir: StoreDir) -> None:
        self._cache = cache
        self._keys = keys
        self._store_dir = store_dir

    async def check(
        self, names: Iterable[str], tell: Callable[[Checked], None] = lambda _: None
    ) -> list[Checked]:
        """Check the narinfos of these names and all that they name; ``tell`` is told of each that is done.

        Raises StorageFailure and Unavailable where the cache does not answer.
        """
        ordered = list(dict.fromkeys(names))
        results: dict[str, Checked] = {}
        turns = trio.CapacityLimiter(PATHS_AT_ONCE)

        async def one(name: str) -> None:
            async with turns:
                results[name] = checked = await self._check(name)
            tell(checked)

        async with trio.open_nursery() as nursery:
            for name in ordered:
                nursery.start_soon(one, name)
        return [results[name] for name in ordered]

    async def _check(self, name: str) -> Checked:
        try:
            info = await self._narinfo(name)
        except (InvalidData, PathNotFound) as error:
            return Checked(name, None, 0, False, (str(error),), ())
        faults = _Faults()
        index: NarIndex | None = None
        with faults.noting():
            check_trust(info, self._keys)
        with faults.noting():
            index = await self._index(info)
        with faults.noting():
            await self._nar(info, index)
        missing = [each for each in info.references if not await self._has(each)]
        return Checked(
            name,
            info.store_path,
            info.nar_size,
            index is not None,
            tuple(faults.found),
            tuple(missing),
        )

    async def _has(self, path: StorePath) -> bool:
        return await self._cache.size(narinfo_name(path)) is not None

    async def _narinfo(self, name: str) -> NarInfo:
        data = await self._whole(name, MAX_NARINFO_SIZE)
        info = parse_narinfo(data, self._store_dir)
        if narinfo_name(info.store_path) != name:
            raise InvalidData(f"it is the narinfo of {info.store_path}")
        return info

    async def _index(self, info: NarInfo) -> NarIndex | None:
        reference = IndexReference.of(info)
        if reference is None:
            return None
        data = await self._whole(reference.url, MAX_INDEX_SIZE)
        if len(data) != reference.size:
            raise InvalidData(f"index has {len(data)} bytes, its narinfo says {reference.size}")
        index = await trio.to_thread.run_sync(parse_nar_index, data, self._keys, self._store_dir)
        index.check_matches(info)
        return index

    async def _whole(self, name: str, limit: int) -> bytes:
        data = await read_whole(self._cache, name, limit)
        if data is None:
            raise PathNotFound(f"{name} is not there")
        return data

    async def _nar(self, info: NarInfo, index: NarIndex | None) -> None:
        reading = _Reading(info, index)
        async with aclosing(self._cache.read(info.url)) as pieces:
            async for piece in pieces:
                await trio.to_thread.run_sync(reading.feed, piece)
        await trio.to_thread.run_sync(reading.finish)


class _Faults:
    """What is wrong with a path, one error a thing that was looked at."""

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def noting(self) -> Iterator[None]:
        try:
            yield
        except (InvalidData, PathNotFound, UntrustedPath) as error:
            self.found.append(str(error))


class _Reading:
    """A compressed NAR on its way past everything that was said of it."""

    def __init__(self, info: NarInfo, index: NarIndex | None) -> None:
        self._info = info
        self._index = index
        self._unpacking = decompressor(info.compression)
        self._parser = NarParser()
        self._builder = TreeBuilder()
        self._chunks = _ChunkReading(index.chunks) if index is not None else None
        self._file_hash = hashlib.sha256()
        self._nar_hash = hashlib.sha256()
        self._file_size = 0
        self._nar_size = 0

    def feed(self, piece: bytes) -> None:
        """Take the next bytes of the file; raises InvalidData."""
        self._file_hash.update(piece)
        self._file_size += len(piece)
        if self._chunks is not None:
            self._chunks.feed(piece)
        for data in self._unpacking.decompress(piece):
            self._nar_hash.update(data)
            self._nar_size += len(data)
            if self._nar_size > self._info.nar_size:
                raise InvalidData(f"NAR has more than {self._info.nar_size} bytes")
            self._parse(data)

    def finish(self) -> None:
        """The file has ended; raises InvalidData unless it is all that was said."""
        self._unpacking.finish()
        self._parser.close()
        info = self._info
        for what, found, expected in (
            ("file hash", _hash(self._file_hash), info.file_hash),
            ("file size", self._file_size, info.file_size),
            ("NAR hash", _hash(self._nar_hash), info.nar_hash),
            ("NAR size", self._nar_size, info.nar_size),
        ):
            if expected is not None and found != expected:
                raise InvalidData(f"{info.url}: its {what} is {found}, expected {expected}")
        if self._index is not None and self._chunks is not None:
            self._chunks.finish()
            if list(self._index.tree.entries) != list(self._builder.tree().entries):
                raise InvalidData("index: its tree is not that of the NAR")

    def _parse(self, data: bytes) -> None:
        self._parser.receive_data(data)
        while not isinstance(event := self._parser.next_event(), NeedData):
            if not isinstance(event, FileData):
                self._builder.receive(event)


class _ChunkReading:
    """The frames of a file, each unpacked alone and held against the index."""

    def __init__(self, chunks: ChunkTable) -> None:
        self._table = chunks
        self._left = iter(chunks)
        self._chunk: Chunk | None = next(self._left, None)
        self._held = bytearray()

    def feed(self, piece: bytes) -> None:
        """Take the next bytes of the file; raises InvalidData."""
        self._held += piece
        while self._chunk is not None and len(self._held) >= self._chunk.file_size:
            frame = bytes(self._held[: self._chunk.file_size])
            del self._held[: self._chunk.file_size]
            self._check(self._chunk, frame)
            self._chunk = next(self._left, None)

    def finish(self) -> None:
        """The file has ended; raises InvalidData where chunks are missing."""
        if self._chunk is not None:
            raise InvalidData(f"file ends before chunk {self._chunk.number}")

    def _check(self, chunk: Chunk, frame: bytes) -> None:
        data = chunk.unpack(frame)
        blank = hashlib.sha256(self._table.blank(chunk.number, data)).digest()
        if blank != self._table.blanked_digest(chunk.number):
            raise InvalidData(f"chunk {chunk.number}: its hash parts are not where the index says")


def _hash(digest: hashlib._Hash) -> Hash:
    return Hash(HashAlgorithm.SHA256, digest.digest())
