"""A layer as OCI's image specification has it ("Image Layer Filesystem Changeset"), made of changes.

The entries are those of containerd's ``ChangeWriter`` (``pkg/archive/tar.go`` there): the directories that lead to a
change come before it, once; times are whole seconds; of extended attributes only capabilities are kept; sockets are
left out; what has gone is an empty file ``.wh.<name>``, without a time, as since containerd 2.0. Of several names of a
file the first that is written has the content, and the others are links to it: also names which are unchanged, because
they would otherwise no longer be the same file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from fusesnap.errors import FailedPrecondition
from fusesnap.snapshots import tar_header
from fusesnap.snapshots.changes import CAPABILITY_XATTR, Change, ChangeKind, Found
from fusesnap.snapshots.tar_header import TarHeader

WHITEOUT_PREFIX: Final = b".wh."
PIECE: Final = 1 << 20  # bytes

_CAPABILITY_RECORD: Final = f"SCHILY.xattr.{CAPABILITY_XATTR}".encode()
_KINDS: Final = {
    stat.S_IFREG: tar_header.REGULAR,
    stat.S_IFLNK: tar_header.SYMBOLIC_LINK,
    stat.S_IFCHR: tar_header.CHARACTER_DEVICE,
    stat.S_IFBLK: tar_header.BLOCK_DEVICE,
    stat.S_IFDIR: tar_header.DIRECTORY,
    stat.S_IFIFO: tar_header.FIFO,
}


class LayerTar:
    """Writes one layer. ``latest``: the latest modification time that is written, in nanoseconds."""

    def __init__(self, latest: int | None = None) -> None:
        self._latest = latest
        self._directories: set[bytes] = set()  # that have been written
        self._sources: dict[int, bytes] = {}  # by inode: the name that has the content
        self._waiting: dict[
            int, list[Found]
        ] = {}  # by inode: unchanged names of what may yet be written

    def pieces(self, changes: Iterable[Change]) -> Iterator[bytes]:
        """The archive's bytes. Raises ``OSError``, and ``FailedPrecondition`` when a file gets shorter meanwhile."""
        for change in changes:
            yield from self._write(change)
        yield tar_header.END

    def _write(self, change: Change) -> Iterator[bytes]:
        found = change.found
        if found is None:
            directory, _, name = change.path.rpartition(b"/")
            yield from self._leading(change.parent)
            whiteout = WHITEOUT_PREFIX + name
            yield TarHeader(directory + b"/" + whiteout if directory else whiteout).to_bytes()
            return
        if stat.S_ISSOCK(found.status.st_mode):
            return
        inode = found.status.st_ino
        source = self._sources.get(inode) if found.is_linked else None
        if change.kind is ChangeKind.LINKED and source is None:
            self._waiting.setdefault(inode, []).append(found)
            return
        header = self._header(found)
        if source is not None:
            yield from self._entry(found, _link(header, found.path, source))
            return
        if header.kind == tar_header.SYMBOLIC_LINK:
            header = replace(header, link=change.target())
        yield from self._entry(found, header)
        if header.size:
            yield from _content(change, header.size)
        if found.is_linked:
            self._sources[inode] = found.path
            for other in self._waiting.pop(inode, ()):
                yield from self._entry(other, _link(header, other.path, found.path))

    def _entry(self, found: Found, header: TarHeader) -> Iterator[bytes]:
        yield from self._leading(found.parent)
        if found.is_directory:
            self._directories.add(found.path)
        yield header.to_bytes()

    def _leading(self, parent: Found | None) -> Iterator[bytes]:
        """The directories that lead to an entry, outermost first, unless they have been written."""
        missing = []
        while parent is not None and parent.path not in self._directories:
            missing.append(parent)
            parent = parent.parent
        for directory in reversed(missing):
            yield from self._entry(directory, self._header(directory))

    def _header(self, found: Found) -> TarHeader:
        status = found.status
        kind = _KINDS[stat.S_IFMT(status.st_mode)]
        time = status.st_mtime_ns if self._latest is None else min(status.st_mtime_ns, self._latest)
        return TarHeader(
            name=found.path + b"/" if found.is_directory else found.path,
            kind=kind,
            mode=stat.S_IMODE(status.st_mode),
            uid=found.owner[0],
            gid=found.owner[1],
            size=status.st_size if kind == tar_header.REGULAR else 0,
            mtime=time // 10**9,
            major=os.major(status.st_rdev),
            minor=os.minor(status.st_rdev),
            records={_CAPABILITY_RECORD: found.capability} if found.capability else {},
        )


def _link(header: TarHeader, name: bytes, target: bytes) -> TarHeader:
    return replace(header, name=name, kind=tar_header.HARD_LINK, link=target, size=0)


def _content(change: Change, size: int) -> Iterator[bytes]:
    """As much of a file as its header says; what was appended since is of a later state."""
    left = size
    with change.open() as file:
        while left:
            data = file.read(min(left, PIECE))
            if not data:
                raise FailedPrecondition(
                    f"{os.fsdecode(change.path)}: expected {size} bytes, got {size - left}: it was"
                    " written to while it was read; pause the container, or stop it"
                )
            left -= len(data)
            yield data
    yield bytes(-size % tar_header.BLOCK)
