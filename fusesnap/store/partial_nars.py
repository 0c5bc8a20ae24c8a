"""NARs of which only parts are here: sparse files, and what of each is there.

Beside each other in the directory ``partial`` of the state directory, for a store path P:

``P.nar``
    a sparse file of the NAR's size; every byte of it that the map says is there is the NAR's, verified.
``P.narindex``
    the NAR index that its chunks were verified by, as it came, signed. As long as it is there, something of that NAR
    may have been shown.
``P.map``
    what is there, docs/formats.md. Its owner holds a lock on it.

A chunk is written before the map says so. So after ``kill -9`` the map is right, because what was written stays in the
page cache. After a loss of power it may say more than is on the disk; the map remembers the boot that it was written
in, and in another one every chunk is read and hashed before it counts.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Self
from uuid import UUID

from fusesnap.errors import InvalidData, StorageFailure
from fusesnap.nix.chunk_table import Chunk, ChunkTable
from fusesnap.nix.store_path import StorePath
from fusesnap.store.layout import StateLayout
from fusesnap.store.locks import try_flock
from fusesnap.store.state_database import Pin
from fusesnap.store.storage_errors import storage

logger = logging.getLogger(__name__)

_MAGIC: Final = b"PARTIAL\1"
_HEADER: Final = struct.Struct(
    "<8s32s32s16sQ"
)  # magic, NAR hash, SHA-256 of the index, boot, chunks
_MISSING, _THERE = 0, 1
_MODE: Final = 0o600


class PartialNar:
    """One NAR. Everything but :meth:`write` is for one thread; that one may be called from others."""

    def __init__(self, path: StorePath, chunks: ChunkTable, nar: int, map_: int) -> None:
        """Made by :meth:`PartialNars.open`."""
        self.path = path
        self._chunks = chunks
        self._nar = nar
        self._map = map_
        self._there = bytearray(len(chunks))
        self._count = 0

    def has(self, number: int) -> bool:
        """Whether chunk ``number`` is here."""
        return self._there[number] == _THERE

    @property
    def is_empty(self) -> bool:
        """Whether no chunk is here."""
        return not self._count

    @property
    def is_complete(self) -> bool:
        """Whether all chunks are here."""
        return self._count == len(self._there)

    @property
    def size(self) -> int:
        """Bytes of the NAR that are here."""
        return sum(self._chunks[n].size for n, state in enumerate(self._there) if state == _THERE)

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """Those of ``numbers`` that are not here."""
        return [number for number in numbers if self._there[number] != _THERE]

    def write(self, chunk: Chunk, data: bytes) -> None:
        """Put the contents of a chunk, which are verified, and say that they are here. Raises StorageFailure."""
        with storage("write", f"part of the NAR of {self.path}"):
            _write_all(self._nar, data, chunk.start)
            os.pwrite(self._map, bytes((_THERE,)), _HEADER.size + chunk.number)

    def note(self, number: int) -> None:
        """Chunk ``number`` was written."""
        self._count += self._there[number] != _THERE
        self._there[number] = _THERE

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the NAR from ``offset``; the chunks that hold them are here. Raises OSError."""
        return os.pread(self._nar, size, offset)

    def close(self) -> None:
        """Let go of the files. Nothing may be under way."""
        os.close(self._nar)
        os.close(self._map)

    def restore(self, states: bytes, *, trusted: bool) -> None:
        """Take over what the map says, where not ``trusted`` only after reading and hashing it."""
        for number, state in enumerate(states):
            if state != _THERE:
                continue
            if trusted or self._is_right(self._chunks[number]):
                self.note(number)
            else:
                os.pwrite(self._map, bytes((_MISSING,)), _HEADER.size + number)

    def _is_right(self, chunk: Chunk) -> bool:
        data = os.pread(self._nar, chunk.size, chunk.start)
        return hashlib.sha256(data).digest() == chunk.digest


