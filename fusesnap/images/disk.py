"""Where this room meets the disk: what the operating system refuses becomes a StorageFailure here."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fusesnap.errors import InvalidData, StorageFailure

# Large enough that hashing and writing dominate, small enough that a piece is no burden.
PIECE: Final = 256 * 1024


# Told of bytes that were read or written since the last call; what it raises ends the work.
Progress = Callable[[int], None]


def no_progress(_: int) -> None:
    """Nobody is told."""


def watched(pieces: Iterable[bytes], progress: Progress) -> Iterator[bytes]:
    """Give ``pieces``, telling ``progress`` of each."""
    for piece in pieces:
        progress(len(piece))
        yield piece


@contextmanager
def refusals(what: object) -> Iterator[None]:
    """Translate OSError within the block; ``what`` names the file in the message."""
    try:
        yield
    except OSError as error:
        raise StorageFailure(f"{what}: {error.strerror or error}", error.errno or 0) from error


def open_regular(path: Path, *, follow: bool = True) -> int:
    """Open a regular file for reading and return its descriptor; what else bears the name is refused.

    Raises InvalidData for a directory, device, fifo or socket, StorageFailure where the system
    refuses. ``follow`` says whether the last component may be a symbolic link.
    """
    # O_NONBLOCK: opening a fifo that nobody writes would otherwise wait forever.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    with refusals(path):
        descriptor = os.open(path, flags)
        mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise InvalidData(f"{path}: expected a regular file, got {stat.filemode(mode)}")
    return descriptor


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of ``data``; raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class Region:
    """A part of a file: a blob in a directory is a whole file, in an archive a stretch of it.

    ``name`` is for messages. ``size`` is in bytes. Where ``owned``, closing the region closes the
    descriptor.
    """

    __slots__ = ("_descriptor", "_offset", "_owned", "name", "size")

    def __init__(self, descriptor: int, name: str, offset: int, size: int, *, owned: bool) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._owned = owned
        self.name = name
        self.size = size

    def __enter__(self) -> Region:
        return self

    def __exit__(self, *_: object) -> None:
        if self._owned:
            os.close(self._descriptor)

    def pieces(self) -> Iterator[bytes]:
        """Give the whole region in order; raises InvalidData where the file ends before it does."""
        done = 0
        while done < self.size:
            with refusals(self.name):
                piece = os.pread(
                    self._descriptor, min(PIECE, self.size - done), self._offset + done
                )
            if not piece:
                raise InvalidData(f"{self.name}: expected {self.size} bytes, got {done}")
            done += len(piece)
            yield piece
