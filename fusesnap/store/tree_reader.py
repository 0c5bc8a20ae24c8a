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


def _string_size(length: int) -> int:
    return 8 + length + -length % 8


def _sizes(*words: bytes) -> int:
    return sum(_string_size(len(word)) for word in words)


# Nix manual, "Nix Archive (NAR) format": how many bytes stand before, between and behind what has a length of its own.
_MAGIC_SIZE: Final = _sizes(b"nix-archive-1")
_REGULAR_SIZE: Final = _sizes(b"(", b"type", b"regular", b"contents") + 8
_EXECUTABLE_SIZE: Final = _sizes(b"executable", b"")
_SYMLINK_SIZE: Final = _sizes(b"(", b"type", b"symlink", b"target")
_DIRECTORY_SIZE: Final = _sizes(b"(", b"type", b"directory")
_CLOSE_SIZE: Final = _sizes(b")")
_BEFORE_NAME_SIZE: Final = _sizes(b"entry", b"(", b"name")
_AFTER_NAME_SIZE: Final = _sizes(b"node")


class _Walk:
    """Walks a tree in NAR order, counting the bytes that its NAR has so far.

    Only one directory is open, however deep: names are looked up relative to it, so no path is too long, and ``..``
    leads back.
    """

    def __init__(self, location: Path, *, contents: bool) -> None:
        self._location = location
        self._contents = contents
        self._offset = _MAGIC_SIZE
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
            self._offset += _BEFORE_NAME_SIZE + _string_size(len(name)) + _AFTER_NAME_SIZE
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
            self._offset += _DIRECTORY_SIZE
            names = map(os.fsencode, os.listdir(self._directory))
            self._waiting.append(sorted(names, reverse=True))
            yield DirectoryStart(event_name)
        elif stat.S_ISLNK(status.st_mode):
            target = os.readlink(name, dir_fd=self._directory)
            self._offset += _SYMLINK_SIZE + _string_size(len(target))
            self._close_object()
            yield Symlink(event_name, target)
        else:
            raise InvalidData(
                f"{self._location}: {os.fsdecode(name)!r} is neither file, directory nor link"
            )

    def _file(self, name: bytes, event_name: bytes, status: os.stat_result) -> Iterator[NarEvent]:
        executable = bool(status.st_mode & stat.S_IXUSR)
        self._offset += _REGULAR_SIZE + (_EXECUTABLE_SIZE if executable else 0)
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
        self._offset += _CLOSE_SIZE * (
            2 if self._waiting else 1
        )  # an entry has a bracket of its own
