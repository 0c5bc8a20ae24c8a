"""Closures whose content is that of real packages: the programs, libraries and texts of this machine's own ``/usr``.

What is made up compresses too well or not at all, and unpacks faster or slower than anything that people run.
"""

from __future__ import annotations

import hashlib
import os
import random
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusesnap.nix.hash import compress_digest, nix32_encode
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
from fusesnap.nix.store_path import StorePath

SOURCES = (Path("/usr/bin"), Path("/usr/lib"), Path("/usr/share"))
LARGEST_FILE = 64 * 1024 * 1024
SMALL_FILE = 48 * 1024
SMALL_PATH = 40 * 1024  # bytes of files in a small path: about the median of nixpkgs
BRANCHES = 4  # paths that a path refers to, and that nothing before it did
FURTHER = 3  # references to other paths, as libraries have them


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of this machine. ``size`` in bytes."""

    location: Path
    size: int
    executable: bool


@dataclass(frozen=True, slots=True)
class ProgramPath:
    """A store path: a directory ``share`` with copies of ``files``, and a link to it."""

    name: str
    files: tuple[SourceFile, ...]
    references: tuple[StorePath, ...] = ()

    @property
    def store_path(self) -> StorePath:
        digest = hashlib.sha256(self.name.encode()).digest()
        return StorePath(nix32_encode(compress_digest(digest, 20)), self.name)

    def events(self) -> Iterator[NarEvent]:
        """Its NAR."""
        yield DirectoryStart(b"")
        yield Symlink(b"lib", b"share")
        yield DirectoryStart(b"share")
        for number, file in enumerate(self.files):
            data = file.location.read_bytes()
            name = f"{number:06d}-{file.location.name}"[:200].encode()
            yield RegularFile(name, len(data), file.executable, offset=0)
            if data:
                yield FileData(data)
            yield FileEnd()
        yield DirectoryEnd()
        yield DirectoryEnd()
        yield NarEnd()


def few_large(size: int) -> list[ProgramPath]:
    """Six paths of together ``size`` bytes, half of it in the largest; the first refers to all others."""
    files = source_files(LARGEST_FILE)
    shares = [0.01, 0.5, 0.2, 0.15, 0.1, 0.04]
    paths = [
        ProgramPath(f"large-{number}", tuple(_take(files, int(size * share))))
        for number, share in enumerate(shares)
    ]
    return _referring(paths)


def many_small(count: int) -> list[ProgramPath]:
    """``count`` paths of a few small files each; the first refers to all others, directly or not."""
    files = source_files(SMALL_FILE)
    choice = random.Random(1)  # noqa: S311 - the same paths in every run
    paths = []
    for number in range(count):
        size = int(min(choice.lognormvariate(0, 1), 10) * SMALL_PATH)
        paths.append(ProgramPath(f"small-{number}", tuple(_take(files, size))))
    return _referring(paths)


def source_files(largest: int) -> Iterator[SourceFile]:
    """The files of this machine up to ``largest`` bytes, in an order that mixes them; over and over."""
    found = list(_regular_files(largest))
    random.Random(1).shuffle(found)  # noqa: S311 - the same order in every run
    while found:
        yield from found


def _regular_files(largest: int) -> Iterator[SourceFile]:
    for top in SOURCES:
        for directory, directories, names in os.walk(top):
            directories.sort()
            for name in sorted(names):
                location = Path(directory, name)
                status = location.lstat()
                readable = stat.S_ISREG(status.st_mode) and os.access(location, os.R_OK)
                if readable and 0 < status.st_size <= largest:
                    executable = bool(status.st_mode & stat.S_IXUSR)
                    yield SourceFile(location, status.st_size, executable)


def _take(files: Iterator[SourceFile], size: int) -> Iterator[SourceFile]:
    """At least one file, and more until they have ``size`` bytes."""
    taken = 0
    while taken < size or not taken:
        file = next(files)
        taken += file.size
        yield file


def _referring(paths: Sequence[ProgramPath]) -> list[ProgramPath]:
    """A tree of references from the first path on, so deep as closures are, with some to others further down."""
    choice = random.Random(2)  # noqa: S311 - the same references in every run
    names = [path.store_path for path in paths]
    made = []
    for number, path in enumerate(paths):
        below = range(number * BRANCHES + 1, min((number + 1) * BRANCHES + 1, len(paths)))
        later = range(number + 1, len(paths))
        further = choice.sample(later, min(FURTHER, len(later)))
        references = sorted({names[other] for other in (*below, *further)})
        made.append(ProgramPath(path.name, path.files, tuple(references)))
    return made
