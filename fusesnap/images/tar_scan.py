"""Reads the headers of a tar with the standard library's tarfile, and bounds what they may cost.

tarfile trusts its input in ways that matter for tars from strangers: it takes an extension header
of any size into memory, it ends quietly at a damaged header, and a negative size sends it back to
where it was. So it reads through a file that counts, and what it returns is checked here.

Source of the format: POSIX.1-2017, ``pax``, "ustar Interchange Format" and "pax Extended Header";
GNU tar manual, "Basic Tar Format"; OCI image specification, ``layer.md``.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from typing import Final

from fusesnap.errors import InvalidData
from fusesnap.images.disk import refusals
from fusesnap.nix.quoting import quote

# What one entry may have before its contents: names, link targets, extended attributes, the map of
# a sparse file. 1 MiB is also what Go's archive/tar, and so containerd, reads.
MAX_HEADER_SIZE: Final = 1024 * 1024
# A global header's records are copied for each entry, so that many would take time without end.
# Writers in use put one or two in it.
MAX_GLOBAL_RECORDS: Final = 64
# A path longer than PATH_MAX or a name longer than NAME_MAX (limits.h) can be unpacked nowhere.
MAX_PATH: Final = 4096
MAX_NAME: Final = 255
_BLOCK: Final = tarfile.BLOCKSIZE
# What tarfile lets out for damaged headers beside its own errors, and the counting file's error.
_FAULTS: Final = (
    InvalidData,
    tarfile.TarError,
    ValueError,
    LookupError,
    OverflowError,
    RecursionError,
)


class _Headers(io.BufferedReader):
    """The tar as tarfile sees it: only so much may be read for one entry."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(io.FileIO(descriptor, closefd=False))
        self.spent = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Read ``size`` bytes; raises InvalidData past the bound, or where no length is given."""
        if size is None or size < 0:
            raise InvalidData("an extension header has a negative size")
        self.spent += size
        if self.spent > MAX_HEADER_SIZE:
            raise InvalidData(
                f"expected at most {MAX_HEADER_SIZE} bytes of headers for one entry, got more"
            )
        return super().read(size)


def scan(descriptor: int, name: str, max_entries: int) -> Iterator[tarfile.TarInfo]:
    """Give each entry of the tar in the open file ``descriptor``; contents are skipped, not read.

    ``name`` is for messages. The descriptor stays open, its position is used. Raises InvalidData
    where the tar is damaged, cut short, or has more than ``max_entries`` entries; StorageFailure.
    """
    with refusals(name):
        if os.fstat(descriptor).st_size == 0:
            return  # as Go's archive/tar: no blocks at all are an empty archive
        os.lseek(descriptor, 0, os.SEEK_SET)
    with _Headers(descriptor) as headers:
        archive = _open(headers, name)
        # tarfile keeps every entry, some 1.5 KB each, in a list that typeshed does not know.
        members: list[tarfile.TarInfo] = vars(archive)["members"]
        before, count = -1, 0
        while (member := _next(archive, headers, name)) is not None:
            if archive.offset <= before or member.size < 0:
                raise InvalidData(
                    f"{name}: entry {quote(member.name)} has size {member.size}, and leads back to"
                    f" offset {archive.offset}"
                )
            before, count = archive.offset, count + 1
            if count > max_entries:
                raise InvalidData(f"{name}: expected at most {max_entries} entries, got more")
            if len(archive.pax_headers) > MAX_GLOBAL_RECORDS:
                raise InvalidData(
                    f"{name}: expected at most {MAX_GLOBAL_RECORDS} records in global headers,"
                    f" got {len(archive.pax_headers)}"
                )
            members.clear()
            yield member
        _check_end(descriptor, archive.offset, name)


def normalised(text: str, tar: str) -> bytes:
    """Return a name from the tar called ``tar`` as a relative path without '.', '//' and '/' at its end.

    The root is ``b""``. Raises InvalidData for a path with '..' or NUL, and for one that no file
    system takes.
    """
    raw = text.encode("utf-8", "surrogateescape")
    if len(raw) > MAX_PATH:
        raise InvalidData(f"{tar}: name {quote(raw)}: expected at most {MAX_PATH} bytes")
    parts = [part for part in raw.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise InvalidData(f"{tar}: name {quote(raw)} has a component '..'")
    if b"\0" in raw:
        raise InvalidData(f"{tar}: name {quote(raw)} has a NUL byte")
    if any(len(part) > MAX_NAME for part in parts):
        raise InvalidData(f"{tar}: name {quote(raw)} has a component of more than {MAX_NAME} bytes")
    return b"/".join(parts)


def _open(headers: _Headers, name: str) -> tarfile.TarFile:
    try:
        with refusals(name):
            return tarfile.TarFile(
                fileobj=headers, mode="r", encoding="utf-8", errors="surrogateescape"
            )
    except _FAULTS as error:
        raise _damaged(name, 0, error) from error


def _next(archive: tarfile.TarFile, headers: _Headers, name: str) -> tarfile.TarInfo | None:
    headers.spent = 0
    offset = archive.offset
    try:
        with refusals(name):
            return archive.next()
    except _FAULTS as error:
        raise _damaged(name, offset, error) from error


def _damaged(name: str, offset: int, error: Exception) -> InvalidData:
    reason = "extension headers nested too deep" if isinstance(error, RecursionError) else error
    return InvalidData(f"{name}: damaged tar: the entry at offset {offset}: {reason}")


def _check_end(descriptor: int, offset: int, name: str) -> None:
    """A tar ends with two blocks of zeros, or (Go's reader allows it) with its last entry."""
    with refusals(name):
        end = os.pread(descriptor, 2 * _BLOCK, offset)
    if end.strip(b"\0"):
        raise InvalidData(f"{name}: damaged tar: the header at offset {offset} is not one")
    if len(end) % _BLOCK:
        raise InvalidData(f"{name}: damaged tar: it ends within the block at offset {offset}")
