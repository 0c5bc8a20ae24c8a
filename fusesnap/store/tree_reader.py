"""A committed path is read back: as the events of its NAR, or as its tree."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fusesnap.errors import InvalidData
from fusesnap.nix.nar import (
    DirectoryEnd,
    DirectoryStart,
    FileData,
    FileEnd,
    NarEnd,
    NarEvent,
    RegularFile,
    Symlink,
)
from fusesnap.nix.nar_grammar import (
    CLOSE_ENTRY,
    CLOSE_ROOT,
    DIRECTORY,
    ENTRY,
    EXECUTABLE,
    MAGIC,
    NODE,
    REGULAR,
    SYMLINK,
    spelled_size,
)
from fusesnap.nix.tree import Tree, TreeBuilder
from fusesnap.store.storage_errors import storage

_PIECE: Final = 256 * 1024
_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def scan_tree(location: Path) -> Tree:
    """Return the tree of a committed path, offsets into its NAR included, without reading contents.

    Raises :class:`StorageFailure`, and :class:`InvalidData` for what no NAR can hold, such as a socket.
    """
    return measured_tree(location)[0]


def measured_tree(location: Path) -> tuple[Tree, int]:
    """As :func:`scan_tree`, and how many bytes the NAR of what is there would have."""
    builder = TreeBuilder()
    walk = _Walk(location, contents=False)
    for event in walk.events():
        builder.receive(event)
    return builder.tree(), walk.nar_size


def nar_events(location: Path) -> Iterator[NarEvent]:
    """Give the events of the NAR that Nix would dump a committed path as; contents in pieces of at most 256 KiB.

    Raises :class:`StorageFailure`, and :class:`InvalidData` for what no NAR can hold, such as a socket, or where a
    file has fewer bytes than its size says. Close the iterator if it is not read to its end.
    """
    return _Walk(location, contents=True).events()


class _Walk:
    """Walks a tree in NAR order, counting the bytes that its NAR has so far.

    Only one directory is open, however deep: names are looked up relative to it, so no path is too long, and ``..``
    leads back.
    """

    def __init__(self, location: Path, *, contents: bool) -> None:
        self._location = location
        self._contents = contents
        self._offset = len(MAGIC)
        self._directory = -1
        self._waiting: list[
            list[bytes]
        ] = []  # names in each directory on the way, the next one last

    @property
    def nar_size(self) -> int:
        """The bytes so far; at the end, of the whole NAR."""
        return self._offset

    def events(self) -> Iterator[NarEvent]:
        with storage("read", self._location):
            self._directory = os.open(self._location.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield from self._object(os.fsencode(self._location.name), b"")
                while self._waiting:
                    yield from self._step()
            finally:
                os.close(self._directory)
        yield NarEnd()

    def _step(self) -> Iterator[NarEvent]:
        names = self._waiting[-1]
        if names:
            name = names.pop()
            self._offset += len(ENTRY) + spelled_size(len(name)) + len(NODE)
            yield from self._object(name, name)
            return
        self._waiting.pop()
        if self._waiting:
            self._enter(b"..")
        self._close_object()
        yield DirectoryEnd()

    def _object(self, name: bytes, event_name: bytes) -> Iterator[NarEvent]:
        status = os.stat(name, dir_fd=self._directory, follow_symlinks=False)
        if stat.S_ISREG(status.st_mode):
            yield from self._file(name, event_name, status)
        elif stat.S_ISDIR(status.st_mode):
            self._enter(name)
            self._offset += len(DIRECTORY)
            names = map(os.fsencode, os.listdir(self._directory))
            self._waiting.append(sorted(names, reverse=True))
            yield DirectoryStart(event_name)
        elif stat.S_ISLNK(status.st_mode):
            target = os.readlink(name, dir_fd=self._directory)
            self._offset += len(SYMLINK) + spelled_size(len(target))
            self._close_object()
            yield Symlink(event_name, target)
        else:
            raise InvalidData(
                f"{self._location}: {os.fsdecode(name)!r} is neither file, directory nor link"
            )

    def _file(self, name: bytes, event_name: bytes, status: os.stat_result) -> Iterator[NarEvent]:
        executable = bool(status.st_mode & stat.S_IXUSR)
        self._offset += len(EXECUTABLE if executable else REGULAR) + 8
        offset = self._offset
        self._offset += status.st_size + -status.st_size % 8
        self._close_object()
        yield RegularFile(event_name, status.st_size, executable, offset)
        if self._contents:
            yield from self._data(name, status.st_size)
        yield FileEnd()

    def _data(self, name: bytes, size: int) -> Iterator[FileData]:
        descriptor = os.open(name, _OPEN_FILE, dir_fd=self._directory)
        try:
            left = size
            while left:
                data = os.read(descriptor, min(left, _PIECE))
                if not data:
                    raise InvalidData(
                        f"{self._location}: {os.fsdecode(name)!r} ends {left} bytes before its size {size}"
                    )
                left -= len(data)
                yield FileData(data)
        finally:
            os.close(descriptor)

    def _enter(self, name: bytes) -> None:
        entered = os.open(name, _OPEN_DIRECTORY, dir_fd=self._directory)
        os.close(self._directory)
        self._directory = entered

    def _close_object(self) -> None:
        self._offset += len(CLOSE_ENTRY if self._waiting else CLOSE_ROOT)
