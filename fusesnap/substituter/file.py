"""A binary cache in a directory, as ``nix copy --to file:///directory`` writes it."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import BinaryIO, Final

import trio

from fusesnap.errors import FusesnapError, InvalidData, PathNotFound, Unavailable
from fusesnap.nix.cache_info import MAX_CACHE_INFO_SIZE, CacheInfo
from fusesnap.nix.narinfo import MAX_NARINFO_SIZE, NarInfo
from fusesnap.nix.store_path import HashPart, StoreDir, StorePath
from fusesnap.substituter.addresses import parse_file_url
from fusesnap.substituter.answers import (
    MISSING_CACHE_INFO,
    FileLength,
    narinfo_name,
    read_cache_info,
    read_narinfo,
)
from fusesnap.substituter.base import (
    CACHE_INFO_NAME,
    DEFAULT_STORE_DIR,
    Bookmark,
    Meter,
    StoredFile,
    unmetered,
)
from fusesnap.substituter.retry import Refusal, Retries

_PIECE: Final = 256 * 1024


class FileSubstituter:
    """A binary cache at a ``file`` URL.

    Names of files are taken as they are in narinfos, without decoding, and must stay in the
    directory. A file system that does not answer holds a thread until it does. ``meter`` is told of
    what is read whole, as by :class:`~.http.HttpSubstituter`.
    """

    def __init__(
        self,
        url: str,
        *,
        store_dir: StoreDir = DEFAULT_STORE_DIR,
        meter: Meter = unmetered,
    ) -> None:
        self._address = parse_file_url(url)
        self._directory = Path(self._address.path)
        self._store_dir = store_dir
        self._meter = meter

    @property
    def url(self) -> str:
        return self._address.url

    @property
    def priority(self) -> int | None:
        return self._address.priority

    async def cache_info(self) -> CacheInfo:
        try:
            data = await self._small_file(CACHE_INFO_NAME, MAX_CACHE_INFO_SIZE)
        except PathNotFound:
            await trio.to_thread.run_sync(self._check_directory)
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
        where = f"{self.url}: {name}"
        try:
            with await self._open_nar(name) as file:
                while start < end:
                    piece = await trio.to_thread.run_sync(
                        os.pread, file.fileno(), min(end - start, _PIECE), start
                    )
                    if not piece:
                        raise Refusal(f"{where}: ends at byte {start}, expected {end}")
                    start += len(piece)
                    yield piece
        except OSError as error:
            raise self._translate(where, error) from error

    async def _small_file(self, name: str, limit: int) -> bytes:
        data = await trio.to_thread.run_sync(self._read_small, name, limit)
        self._meter(len(data))
        return data

    def _read_small(self, name: str, limit: int) -> bytes:
        try:
            with self._open(name) as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise self._translate(self.url, error) from error
        if len(data) > limit:
            raise InvalidData(f"{self.url}: {name}: expected at most {limit} bytes, got more")
        return data

    async def _file(self, info: StoredFile, bookmark: Bookmark) -> AsyncGenerator[bytes]:
        where = f"{self.url}: {info.url}"
        length = FileLength(where, info, bookmark.received)
        bookmark.resumable = True
        try:
            # Closing a file that was read only writes nothing, and so does not block.
            with await self._open_nar(info.url) as file:
                if bookmark.length is not None:
                    length.announced(bookmark.length)
                length.announced(os.fstat(file.fileno()).st_size)
                bookmark.length = length.exact
                file.seek(bookmark.received)
                while True:
                    piece: bytes = await trio.to_thread.run_sync(file.read, _PIECE)
                    if not piece:
                        break
                    length.receive(len(piece))
                    bookmark.received = length.received
                    yield piece
        except OSError as error:
            raise self._translate(where, error) from error
        length.end()

    async def _open_nar(self, name: str) -> BinaryIO:
        if name.startswith(("http://", "https://")):
            raise Refusal(f"{self.url}: {name}: expected a file of this directory")
        return await trio.to_thread.run_sync(self._open, name)

    def _open(self, name: str) -> BinaryIO:
        """Open a regular file; opening a FIFO, for one, would wait for a writer."""
        descriptor = os.open(self._directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise Refusal(f"{self.url}: {name}: not a regular file")
        return os.fdopen(descriptor, "rb", buffering=0)

    def _check_directory(self) -> None:
        """A cache may lack ``nix-cache-info``; a directory that is not there is no cache."""
        try:
            is_directory = stat.S_ISDIR(os.stat(self._directory).st_mode)  # noqa: PTH116
        except OSError as error:
            raise Unavailable(f"{self.url}: {error.strerror}") from error
        if not is_directory:
            raise Refusal(f"{self.url}: not a directory")

    def _translate(self, where: str, error: OSError) -> FusesnapError:
        if isinstance(error, FileNotFoundError):
            return PathNotFound(f"{where}: not found")
        return Unavailable(f"{where}: {error.strerror}")
