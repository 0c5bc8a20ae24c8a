"""Staged trees reach the disk before they get their names in the store."""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

# Measured on ext4, files of 4 KiB: fsync of each of 8, 32, 64 and 2,000 files takes 1.6, 6, 9 and 291 ms, one syncfs
# 0.4, 0.9, 1.3 and 16 ms; the whole commit of a path of 2,000 files 260 to 305 ms and 32 to 60 ms. But syncfs also
# waits for what everybody else has written to the file system, which may be gigabytes; so a small path that comes
# alone, for which a reader may be waiting, pays for itself alone. Several that are committed together share one syncfs:
# on a busy disk 192 paths of 13 files took 4.2 s by fsync, 1.0 s by a syncfs each, 0.15 s by one for every 32.
FSYNC_AT_MOST: Final = 64

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


def flush_trees(trees: Sequence[tuple[Path, int]]) -> None:
    """Wait until trees of one file system, each a location with its number of objects, are on the disk.

    Links are there with the directory that they are in, and the names of the locations with theirs. Raises OSError.
    """
    if len(trees) == 1 and trees[0][1] <= FSYNC_AT_MOST:
        _flush_tree(trees[0][0])
    elif trees:
        _sync_file_system(trees[0][0].parent)


def flush_directory(path: Path) -> None:
    """Wait until the names in the directory ``path`` are on the disk. Raises OSError."""
    descriptor = os.open(path, _OPEN | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_tree(location: Path) -> None:
    if location.is_dir() and not location.is_symlink():
        for _, _, files, directory in os.fwalk(location, onerror=_raise):
            for name in files:
                _flush_file(name, directory)
            os.fsync(directory)
    else:
        _flush_file(location, None)


def _raise(error: OSError) -> None:
    raise error


def _flush_file(name: str | Path, directory: int | None) -> None:
    if not stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
        return
    descriptor = os.open(name, _OPEN, dir_fd=directory)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_file_system(path: Path) -> None:
    """Call syncfs(2), which Python does not have."""
    descriptor = os.open(path, _OPEN)
    try:
        if _LIBC.syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(descriptor)
