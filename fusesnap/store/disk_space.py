"""What things take on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR
from typing import Final

BLOCK: Final = 512  # the unit of st_blocks, whatever the file system's own (stat(2))


def measure(top: Path) -> tuple[int, int]:
    """The bytes and the number of the inodes in ``top``, itself included; hard links count once. Raises OSError.

    It is what containerd's ``fs.DiskUsage`` counts. It may be written to meanwhile: what vanishes is not counted, and
    another file system is not entered, so that a container cannot lead us out by putting a link where a directory was.
    """
    status = top.lstat()
    blocks = {(status.st_dev, status.st_ino): status.st_blocks}
    waiting = [str(top)] if S_ISDIR(status.st_mode) else []
    while waiting:
        for path, found in _entries(waiting.pop()):
            if found.st_dev != status.st_dev:
                continue
            blocks[found.st_dev, found.st_ino] = found.st_blocks
            if S_ISDIR(found.st_mode):
                waiting.append(path)
    return sum(blocks.values()) * BLOCK, len(blocks)


def _entries(directory: str) -> Iterator[tuple[str, os.stat_result]]:
    """Path and status of each entry that can still be looked at."""
    try:
        listing = os.scandir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return
    with listing:
        for entry in listing:
            with suppress(FileNotFoundError):
                yield entry.path, entry.stat(follow_symlinks=False)


def free_space(directory: Path) -> int:
    """The bytes that others than root may still write where ``directory`` is. Raises OSError."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize
