"""The files of an OCI image layout, in a directory or in a tar of one.

Source: OCI image specification, ``image-layout.md``.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tarfile
import tempfile
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from fusesnap.errors import ContentMismatch, InvalidData, StorageFailure
from fusesnap.images.digest import Digest
from fusesnap.images.disk import (
    Progress,
    Region,
    no_progress,
    open_regular,
    refusals,
    watched,
    write_all,
)
from fusesnap.images.tar_scan import normalised, scan
from fusesnap.images.uncompressed import START, compression_of, uncompressed
from fusesnap.nix.quoting import quote

# An archive of an image has some files and one a layer; of many images, thousands. All names are
# held in memory.
MAX_ARCHIVE_ENTRIES: Final = 65_536
# A few KiB can say that they unfold to any number of bytes; the largest images in use have some 20 GiB.
MAX_ARCHIVE_SIZE: Final = 64 * 1024**3


# In Docker's archives a layer's file may have a second name, "<ID>/layer.tar", as a link to "../<ID>/layer.tar" or (of
# skopeo and podman) "../<digest>.tar".
_OTHER_NAME: Final = re.compile(rb"[0-9a-f]{64}/layer\.tar")
_LAYER_FILE: Final = re.compile(rb"\.\./([0-9a-f]{64}(?:/layer)?\.tar)")


class LayoutFiles(Protocol):
    """Read access to the files of one image layout. Use it as a context."""

    @property
    def name(self) -> str:
        """What messages call the layout."""

    def find(self, name: str) -> Region | None:
        """Open the file ``name`` ("index.json", "blobs/sha256/..."); None where there is none.

        The region is a context too. Raises StorageFailure, and InvalidData for what is no file.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class LayoutDirectory:
    """A layout in a directory. ``name`` is what messages call it, its path where None is given.

    Where ``follow``, links in it are followed: it is the user's own, and blobs are checked. In a store path
    (``follow`` false) a link could lead to any file of this machine, and is refused.
    """

    def __init__(self, path: Path, name: str | None = None, *, follow: bool = True) -> None:
        self._path = path
        self._name = name or str(path)
        self._follow = follow

    @property
    def name(self) -> str:
        """See ``LayoutFiles``."""
        return self._name

    def find(self, name: str) -> Region | None:
        """See ``LayoutFiles``."""
        path = self._path / name
        try:
            if not self._follow:
                self._refuse_links(name)
            descriptor = open_regular(path, follow=self._follow)
        except StorageFailure as failure:
            if failure.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            raise
        with refusals(path):
            size = os.fstat(descriptor).st_size
        return Region(descriptor, f"{self._name}/{name}", 0, size, owned=True)

    def _refuse_links(self, name: str) -> None:
        path = self._path
        for part in name.split("/"):
            path /= part
            with refusals(path):
                mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise InvalidData(
                    f"{self._name}: {path.relative_to(self._path)} is a link: expected plain files and"
                    " directories only"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Each region holds its own file."""


class LayoutArchive:
    """A tar with nothing but files and directories. ``name`` is what messages call it, its path where None is given.

    A compressed one is decompressed first, into a file without a name in the directory ``scratch``, and ``progress`` is
    told of it.

    Raises InvalidData on opening for anything else: a layout has no use for links or devices, and a name that is there
    twice may be read differently by others. One link is known, and followed within the tar: Docker's other name of a
    layer's file. So it does for one that needs ``scratch`` where None is given.
    """

    def __init__(
        self,
        path: Path,
        name: str | None = None,
        *,
        scratch: Path | None = None,
        follow: bool = True,
        progress: Progress = no_progress,
    ) -> None:
        self._name = name or str(path)
        self._descriptor = open_regular(path, follow=follow)
        try:
            self._decompress(scratch, progress)
            self._regions = self._index()
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def name(self) -> str:
        """See ``LayoutFiles``."""
        return self._name

    def find(self, name: str) -> Region | None:
        """See ``LayoutFiles``."""
        region = self._regions.get(name.encode())
        if region is None:
            return None
        offset, size = region
        return Region(self._descriptor, f"{self._name}: {name}", offset, size, owned=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def _decompress(self, scratch: Path | None, progress: Progress) -> None:
        with refusals(self._name):
            start = os.pread(self._descriptor, START, 0)
            size = os.fstat(self._descriptor).st_size
        if not start:
            raise InvalidData(f"{self._name}: expected a tar of an image, got no bytes")
        compression = compression_of(start)
        if compression == "none":
            return
        if scratch is None:
            raise InvalidData(
                f"{self._name}: expected an uncompressed tar, got a file compressed with"
                f" {compression}; decompress it first"
            )
        compressed = Region(self._descriptor, self._name, 0, size, owned=False)
        pieces = watched(uncompressed(compressed.pieces(), self._name), progress)
        spool = spooled(pieces, self._name, scratch)
        os.close(self._descriptor)
        self._descriptor = spool

    def _index(self) -> dict[bytes, tuple[int, int]]:
        regions: dict[bytes, tuple[int, int]] = {}
        others: dict[bytes, bytes] = {}
        for member in scan(self._descriptor, self.name, MAX_ARCHIVE_ENTRIES):
            name = normalised(member.name, self.name)
            if member.isdir():
                continue
            if member.issym() and _OTHER_NAME.fullmatch(name):
                target = _LAYER_FILE.fullmatch(member.linkname.encode("utf-8", "surrogateescape"))
                if target is not None:
                    others[name] = target[1]
                    continue
            self._check(member, name, regions)
            regions[name] = (member.offset_data, member.size)
        for name, target_name in others.items():
            if target_name in regions:
                regions.setdefault(name, regions[target_name])
        return regions

    def _check(
        self, member: tarfile.TarInfo, name: bytes, regions: dict[bytes, tuple[int, int]]
    ) -> None:
        if not member.isreg() or member.issparse():
            raise InvalidData(
                f"{self._name}: entry {quote(name)} of type {member.type!r}: expected plain files"
                " and directories only"
            )
        if name in regions:
            raise InvalidData(f"{self._name}: entry {quote(name)} is there twice")


def spooled(pieces: Iterable[bytes], name: str, scratch: Path) -> int:
    """Write ``pieces`` to a file without a name in ``scratch``, and return its descriptor.

    Raises InvalidData for more than ``MAX_ARCHIVE_SIZE`` bytes, StorageFailure.
    """
    with refusals(scratch), tempfile.TemporaryFile(dir=scratch, buffering=0) as file:
        for piece in _bounded(pieces, name):
            write_all(file.fileno(), piece)
        return os.dup(file.fileno())


def _bounded(pieces: Iterable[bytes], name: str) -> Iterator[bytes]:
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > MAX_ARCHIVE_SIZE:
            raise InvalidData(
                f"{name}: expected at most {MAX_ARCHIVE_SIZE} bytes uncompressed, got more"
            )
        yield piece


def verified(
    files: LayoutFiles, digest: Digest, size: int, what: str
) -> Generator[bytes, None, None]:
    """Stream the blob ``digest``, and raise at its end where it is not what was announced.

    ``size`` is in bytes, ``what`` says whose blob it is. Nothing may be used before the iterator
    has ended. Raises InvalidData where it is missing, ContentMismatch where size or digest differ.
    """
    region = files.find(f"blobs/{digest.algorithm}/{digest.hexadecimal}")
    if region is None:
        raise InvalidData(f"{files.name}: {what} {digest}: expected a blob, there is none")
    with region:
        if region.size != size:
            raise ContentMismatch(
                f"{files.name}: {what} {digest}: expected {size} bytes, got {region.size}"
            )
        hasher = digest.algorithm.new()
        for piece in region.pieces():
            hasher.update(piece)
            yield piece
    if hasher.hexdigest() != digest.hexadecimal:
        raise ContentMismatch(
            f"{files.name}: {what} {digest}: expected that digest, got"
            f" {digest.algorithm}:{hasher.hexdigest()}"
        )
