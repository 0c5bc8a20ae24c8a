"""Whole entries of the store directory: whether they are there, sealed, moved away, removed.

An ordinary user may not change what is in a directory of mode 0555, nor rename it elsewhere, which
changes its entry ``..``; so modes are changed before and after.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from fusesnap.store.tree_writer import DIRECTORY_MODE

_WRITABLE_MODE: Final = 0o700
_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def is_there(path: Path | str) -> bool:
    """Tell whether ``path`` is there, whatever it is. Raises OSError."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def seal(path: Path) -> None:
    """Take write permission from ``path`` if it is a directory. Raises OSError."""
    mode = path.lstat().st_mode
    if stat.S_ISDIR(mode) and stat.S_IMODE(mode) != DIRECTORY_MODE:
        path.chmod(DIRECTORY_MODE)


def move_away(path: Path, target: Path) -> None:
    """Rename ``path``, sealed or not, into another directory. Raises OSError."""
    if stat.S_ISDIR(path.lstat().st_mode):
        path.chmod(_WRITABLE_MODE)
    path.rename(target)


def remove_contents(descriptor: int) -> None:
    """Remove everything from the directory ``descriptor``. Raises OSError."""
    for name in os.listdir(descriptor):
        remove_tree(descriptor, name)


def remove_tree(descriptor: int, name: str | bytes) -> None:
    """Remove ``name``, a tree or a single object, from the directory ``descriptor``. Raises OSError.

    No link is followed, and no path is too long. Nobody else may change the tree meanwhile.
    """
    name = os.fsencode(name)
    if not stat.S_ISDIR(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=descriptor)
        return
    directory = _open_writable(descriptor, name)
    try:
        way = [name]
        while way:
            subdirectory = _remove_until_directory(directory)
            if subdirectory is not None:
                way.append(subdirectory)
                directory = _move(directory, _open_writable(directory, subdirectory))
            elif len(way) > 1:
                directory = _move(directory, os.open("..", _OPEN_DIRECTORY, dir_fd=directory))
                os.rmdir(way.pop(), dir_fd=directory)
            else:
                way.clear()
    finally:
        os.close(directory)
    os.rmdir(name, dir_fd=descriptor)


def _open_writable(parent: int, name: bytes) -> int:
    # Needed by ordinary users, to whom 0555 forbids removing what is in it.
    os.chmod(name, _WRITABLE_MODE, dir_fd=parent)
    return os.open(name, _OPEN_DIRECTORY, dir_fd=parent)


def _move(left: int, entered: int) -> int:
    os.close(left)
    return entered


def _remove_until_directory(directory: int) -> bytes | None:
    """Unlink everything in ``directory`` up to its first subdirectory, and return that one's name."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                return os.fsencode(entry.name)
            os.unlink(entry.name, dir_fd=directory)
    return None
