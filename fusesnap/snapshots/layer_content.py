"""What an unpacked image layer holds in the store directory.

A layer is read as overlayfs reads a lower directory (Linux, ``Documentation/filesystems/overlayfs.rst``): a character
device 0/0 is a whiteout, a directory with the extended attribute ``trusted.overlay.opaque`` = ``y`` hides what is below
it. The layer is a stranger's: no link in it is followed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from types import MappingProxyType
from typing import Final

from fusesnap.nix.store_path import StoreDir
from fusesnap.store.storage_errors import storage

OPAQUE_XATTR: Final = "trusted.overlay.opaque"


class Found(Enum):
    """What is at a name of the store directory."""

    EMPTY_DIRECTORY = auto()
    EMPTY_OPAQUE_DIRECTORY = auto()
    DIRECTORY = auto()
    OPAQUE_DIRECTORY = auto()
    EMPTY_FILE = auto()
    FILE = auto()  # with content, or a link, or anything else that is no directory
    WHITEOUT = auto()


@dataclass(frozen=True, slots=True)
class LayerContent:
    """``hides_below``: nothing of the layers below is seen in the store directory. ``entries``: what is, by name."""

    hides_below: bool
    entries: Mapping[str, Found]


NOTHING: Final = LayerContent(False, MappingProxyType({}))
HIDDEN: Final = LayerContent(True, MappingProxyType({}))


def read_layer(layer: Path, store_dir: StoreDir) -> LayerContent:
    """Look at the store directory in ``layer``. Raises ``StorageFailure``."""
    with storage("read", layer), _directory(str(layer)) as top:
        return _descend(top, store_dir.path.strip("/").split("/"), hides_below=False)


def is_whiteout(status: os.stat_result) -> bool:
    """Whether this is overlayfs's mark for "nothing here"."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def is_opaque(descriptor: int) -> bool:
    """Whether this open directory hides what is below it."""
    try:
        return os.getxattr(descriptor, OPAQUE_XATTR) == b"y"
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):  # no such attribute; none at all here
            return False
        raise


def _descend(parent: int, names: list[str], *, hides_below: bool) -> LayerContent:
    if not names:
        return LayerContent(hides_below, _entries(parent))
    try:
        status = os.stat(names[0], dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return HIDDEN if hides_below else NOTHING
    if not stat.S_ISDIR(status.st_mode):
        return HIDDEN
    with _directory(names[0], parent) as child:
        return _descend(child, names[1:], hides_below=hides_below or is_opaque(child))


def _entries(store: int) -> Mapping[str, Found]:
    with os.scandir(store) as listing:
        return MappingProxyType({entry.name: _classify(store, entry) for entry in listing})


def _classify(store: int, entry: os.DirEntry[str]) -> Found:
    if entry.is_dir(follow_symlinks=False):
        with _directory(entry.name, store) as directory, os.scandir(directory) as listing:
            empty = next(listing, None) is None
            if is_opaque(directory):
                return Found.EMPTY_OPAQUE_DIRECTORY if empty else Found.OPAQUE_DIRECTORY
            return Found.EMPTY_DIRECTORY if empty else Found.DIRECTORY
    status = entry.stat(follow_symlinks=False)
    if is_whiteout(status):
        return Found.WHITEOUT
    empty = stat.S_ISREG(status.st_mode) and status.st_size == 0
    return Found.EMPTY_FILE if empty else Found.FILE


@contextmanager
def _directory(name: str, parent: int | None = None) -> Iterator[int]:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
