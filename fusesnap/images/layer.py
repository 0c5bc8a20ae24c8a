"""A layer as its uncompressed tar: what entries it has, and where in the tar their contents are.

Sources: OCI image specification, ``layer.md``; POSIX.1-2017, ``pax``; GNU tar manual, "Storing Sparse
Files"; ``SCHILY.xattr.`` records as star and Go's archive/tar write them.
"""

from __future__ import annotations

import os
import re
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, cast

from fusesnap.errors import ContentMismatch, InvalidData
from fusesnap.images.digest import Digest
from fusesnap.images.disk import refusals
from fusesnap.images.tar_scan import MAX_PATH, normalised, scan
from fusesnap.nix.quoting import quote

# Each entry takes some 300 bytes of memory while layers are merged. The largest images in use have
# some 500,000 files.
MAX_ENTRIES: Final = 1_000_000
MAX_XATTR_NAME: Final = 255  # XATTR_NAME_MAX of Linux
MAX_XATTR_VALUE: Final = 65_536  # XATTR_SIZE_MAX of Linux
MAX_ID: Final = 2**32 - 2  # chown(2) takes 2^32 - 1 for "leave it"
MAX_DEVICE: Final = 2**32 - 1  # numbers of a device, as ustar's base-256 may spell far more
# What a count of nanoseconds in 64 bits holds: the years 1677 to 2262.
_MIN_TIME: Final = -(2**63)
_MAX_TIME: Final = 2**63 - 1
_XATTR: Final = "SCHILY.xattr."
_DECIMAL: Final = re.compile(r"(-?)([0-9]{1,20})(?:\.([0-9]{0,40}))?", re.ASCII)

# (offset in the file, bytes) of each stretch that has contents; what lies between reads as zeros.
Segments = tuple[tuple[int, int], ...]
Xattrs = tuple[tuple[bytes, bytes], ...]


class FileKind(IntEnum):
    """Kinds of files; the values are those of ``st_mode & S_IFMT``."""

    DIRECTORY = stat.S_IFDIR
    REGULAR = stat.S_IFREG
    SYMLINK = stat.S_IFLNK
    CHARACTER_DEVICE = stat.S_IFCHR
    BLOCK_DEVICE = stat.S_IFBLK
    FIFO = stat.S_IFIFO


_KINDS: Final = {
    tarfile.REGTYPE: FileKind.REGULAR,
    tarfile.AREGTYPE: FileKind.REGULAR,
    tarfile.CONTTYPE: FileKind.REGULAR,
    tarfile.GNUTYPE_SPARSE: FileKind.REGULAR,
    tarfile.LNKTYPE: FileKind.REGULAR,
    tarfile.DIRTYPE: FileKind.DIRECTORY,
    tarfile.SYMTYPE: FileKind.SYMLINK,
    tarfile.CHRTYPE: FileKind.CHARACTER_DEVICE,
    tarfile.BLKTYPE: FileKind.BLOCK_DEVICE,
    tarfile.FIFOTYPE: FileKind.FIFO,
}


@dataclass(frozen=True, slots=True)
class LayerEntry:
    """One entry of a layer's tar, whiteouts included.

    ``path`` is relative and normalised, ``b""`` for the root. ``mode`` are the twelve permission
    bits. ``mtime_ns`` is in nanoseconds since 1970, ``size`` in bytes (of contents or of a link's
    target, otherwise 0). ``offset`` is where contents begin in the tar; those of a sparse file are
    its ``segments``, one after another. ``hard_link`` is the normalised path of the file that this
    is another name of; nothing else of such an entry counts.
    """

    path: bytes
    kind: FileKind
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    offset: int
    target: bytes = b""
    rdev: int = 0
    xattrs: Xattrs = ()
    segments: Segments | None = None
    hard_link: bytes | None = None


class LayerTar:
    """An open, verified, uncompressed tar of a layer. Use it as a context, or close it.

    Reading is thread-safe; :meth:`entries` is not.
    """

    __slots__ = ("_descriptor", "diff_id", "name")

    def __init__(self, descriptor: int, diff_id: Digest, name: str) -> None:
        self._descriptor = descriptor
        self.diff_id = diff_id
        self.name = name

    def __enter__(self) -> LayerTar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; reading afterwards is a StorageFailure."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def entries(self) -> Iterator[LayerEntry]:
        """Give the entries in the tar's order; reads headers only.

        Raises InvalidData, naming the entry, for what no file system could hold.
        """
        for member in scan(self._descriptor, self.name, MAX_ENTRIES):
            yield _entry(member, self.name)

    def read(self, offset: int, size: int) -> bytes:
        """Read ``size`` bytes at ``offset`` of the tar; raises ContentMismatch where it is shorter."""
        with refusals(self.name):
            data = os.pread(self._descriptor, size, offset)
        while len(data) < size:  # a signal, or more than one read may give
            with refusals(self.name):
                more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                raise ContentMismatch(
                    f"{self.name}: expected {size} bytes at offset {offset}, got {len(data)}:"
                    " the cached layer was changed"
                )
            data += more
        return data


