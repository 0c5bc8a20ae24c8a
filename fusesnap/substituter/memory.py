"""A binary cache in memory, that can be told to misbehave."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Final

import trio

from fusesnap.errors import FusesnapError, InvalidData, PathNotFound
from fusesnap.nix.cache_info import MAX_CACHE_INFO_SIZE, CacheInfo
from fusesnap.nix.narinfo import MAX_NARINFO_SIZE, NarInfo
from fusesnap.nix.store_path import HashPart, StoreDir, StorePath
from fusesnap.substituter.answers import (
    MISSING_CACHE_INFO,
    FileLength,
    narinfo_name,
    read_cache_info,
    read_narinfo,
)
from fusesnap.substituter.base import CACHE_INFO_NAME, DEFAULT_STORE_DIR, Bookmark, StoredFile
from fusesnap.substituter.retry import PartsUnsupported, Refusal, Retries

_PIECE: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Fault:
    """How one reading of one file goes wrong, ``after`` bytes of it.

    With ``error`` that is raised, without it nothing more comes until the reader gives up.
    """

    error: FusesnapError | None = None
    after: int = 0


class MemorySubstituter:
    """The twin of the real caches: the same answers from a dictionary of files.

    ``files`` maps a name within the cache to its bytes and may be changed at any time. ``requests``
    holds the names that were asked for, in order, ``parts`` those of which a part was asked for, and
    which one; none is given unless it ``sends_parts``. Every answer takes ``delay`` seconds.
    """

    def __init__(
        self,
        url: str = "memory://cache",
        files: Mapping[str, bytes] | None = None,
        *,
        store_dir: StoreDir = DEFAULT_STORE_DIR,
        priority: int | None = None,
        delay: float = 0.0,
    ) -> None:
        self.files: dict[str, bytes] = dict(files or {})
        self.requests: list[str] = []
        self.parts: list[tuple[str, int, int]] = []
        self.sends_parts = True
        self._url = url
        self._store_dir = store_dir
        self._priority = priority
        self._delay = delay
        self._faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self._held: dict[str, trio.Event] = {}

    @property
    def url(self) -> str:
        return self._url

    @property
    def priority(self) -> int | None:
        return self._priority

    def publish(self, info: NarInfo, file: bytes) -> None:
        """Store a narinfo and the file that it names."""
        self.files[narinfo_name(info.store_path)] = info.to_text().encode()
        self.files[info.url] = file

    def script(self, name: str, *faults: Fault) -> None:
        """The next readings of ``name`` go wrong, one a fault; those after them go well."""
        self._faults[name].extend(faults)

    def hold(self, name: str) -> trio.Event:
        """Nothing comes of ``name`` before that is set."""
        return self._held.setdefault(name, trio.Event())

    async def cache_info(self) -> CacheInfo:
        try:
            data = await self._small_file(CACHE_INFO_NAME, MAX_CACHE_INFO_SIZE)
        except PathNotFound:
            return MISSING_CACHE_INFO
        return read_cache_info(self.url, data)

    async def narinfo(self, path: StorePath | HashPart) -> NarInfo:
        data = await self._small_file(narinfo_name(path), MAX_NARINFO_SIZE)
        return read_narinfo(self.url, path, data, self._store_dir)

    @asynccontextmanager
    async def nar(
        self, info: StoredFile, retries: Retries | None = None, bookmark: Bookmark | None = None
    ) -> AsyncGenerator[AsyncIterator[bytes]]:
        async with aclosing(self._file(info, bookmark or Bookmark())) as pieces:
            yield pieces

    @asynccontextmanager
    async def part(
        self, info: NarInfo, start: int, end: int, retries: Retries | None = None
    ) -> AsyncGenerator[AsyncIterator[bytes]]:
        async with aclosing(self._part(info.url, start, end)) as pieces:
            yield pieces

    async def small_file(self, name: str, limit: int) -> bytes:
        return await self._small_file(name, limit)

    async def _part(self, name: str, start: int, end: int) -> AsyncGenerator[bytes]:
        self.parts.append((name, start, end))
        where = f"{self.url}: {name}"
        if not self.sends_parts:
            raise PartsUnsupported(f"{where}: this cache sends files whole")
        position = 0
        async with aclosing(self._read(name, where)) as pieces:
            async for piece in pieces:
                wanted = piece[max(0, start - position) : max(0, end - position)]
                position += len(piece)
                if wanted:
                    yield wanted
        if position < end:
            raise Refusal(f"{where}: ends at byte {position}, expected {end}")

    async def _small_file(self, name: str, limit: int) -> bytes:
        data = b"".join([piece async for piece in self._read(name, self.url)])
        if len(data) > limit:
            raise InvalidData(f"{self.url}: {name}: expected at most {limit} bytes, got more")
        return data

    async def _file(self, info: StoredFile, bookmark: Bookmark) -> AsyncGenerator[bytes]:
        where = f"{self.url}: {info.url}"
        length = FileLength(where, info, bookmark.received)
        bookmark.resumable = True
        data = self.files.get(info.url, b"")
        if bookmark.length is not None:
            length.announced(bookmark.length)
            length.announced(len(data))
        bookmark.length = len(data)
        async with aclosing(self._read(info.url, where, bookmark.received)) as pieces:
            async for piece in pieces:
                length.receive(len(piece))
                bookmark.received = length.received
                yield piece
        length.end()

    async def _read(self, name: str, where: str, begin: int = 0) -> AsyncGenerator[bytes]:
        self.requests.append(name)
        await trio.sleep(self._delay)
        if name in self._held:
            await self._held[name].wait()
        fault = self._faults[name].popleft() if self._faults[name] else None
        data = self.files.get(name)
        if data is None and fault is None:
            raise PathNotFound(f"{where}: not found")
        end = len(data or b"") if fault is None else fault.after
        for start in range(begin, end, _PIECE):
            await trio.lowlevel.checkpoint()
            yield (data or b"")[start : min(start + _PIECE, end)]
        if fault is not None:
            await _go_wrong(fault)


async def _go_wrong(fault: Fault) -> None:
    if fault.error is None:
        await trio.sleep_forever()
    else:
        raise fault.error
