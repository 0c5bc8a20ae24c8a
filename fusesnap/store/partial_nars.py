"""NARs of which only parts are here: sparse files, and what of each is there.

Beside each other in the directory ``partial`` of the state directory, for a store path P:

``P.nar``
    a sparse file of the NAR's size; every byte of it that the map says is there is the NAR's, verified.
``P.narindex``
    the NAR index that its chunks were verified by, as it came, signed. As long as it is there, something of that NAR
    may have been shown.
``P.map``
    what is there, docs/formats.md. Its owner holds a lock on it.

There are whole chunks and *extents*: any bytes, verified by a SHA-256 of their own, which a startup bundle brings.

What comes is written before the map says so. So after ``kill -9`` the map is right, because what was written stays in
the page cache. After a loss of power it may say more than is on the disk; the map remembers the boot that it was
written in, and in another one every chunk and every extent is read and hashed before it counts.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final, Self
from uuid import UUID

from fusesnap.errors import InvalidData, StorageFailure
from fusesnap.nix.chunk_table import Chunk, ChunkTable
from fusesnap.nix.store_path import StorePath
from fusesnap.store.byte_ranges import ByteRanges
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
_EXTENT: Final = struct.Struct("<QI32sB")  # offset in the NAR, size, SHA-256, and that it is whole
_WHOLE: Final = 1
_MODE: Final = 0o600
_CLOSED: Final = -1


@dataclass(frozen=True, slots=True)
class Extent:
    """``size`` bytes of the NAR from ``start``, which hash to ``digest`` (SHA-256)."""

    start: int
    size: int
    digest: bytes

    @property
    def end(self) -> int:
        """Where it ends in the NAR."""
        return self.start + self.size


@dataclass(frozen=True, slots=True)
class NarGlance:
    """What was here of a NAR at one moment: ``nar`` is its sparse file."""

    nar: Path
    here: ByteRanges


class PartialNar:
    """One NAR. Everything is for one thread but what writes and :meth:`adopt`: they may be called from others."""

    def __init__(self, path: StorePath, chunks: ChunkTable, nar: int, map_: int) -> None:
        """Made by :meth:`PartialNars.open`."""
        self.path = path
        self._chunks = chunks
        self._nar = nar
        self._map = map_
        self._there = bytearray(len(chunks))
        self._count = 0
        self._extents = ByteRanges()
        self._next_extent = count()

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

    def gaps(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of bytes ``start`` up to ``end`` of the NAR that are in no chunk and in no extent that is here."""
        found: list[tuple[int, int]] = []
        for number in self.missing(self._chunks.covering(start, end)):
            chunk = self._chunks[number]
            found += self._extents.gaps(max(start, chunk.start), min(end, chunk.end))
        return found

    def write(self, chunk: Chunk, data: bytes) -> None:
        """Put the contents of a chunk, which are verified, and say that they are here. Raises StorageFailure."""
        with storage("write", f"part of the NAR of {self.path}"):
            _write_all(self._nar, data, chunk.start)
            self._mark(chunk.number, _THERE)

    def note(self, number: int) -> None:
        """Chunk ``number`` was written."""
        self._count += self._there[number] != _THERE
        self._there[number] = _THERE

    def write_extent(self, extent: Extent, data: bytes) -> None:
        """Put the contents of an extent, which are verified, and say that they are here. Raises StorageFailure."""
        with storage("write", f"part of the NAR of {self.path}"):
            _write_all(self._nar, data, extent.start)
            self._log(extent)

    def note_extent(self, extent: Extent) -> None:
        """An extent was written."""
        self._extents.add(extent.start, extent.end)

    def made_of_extents(self) -> list[Chunk]:
        """The chunks that are missing although every byte of them is here."""
        found = []
        for start, end in self._extents:
            for number in self.missing(self._chunks.covering(start, end)):
                chunk = self._chunks[number]
                if start <= chunk.start and chunk.end <= end:
                    found.append(chunk)
        return found

    def adopt(self, chunk: Chunk) -> bool:
        """Say that a chunk is here whose bytes are, if they are what they must be; :meth:`note` is still owed.

        Raises StorageFailure.
        """
        with storage("read", f"part of the NAR of {self.path}"):
            is_right = self._is_right(chunk)
            if is_right:
                self._mark(chunk.number, _THERE)
            return is_right

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the NAR from ``offset``, all of which are here. Raises OSError."""
        return os.pread(self._nar, size, offset)

    def close(self) -> None:
        """Let go of the files, if that was not done. Nothing may be under way."""
        nar, self._nar = self._nar, _CLOSED
        map_, self._map = self._map, _CLOSED
        for descriptor in {nar, map_} - {_CLOSED}:
            os.close(descriptor)

    def restore(self, states: bytes, extents: Sequence[Extent], *, trusted: bool) -> None:
        """Take over what the map says, where not ``trusted`` only after reading and hashing it."""
        for number, state in enumerate(states):
            if state != _THERE:
                continue
            if trusted or self._is_right(self._chunks[number]):
                self.note(number)
            else:
                self._mark(number, _MISSING)
        right = [each for each in extents if trusted or self._is_right(each)]
        if len(right) < len(extents):
            self._forget_extents()
            for extent in right:
                self._log(extent)
        for extent in right:
            self.note_extent(extent)

    def go_on_after(self, extents: int) -> None:
        """There is room for so many in the map that must not be written over."""
        self._next_extent = count(extents)

    def _mark(self, number: int, state: int) -> None:
        os.pwrite(self._map, bytes((state,)), _HEADER.size + number)

    def _log(self, extent: Extent) -> None:
        record = _EXTENT.pack(extent.start, extent.size, extent.digest, _WHOLE)
        # Two threads never get the same place: a count is drawn in one step.
        place = next(self._next_extent)
        _write_all(self._map, record, self._extents_start + place * _EXTENT.size)

    def _forget_extents(self) -> None:
        os.ftruncate(self._map, self._extents_start)
        self._next_extent = count()

    @property
    def _extents_start(self) -> int:
        return _HEADER.size + len(self._chunks)

    def _is_right(self, part: Chunk | Extent) -> bool:
        data = os.pread(self._nar, part.size, part.start)
        return hashlib.sha256(data).digest() == part.digest


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
            partial = PartialNar(path, chunks, nar, map_)
            records = _read_extents(map_, _HEADER.size + len(chunks))
            partial.go_on_after(len(records))
            extents = [each for each in records if each is not None and each.end <= chunks.nar_size]
            partial.restore(found.states, extents, trusted=found.boot == self._boot)
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

    def look(self, path: StorePath, index: bytes, chunks: ChunkTable) -> NarGlance | None:
        """What is here of ``path`` by this index, whoever has it; None where nothing is.

        Nobody keeps it from being removed, and after a loss of power it may not be what the map says: whoever reads it
        knows what it must hash to.
        """
        with storage("look at", self._file(path, ".map")), suppress(FileNotFoundError):
            here = _here(self._file(path, ".map").read_bytes(), index, chunks)
            if here:
                return NarGlance(self._file(path, ".nar"), here)
        return None

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


@dataclass(frozen=True, slots=True)
class _Map:
    """What a map says: the boot that it was written in, and a byte a chunk."""

    boot: bytes
    states: bytes


def _read_map(map_: int, expected: bytes) -> _Map | None:
    """What a map says of its chunks; None unless it is of the NAR expected."""
    data = os.pread(map_, _HEADER.size, 0)
    if len(data) != _HEADER.size:
        return None
    magic, nar_hash, index, boot, chunks = _HEADER.unpack(data)
    wanted = _HEADER.unpack(expected)
    states = os.pread(map_, chunks, _HEADER.size) if chunks == wanted[4] else b""
    if (magic, nar_hash, index, chunks) != (*wanted[:3], wanted[4]) or len(states) != chunks:
        return None
    return _Map(boot, states)


def _here(map_: bytes, index: bytes, chunks: ChunkTable) -> ByteRanges:
    """The bytes of the NAR that a map says are here; none where it is by another index."""
    found = ByteRanges()
    end = _HEADER.size + len(chunks)
    if len(map_) < end or _HEADER.unpack(map_[: _HEADER.size])[2] != hashlib.sha256(index).digest():
        return found
    for chunk, state in zip(chunks, map_[_HEADER.size : end], strict=True):
        if state == _THERE:
            found.add(chunk.start, chunk.end)
    for extent in _extents_in(map_[end:]):
        if extent is not None and extent.end <= chunks.nar_size:
            found.add(extent.start, extent.end)
    return found


def _read_extents(map_: int, start: int) -> list[Extent | None]:
    """What a map says of extents, a record each; None for one that was not written to its end."""
    return _extents_in(os.pread(map_, os.fstat(map_).st_size - start, start))


def _extents_in(data: bytes) -> list[Extent | None]:
    whole = len(data) - len(data) % _EXTENT.size
    return [
        Extent(offset, size, digest) if is_whole == _WHOLE and size else None
        for offset, size, digest, is_whole in _EXTENT.iter_unpack(data[:whole])
    ]


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