def _entry(member: tarfile.TarInfo, tar: str) -> LayerEntry:
    path = normalised(member.name, tar)
    where = f"{tar}: entry {quote(path)}"
    kind = _KINDS.get(member.type)
    if kind is None:
        raise InvalidData(
            f"{where} of type {member.type!r}: expected a file, directory, link, device or fifo"
        )
    _check_numbers(member, where)
    if not path and kind is not FileKind.DIRECTORY:
        raise InvalidData(f"{where} is the root: expected a directory, got type {member.type!r}")
    target = _target(member, where) if kind is FileKind.SYMLINK else b""
    regular = kind is FileKind.REGULAR and not member.islnk()
    return LayerEntry(
        path=path,
        kind=kind,
        mode=0o777 if kind is FileKind.SYMLINK else member.mode & 0o7777,
        uid=member.uid,
        gid=member.gid,
        mtime_ns=_mtime_ns(member, where),
        size=member.size if regular else len(target),
        offset=member.offset_data if regular else 0,
        target=target,
        rdev=_rdev(member, where) if member.ischr() or member.isblk() else 0,
        xattrs=_xattrs(member, where) if member.pax_headers else (),
        segments=_segments(member, where) if regular and member.issparse() else None,
        hard_link=normalised(member.linkname, tar) if member.islnk() else None,
    )


def _check_numbers(member: tarfile.TarInfo, where: str) -> None:
    for field in ("uid", "gid", "size"):
        # tarfile takes 0 for what is no number.
        text = member.pax_headers.get(field)
        if text is not None and not (text.isascii() and text.isdigit()):
            raise InvalidData(f"{where}: expected a number as {field}, got {quote(text)}")
    for field, number in (("uid", member.uid), ("gid", member.gid)):
        if not 0 <= number <= MAX_ID:
            raise InvalidData(f"{where}: expected {field} 0 to {MAX_ID}, got {number}")


def _target(member: tarfile.TarInfo, where: str) -> bytes:
    target = member.linkname.encode("utf-8", "surrogateescape")
    if not target or b"\0" in target or len(target) >= MAX_PATH:
        raise InvalidData(
            f"{where}: expected a link target of 1 to {MAX_PATH - 1} bytes without NUL, got"
            f" {quote(target)} of {len(target)}"
        )
    return target


def _rdev(member: tarfile.TarInfo, where: str) -> int:
    major, minor = member.devmajor, member.devminor
    if not (0 <= major <= MAX_DEVICE and 0 <= minor <= MAX_DEVICE):
        raise InvalidData(f"{where}: expected a device's numbers, got {major} and {minor}")
    return os.makedev(major, minor)


def _mtime_ns(member: tarfile.TarInfo, where: str) -> int:
    """The time in full: tarfile has it as a float, which is some 100 ns too coarse."""
    text = member.pax_headers.get("mtime")
    if text is None:
        return _bounded_time(int(member.mtime) * 10**9)
    match = _DECIMAL.fullmatch(text)
    if match is None:
        raise InvalidData(f"{where}: expected a decimal number as mtime, got {quote(text)}")
    sign, seconds, fraction = match.groups()
    nanoseconds = int(seconds) * 10**9 + int((fraction or "")[:9].ljust(9, "0"))
    return _bounded_time(-nanoseconds if sign else nanoseconds)


def _bounded_time(nanoseconds: int) -> int:
    # As file systems do with a time that they cannot hold: the nearest that they can.
    return max(_MIN_TIME, min(_MAX_TIME, nanoseconds))


def _xattrs(member: tarfile.TarInfo, where: str) -> Xattrs:
    found = {
        key.removeprefix(_XATTR).encode("utf-8", "surrogateescape"): value.encode(
            "utf-8", "surrogateescape"
        )
        for key, value in member.pax_headers.items()
        if key.startswith(_XATTR)
    }
    for name, value in found.items():
        if not 0 < len(name) <= MAX_XATTR_NAME or b"\0" in name:
            raise InvalidData(
                f"{where}: extended attribute {quote(name)}: expected a name of 1 to"
                f" {MAX_XATTR_NAME} bytes without NUL"
            )
        if len(value) > MAX_XATTR_VALUE:
            raise InvalidData(
                f"{where}: extended attribute {quote(name)}: expected at most {MAX_XATTR_VALUE}"
                f" bytes, got {len(value)}"
            )
    return tuple(sorted(found.items()))


def _segments(member: tarfile.TarInfo, where: str) -> Segments:
    if "size" in member.pax_headers:
        # tarfile then takes the size of the file for that of what is stored of it.
        raise InvalidData(f"{where}: a sparse file of 8 GiB or more of contents is not supported")
    # typeshed says bytes; it is a list of (offset, size), empty ones included.
    stated = cast(list[tuple[int, int]], member.sparse)
    segments = tuple((offset, size) for offset, size in stated if size)
    end = 0
    for offset, size in segments:
        if offset < end or size < 0 or offset + size > member.size:
            raise InvalidData(
                f"{where}: expected a sparse map in order within {member.size} bytes, got {size}"
                f" bytes at {offset}"
            )
        end = offset + size
    return segments
