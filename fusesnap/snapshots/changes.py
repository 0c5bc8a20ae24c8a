"""What a snapshot changes of its parent's state, found by reading the snapshot's own layer only.

containerd's walking differ mounts both states and walks all of both. Here only the upper directory is walked, and of
the state below only what has a counterpart there is looked at: the container has looked at it, too, so nothing is
fetched for it. What is found is the same, in the same order (``doubleWalkDiff`` in ``fs/diff.go`` of
containerd/continuity):

- Names come sorted by their bytes, a directory before what is in it.
- Something is unchanged if kind, mode, owner, device and capabilities are those that it has below, and, unless it is a
  directory, size and modification time, too; where neither time has nanoseconds the content decides.
- What has gone is said once, not for all that was in it. An opaque directory says it of each name that was there.

How overlayfs writes changes is in Linux's ``Documentation/filesystems/overlayfs.rst``. A container may be running: its
directories are opened one by one, and no link in them is followed.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import BinaryIO, Final

from fusesnap.errors import NotOurs
from fusesnap.snapshots.farms import REDIRECT_XATTR
from fusesnap.snapshots.id_mapping import IdMapping
from fusesnap.snapshots.layer_content import OPAQUE_XATTR, is_whiteout

CAPABILITY_XATTR: Final = "security.capability"
# With these, overlayfs's metacopy and redirect_dir=on, an upper directory does not hold all that it changes.
METACOPY_XATTR: Final = "trusted.overlay.metacopy"

_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK a pipe that has taken a file's place would hold us.
_OPEN_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_COMPARED: Final = 1 << 16
# include/uapi/linux/capability.h: revision 3 of struct vfs_cap_data ends with the root's id, revision 2 has none.
_CAPABILITY: Final = struct.Struct("<I16sI")
_REVISION, _REVISION_2, _REVISION_3 = 0xFF00_0000, 0x0200_0000, 0x0300_0000
_NO_ATTRIBUTE: Final = {errno.ENODATA, errno.ENOTSUP}


class ChangeKind(Enum):
    """``WRITTEN`` is added or modified. ``LINKED`` is unchanged, but may be a link to something that is not."""

    WRITTEN = auto()
    LINKED = auto()
    DELETED = auto()


@dataclass(frozen=True, slots=True)
class Found:
    """Something that the newer state has; ``path`` is relative to its root, and ``parent`` is ``None`` there.

    ``owner``: user and group as the container sees them.
    """

    path: bytes
    status: os.stat_result
    owner: tuple[int, int]
    capability: bytes
    parent: Found | None

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)

    @property
    def is_linked(self) -> bool:
        """Whether it may have other names."""
        return not self.is_directory and self.status.st_nlink > 1


@dataclass(frozen=True, slots=True)
class Change:
    """``found`` is there unless it was deleted. ``directory`` is open until the next change is asked for."""

    kind: ChangeKind
    path: bytes
    parent: Found | None
    found: Found | None
    directory: int

    def open(self) -> AbstractContextManager[BinaryIO]:
        """Open the file for reading. Raises ``OSError``, also when it is not what was found any more."""
        assert self.found is not None  # noqa: S101  # what was deleted is not read
        return _open(_name(self.path), self.directory, self.found.status.st_ino)

    def target(self) -> bytes:
        """Where the symbolic link points to. Raises ``OSError``."""
        return os.readlink(_name(self.path), dir_fd=self.directory)


@dataclass(frozen=True, slots=True)
class _View:
    """How an upper directory is to be read."""

    overlay: bool
    ids: IdMapping | None

    def owner(self, status: os.stat_result) -> tuple[int, int]:
        owner = status.st_uid, status.st_gid
        return owner if self.ids is None else self.ids.inside(*owner)

    def capability(self, value: bytes) -> bytes:
        """Capabilities without the root of the user namespace that they are for, as the container set them."""
        if self.ids is None or len(value) != _CAPABILITY.size:
            return value
        magic, sets, root = _CAPABILITY.unpack(value)
        if magic & _REVISION != _REVISION_3 or root != self.ids.root[0]:
            return value
        return struct.pack("<I16s", magic - _REVISION_3 + _REVISION_2, sets)


class _Level:
    """A directory of the newer state that is being walked, and the older state's at the same path.

    ``below`` is ``None`` where the older state has no directory. ``hides``: nothing of it is seen in the newer state.
    """

    def __init__(self, upper: int, below: int | None, found: Found | None, *, hides: bool) -> None:
        self._upper = upper
        self._below = below
        self._found = found
        self._hides = hides
        names = set(os.listdir(upper))
        if hides and below is not None:
            names.update(os.listdir(below))
        self._names = iter(sorted(map(os.fsencode, names)))

    def close(self) -> None:
        """Close the directories."""
        os.close(self._upper)
        if self._below is not None:
            os.close(self._below)

    def next(self, view: _View) -> tuple[Change | None, _Level | None] | None:
        """What is at the next name, and the level that it leads to; ``None`` at the end."""
        name = next(self._names, None)
        if name is None:
            return None
        path = name if self._found is None else self._found.path + b"/" + name
        old = _status(name, self._below)
        found = self._find(name, path, view)
        if found is None:
            gone = Change(ChangeKind.DELETED, path, self._found, None, self._upper)
            return None if old is None else gone, None
        kind = self._kind(name, found, old)
        change = None if kind is None else Change(kind, path, self._found, found, self._upper)
        return change, self._enter(name, found, old, view)

    def _find(self, name: bytes, path: bytes, view: _View) -> Found | None:
        status = _status(name, self._upper)
        if status is None or (view.overlay and is_whiteout(status)):
            return None
        capability = b""
        place = _place(self._upper, name)
        attributes = os.listxattr(place, follow_symlinks=False)
        if view.overlay and (METACOPY_XATTR in attributes or REDIRECT_XATTR in attributes):
            raise NotOurs(f"{os.fsdecode(path)}: the upper directory does not hold all of it")
        if CAPABILITY_XATTR in attributes:
            capability = os.getxattr(place, CAPABILITY_XATTR, follow_symlinks=False)
        owner = view.owner(status)
        return Found(path, status, owner, view.capability(capability), self._found)

    def _kind(self, name: bytes, found: Found, old: os.stat_result | None) -> ChangeKind | None:
        if old is None or not self._is_same(name, found, old):
            return ChangeKind.WRITTEN
        return ChangeKind.LINKED if found.is_linked else None

    def _is_same(self, name: bytes, found: Found, old: os.stat_result) -> bool:
        new = found.status
        assert self._below is not None  # noqa: S101  # there is something old
        if (new.st_mode, found.owner, new.st_rdev) != (
            old.st_mode,
            (old.st_uid, old.st_gid),
            old.st_rdev,
        ) or found.capability != _capability(_place(self._below, name)):
            return False
        if found.is_directory:
            return True
        if new.st_size != old.st_size or new.st_mtime_ns != old.st_mtime_ns:
            return False
        return bool(new.st_mtime_ns % 10**9) or self._is_same_content(name, new)

    def _is_same_content(self, name: bytes, status: os.stat_result) -> bool:
        if stat.S_ISLNK(status.st_mode):
            return os.readlink(name, dir_fd=self._upper) == os.readlink(name, dir_fd=self._below)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            return True
        with (
            _open(name, self._upper, status.st_ino) as new,
            _open(name, self._below, None) as old,
        ):
            while (data := new.read(_COMPARED)) == old.read(_COMPARED):
                if not data:
                    return True
        return False

    def _enter(
        self, name: bytes, found: Found, old: os.stat_result | None, view: _View
    ) -> _Level | None:
        if not found.is_directory:
            return None
        below = None
        upper = os.open(name, _OPEN_DIRECTORY, dir_fd=self._upper)
        try:
            hides = self._hides or (view.overlay and _is_opaque(upper, found.path))
            if old is not None and stat.S_ISDIR(old.st_mode):
                below = os.open(name, _OPEN_DIRECTORY, dir_fd=self._below)
            return _Level(upper, below, found, hides=hides)
        except BaseException:
            os.close(upper)
            if below is not None:
                os.close(below)
            raise


def changes(
    upper: int, below: int | None, *, overlay: bool, ids: IdMapping | None = None
) -> Iterator[Change]:
    """What the open directory ``upper`` changes of ``below``, which shows the older state; ``None`` is an empty one.

    ``overlay``: ``upper`` is written as overlayfs writes it; otherwise it is the newer state as it is. ``ids``: it
    was written in a user namespace, above what is mapped into it. Both descriptors stay the caller's. Raises
    ``OSError``, and ``NotOurs`` where ``upper`` alone does not say what changed.
    """
    view = _View(overlay, ids)
    older = None if below is None else os.dup(below)
    levels = [_Level(os.dup(upper), older, None, hides=not overlay)]
    try:
        while levels:
            step = levels[-1].next(view)
            if step is None:
                levels.pop().close()
                continue
            change, inner = step
            if inner is not None:
                levels.append(inner)
            if change is not None:
                yield change
    finally:
        for level in levels:
            level.close()


@contextmanager
def _open(name: bytes, directory: int | None, inode: int | None) -> Iterator[BinaryIO]:
    """Open a file that was looked at. Raises ``OSError``, also when there is another by now (unless ``inode`` is)."""
    descriptor = os.open(name, _OPEN_FILE, dir_fd=directory)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or inode not in (None, status.st_ino):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        yield file


def _name(path: bytes) -> bytes:
    return path.rpartition(b"/")[2]


def _status(name: bytes, directory: int | None) -> os.stat_result | None:
    if directory is None:
        return None
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _place(directory: int, name: bytes) -> bytes:
    """A path for the calls that take no descriptor of a directory."""
    return b"/proc/self/fd/%d/%s" % (directory, name)


def _capability(path: bytes) -> bytes:
    try:
        return os.getxattr(path, CAPABILITY_XATTR, follow_symlinks=False)
    except OSError as error:
        if error.errno in _NO_ATTRIBUTE:
            return b""
        raise


def _is_opaque(directory: int, path: bytes) -> bool:
    """Whether nothing below an upper directory is seen. Raises ``NotOurs`` for whiteouts that are attributes."""
    try:
        value = os.getxattr(directory, OPAQUE_XATTR)
    except OSError as error:
        if error.errno in _NO_ATTRIBUTE:
            return False
        raise
    if value != b"y":
        raise NotOurs(f"{os.fsdecode(path)}: expected {OPAQUE_XATTR} = 'y', got {value!r}")
    return True
