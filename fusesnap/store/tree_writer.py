"""A NAR's events become files, in Nix's canonical form, and never outside the directory that was given."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final

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
from fusesnap.nix.tree import STORE_MTIME_NS

# Nix manual, "File system object": modes and times carry nothing but the executable bit, so all are made alike
# (``canonicalisePathMetaData`` in ``src/libstore/local-store.cc``).
FILE_MODE: Final = 0o444
EXECUTABLE_MODE: Final = 0o555
DIRECTORY_MODE: Final = 0o555
_TIMES: Final = (STORE_MTIME_NS, STORE_MTIME_NS)

_UNFINISHED_FILE_MODE: Final = 0o600
_UNFINISHED_DIRECTORY_MODE: Final = 0o755
_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class TreeWriter:
    """Writes one NAR's tree as ``name`` into the directory ``descriptor``.

    Every name is created exclusively, relative to an open directory, and without following links, so whatever the NAR
    says it stays below. Only the directory being filled is open, however deep: ``..`` leads back, and nobody else can
    move directories in there. The descriptor is borrowed and must stay open meanwhile.

    A root directory stays writable by its owner: renaming a directory elsewhere changes its ``..`` and so needs write
    permission on it, which an ordinary user does not have on mode 0555.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._root_name = os.fsencode(name)
        self._top = descriptor
        self._directory = descriptor
        self._names: list[bytes] = []  # of the open directories, to set their times from above
        self._file = -1
        self._file_mode = FILE_MODE
        self.entries = 0
        self.is_complete = False

    def receive(self, event: NarEvent) -> None:
        """Write what ``event`` says. Raises OSError."""
        match event:
            case FileData():
                self._write(event.data)
            case RegularFile():
                self._start_file(event)
            case FileEnd():
                self._end_file()
            case Symlink():
                self._make_link(event)
            case DirectoryStart():
                self._start_directory(event.name)
            case DirectoryEnd():
                self._end_directory()
            case NarEnd():
                self.is_complete = True

    def close(self) -> None:
        """Close what is open; the tree stays as it is."""
        with suppress(OSError):  # of a file that is given up
            if self._file >= 0:
                os.close(self._file)
        self._file = -1
        self._enter(self._top)

    def _name(self, name: bytes) -> bytes:
        self.entries += 1
        return name if self._names else self._root_name

    def _start_file(self, event: RegularFile) -> None:
        self._file_mode = EXECUTABLE_MODE if event.executable else FILE_MODE
        name = self._name(event.name)
        self._file = os.open(name, _CREATE_FILE, _UNFINISHED_FILE_MODE, dir_fd=self._directory)

    def _write(self, data: bytes) -> None:
        written = os.write(self._file, data)
        if written < len(data):  # rare: a signal, or the disk's last bytes
            rest = memoryview(data)[written:]
            while rest:
                rest = rest[os.write(self._file, rest) :]

    def _end_file(self) -> None:
        os.fchmod(self._file, self._file_mode)
        os.utime(self._file, ns=_TIMES)
        descriptor, self._file = self._file, -1
        os.close(descriptor)

    def _make_link(self, event: Symlink) -> None:
        name = self._name(event.name)
        os.symlink(event.target, name, dir_fd=self._directory)
        os.utime(name, ns=_TIMES, dir_fd=self._directory, follow_symlinks=False)

    def _start_directory(self, name: bytes) -> None:
        name = self._name(name)
        os.mkdir(name, _UNFINISHED_DIRECTORY_MODE, dir_fd=self._directory)
        self._enter(os.open(name, _OPEN_DIRECTORY, dir_fd=self._directory))
        self._names.append(name)

    def _end_directory(self) -> None:
        self._names.pop()
        # The process's umask must not show in the mode.
        os.fchmod(self._directory, DIRECTORY_MODE if self._names else _UNFINISHED_DIRECTORY_MODE)
        os.utime(self._directory, ns=_TIMES)
        if self._names:
            self._enter(os.open("..", _OPEN_DIRECTORY, dir_fd=self._directory))
        else:
            self._enter(self._top)

    def _enter(self, descriptor: int) -> None:
        left, self._directory = self._directory, descriptor
        if left != self._top:
            os.close(left)