class PartialNars:
    """All of a state directory. Methods block, and raise :class:`StorageFailure`."""

    def __init__(self, directory: Path, boot: UUID) -> None:
        """``boot`` is this boot's, as ``/proc/sys/kernel/random/boot_id`` has it."""
        self._directory = directory
        self._boot = boot.bytes
        with storage("create", directory):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def index(self, path: StorePath) -> bytes | None:
        """The NAR index that something of ``path`` was perhaps shown by; None where there is none."""
        file = self._file(path, ".narindex")
        with storage("read", file), suppress(FileNotFoundError):
            return file.read_bytes()
        return None

    def is_begun(self, path: StorePath) -> bool:
        """Whether something of ``path`` was perhaps shown by an index."""
        file = self._file(path, ".narindex")
        with storage("look for", file):
            return file.exists()

    def open(self, pin: Pin, index: bytes, chunks: ChunkTable) -> PartialNar:
        """Open what is here of the NAR of ``pin``, of which ``index`` is the NAR index and ``chunks`` its table.

        What is here of another NAR of the path, or by another index, goes. Where another process has it, the errno is
        EBUSY.
        """
        path = pin.info.store_path
        map_file = self._file(path, ".map")
        with storage("open", map_file):
            map_ = os.open(map_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
        try:
            _lock(map_, map_file)
            with storage("open", map_file):
                return self._open(path, index, chunks, map_, pin.info.nar_hash.digest)
        except BaseException:
            os.close(map_)
            raise

    def _open(
        self, path: StorePath, index: bytes, chunks: ChunkTable, map_: int, nar_hash: bytes
    ) -> PartialNar:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        nar = os.open(self._file(path, ".nar"), flags, _MODE)
        try:
            digest = hashlib.sha256(index).digest()
            header = _HEADER.pack(_MAGIC, nar_hash, digest, self._boot, len(chunks))
            found = _read_map(map_, header)
            if found is None or os.fstat(nar).st_size != chunks.nar_size:
                self._begin(path, index, chunks, map_, nar, header)
                return PartialNar(path, chunks, nar, map_)
            boot, states = found
            partial = PartialNar(path, chunks, nar, map_)
            partial.restore(states, trusted=boot == self._boot)
            os.pwrite(map_, header, 0)
        except BaseException:
            os.close(nar)
            raise
        return partial

    def _begin(
        self, path: StorePath, index: bytes, chunks: ChunkTable, map_: int, nar: int, header: bytes
    ) -> None:
        """Begin with nothing. Killed anywhere in here, the map says nothing, and this is done again."""
        os.ftruncate(map_, 0)
        os.ftruncate(nar, 0)
        os.ftruncate(nar, chunks.nar_size)
        aside = self._file(path, ".new")
        aside.write_bytes(index)
        aside.rename(self._file(path, ".narindex"))
        _write_all(map_, header + bytes(len(chunks)), 0)

    def remove(self, path: StorePath) -> None:
        """Remove what is here of ``path``."""
        _remove(self._directory, path)

    def paths(self) -> set[StorePath]:
        """The paths of which there is anything."""
        return _paths_in(self._directory)

    def _file(self, path: StorePath, suffix: str) -> Path:
        return self._directory / f"{path.base_name}{suffix}"

    @classmethod
    def in_state(cls, state: Path, boot: UUID) -> Self:
        """Those of a state directory."""
        return cls(StateLayout(state).partial, boot)


def remove_unwanted(directory: Path, is_wanted: Callable[[StorePath], bool]) -> list[StorePath]:
    """Remove the parts of paths that are not wanted and that nobody has open; return which.

    Raises :class:`StorageFailure`.
    """
    removed = []
    for path in sorted(_paths_in(directory)):
        if not is_wanted(path) and _is_free(directory / f"{path.base_name}.map"):
            _remove(directory, path)
            removed.append(path)
    return removed


def _paths_in(directory: Path) -> set[StorePath]:
    found = set()
    with storage("list", directory), suppress(FileNotFoundError):
        for name in os.listdir(directory):
            with suppress(InvalidData):
                found.add(StorePath.parse_base_name(name.rpartition(".")[0]))
    return found


def _is_free(map_file: Path) -> bool:
    with storage("look at", map_file):
        try:
            descriptor = os.open(map_file, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            return try_flock(descriptor)
        finally:
            os.close(descriptor)


def _remove(directory: Path, path: StorePath) -> None:
    """Remove the files of a path; the index last, because it says that something may have been shown."""
    with storage("remove what is here of", path.base_name):
        for suffix in (".nar", ".map", ".new", ".narindex"):
            (directory / f"{path.base_name}{suffix}").unlink(missing_ok=True)


def _lock(map_: int, file: Path) -> None:
    if not try_flock(map_) or os.fstat(map_).st_nlink == 0:
        raise StorageFailure(f"{file}: in use by another process", errno.EBUSY)


def _read_map(map_: int, expected: bytes) -> tuple[bytes, bytes] | None:
    """The boot that a map was written in, and the states of its chunks; None unless it is of the NAR expected."""
    data = os.pread(map_, _HEADER.size, 0)
    if len(data) != _HEADER.size:
        return None
    magic, nar_hash, index, boot, count = _HEADER.unpack(data)
    wanted = _HEADER.unpack(expected)
    states = os.pread(map_, count + 1, _HEADER.size) if count == wanted[4] else b""
    if (magic, nar_hash, index, count) != (*wanted[:3], wanted[4]) or len(states) != count:
        return None
    return boot, states


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
