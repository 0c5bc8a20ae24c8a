"""Where a cache is written to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import trio

from fusesnap.errors import InvalidData, PathNotFound
from fusesnap.store.durability import flush_directory, flush_trees
from fusesnap.store.locks import try_flock
from fusesnap.store.storage_errors import storage

PIECE: Final = 1024 * 1024
# Of files that have no name in the cache yet. Web servers do not list them.
SPOOL_PREFIX: Final = ".fusesnap-publish-"


@dataclass(frozen=True, slots=True)
class Kind:
    """What sort of file one is to a web server: its media type, and whether it ever changes under its name."""

    media_type: str
    immutable: bool

    @property
    def cache_control(self) -> str:
        """For how long others may keep it."""
        return "public, max-age=31536000, immutable" if self.immutable else "public, max-age=300"


# The media types are those of Nix (``src/libstore/binary-cache-store.cc``).
NAR: Final = Kind("application/x-nix-nar", immutable=True)
INDEX: Final = Kind("application/x-nix-nar-index", immutable=True)
LISTING: Final = Kind("application/json", immutable=False)
NARINFO: Final = Kind("text/x-nix-narinfo", immutable=False)
BUNDLE: Final = Kind("application/x-nix-startup-bundle", immutable=False)
CACHE_INFO: Final = Kind("text/x-nix-cache-info", immutable=False)


class Destination(Protocol):
    """A tree of files that others read. Any number of tasks may use it at once.

    A file appears under its name whole or not at all, and replaces another of that name. Errors are StorageFailure,
    Unavailable, and PathNotFound for what is not there; their messages name the file.
    """

    @property
    def url(self) -> str:
        """Its name in messages."""

    @property
    def spool(self) -> Path:
        """A local directory to write a file to before it is put."""

    async def size(self, name: str) -> int | None:
        """The bytes of a file, None where there is none."""

    def read(self, name: str) -> AsyncGenerator[bytes]:
        """A file's bytes, in pieces. Close it if it is not read to its end."""

    async def put(self, name: str, file: Path, kind: Kind) -> None:
        """Put a local file, which may be moved away by it."""

    async def put_bytes(self, name: str, data: bytes, kind: Kind) -> None:
        """Put a small file."""

    async def names(self, directory: str = "") -> Iterable[str] | None:
        """The names of all files in a directory; None where that cannot be asked."""


async def read_whole(destination: Destination, name: str, limit: int) -> bytes | None:
    """A small file, None where there is none. Raises InvalidData where it has more than ``limit`` bytes."""
    data = b""
    try:
        async with aclosing(destination.read(name)) as pieces:
            async for piece in pieces:
                data += piece
                if len(data) > limit:
                    raise InvalidData(
                        f"{destination.url}: {name}: more than {limit} bytes, expected at most that"
                    )
    except PathNotFound:
        return None
    return data


@contextmanager
def spooled(directory: Path) -> Iterator[Path]:
    """A new file for what is being made, to be moved away; otherwise it is removed.

    It is locked meanwhile, so that another run does not take it for what a dead one left. Raises StorageFailure.
    """
    with storage("write to", directory):
        descriptor, path = _locked_file(directory)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked_file(directory: Path) -> tuple[int, Path]:
    while True:
        descriptor, name = tempfile.mkstemp(dir=directory, prefix=SPOOL_PREFIX)
        # Between the two another run may have removed it.
        if try_flock(descriptor) and os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)


def _remove_if_unlocked(path: Path) -> None:
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if try_flock(descriptor):
                path.unlink()
        finally:
            os.close(descriptor)


class DirectoryDestination:
    """A directory on this machine, served by whatever serves files."""

    def __init__(self, directory: Path) -> None:
        """Make the directory where it is missing, and remove what a run that was killed left. Raises StorageFailure."""
        with storage("create", directory):
            directory.mkdir(parents=True, exist_ok=True)
            for left in directory.glob(f"{SPOOL_PREFIX}*"):
                _remove_if_unlocked(left)
        self._directory = directory

    @property
    def url(self) -> str:
        return str(self._directory)

    @property
    def spool(self) -> Path:
        """The directory itself: from there a rename is enough."""
        return self._directory

    async def size(self, name: str) -> int | None:
        return await trio.to_thread.run_sync(self._size, name)

    def _size(self, name: str) -> int | None:
        with storage("look for", self._directory / name), suppress(FileNotFoundError):
            return (self._directory / name).stat().st_size
        return None

    async def read(self, name: str) -> AsyncGenerator[bytes]:
        path = self._directory / name
        with storage("read", path):
            try:
                file = await trio.open_file(path, "rb")
            except FileNotFoundError:
                raise PathNotFound(f"{path}: not found") from None
            async with file:
                while piece := await file.read(PIECE):
                    yield piece

    async def put(self, name: str, file: Path, kind: Kind) -> None:
        await trio.to_thread.run_sync(self._put, name, file)

    def _put(self, name: str, file: Path) -> None:
        """What a narinfo names must be there before it, after a loss of power too: so each is synced in its turn."""
        path = self._directory / name
        with storage("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file.chmod(0o644)
            flush_trees([(file, 1)])
            file.rename(path)
            flush_directory(path.parent)

    async def put_bytes(self, name: str, data: bytes, kind: Kind) -> None:
        await trio.to_thread.run_sync(self._put_bytes, name, data)

    def _put_bytes(self, name: str, data: bytes) -> None:
        with storage("write", self._directory / name), spooled(self._directory) as temporary:
            temporary.write_bytes(data)
            self._put(name, temporary)

    async def names(self, directory: str = "") -> Iterable[str] | None:
        return await trio.to_thread.run_sync(self._names, directory)

    def _names(self, directory: str) -> list[str]:
        where = self._directory / directory
        with storage("list", where), suppress(FileNotFoundError):
            found = [path for path in where.iterdir() if not path.name.startswith(SPOOL_PREFIX)]
            return sorted(
                str(path.relative_to(self._directory)) for path in found if path.is_file()
            )
        return []
