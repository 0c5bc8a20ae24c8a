"""What a directory takes on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR
from typing import Final

from fusesnap.snapshots.interface import Usage
from fusesnap.store.storage_errors import storage

BLOCK: Final = 512  # the unit of st_blocks, whatever the file system's own (stat(2))


def disk_usage(directory: Path) -> Usage:
    """Add up the blocks of every inode in ``directory``, itself included; hard links count once.

    It may be written to meanwhile: what vanishes is not counted, and another file system is not entered, so that a
    container cannot lead us out by putting a link where a directory was. Raises ``StorageFailure``.
    """
    with storage("measure", directory):
        top = directory.lstat()
        blocks = {(top.st_dev, top.st_ino): top.st_blocks}
        waiting = [str(directory)]
        while waiting:
            for path, stat in _entries(waiting.pop()):
                if stat.st_dev != top.st_dev:
                    continue
                blocks[stat.st_dev, stat.st_ino] = stat.st_blocks
                if S_ISDIR(stat.st_mode):
                    waiting.append(path)
    return Usage(sum(blocks.values()) * BLOCK, len(blocks))


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
