"""The files of an OCI image layout, in a directory or in a tar of one.

Source: OCI image specification, ``image-layout.md``.
"""

from __future__ import annotations

import errno
import os
import tarfile
from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from fusesnap.errors import ContentMismatch, InvalidData, StorageFailure
from fusesnap.images.digest import Digest
from fusesnap.images.disk import Region, open_regular, refusals
from fusesnap.images.tar_scan import normalised, scan
from fusesnap.nix.quoting import quote

# An archive of an image has some files and one a layer; of many images, thousands. All names are
# held in memory.
MAX_ARCHIVE_ENTRIES: Final = 65_536
_MAGIC: Final = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
}


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
    """``oci:DIRECTORY``. Links in it are followed: it is the user's own, and blobs are checked."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def name(self) -> str:
        """See ``LayoutFiles``."""
        return str(self._path)

    def find(self, name: str) -> Region | None:
        """See ``LayoutFiles``."""
        path = self._path / name
        try:
            descriptor = open_regular(path)
        except StorageFailure as failure:
            if failure.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            raise
        with refusals(path):
            size = os.fstat(descriptor).st_size
        return Region(descriptor, str(path), 0, size, owned=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Each region holds its own file."""


class LayoutArchive:
    """``oci-archive:FILE``: an uncompressed tar with nothing but files and directories.

    Raises InvalidData on opening for anything else: a layout has no use for links or devices, and
    a name that is there twice may be read differently by others.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = open_regular(path)
        try:
            self._refuse_compressed()
            self._regions = self._index()
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def name(self) -> str:
        """See ``LayoutFiles``."""
        return str(self._path)

    def find(self, name: str) -> Region | None:
        """See ``LayoutFiles``."""
        region = self._regions.get(name.encode())
        if region is None:
            return None
        offset, size = region
        return Region(self._descriptor, f"{self._path}: {name}", offset, size, owned=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def _refuse_compressed(self) -> None:
        with refusals(self._path):
            start = os.pread(self._descriptor, 8, 0)
        if not start:
            raise InvalidData(f"{self._path}: expected a tar of an OCI image layout, got no bytes")
        for magic, compression in _MAGIC.items():
            if start.startswith(magic):
                raise InvalidData(
                    f"{self._path}: expected an uncompressed tar, got a file compressed with"
                    f" {compression}; decompress it first"
                )

    def _index(self) -> dict[bytes, tuple[int, int]]:
        regions: dict[bytes, tuple[int, int]] = {}
        for member in scan(self._descriptor, self.name, MAX_ARCHIVE_ENTRIES):
            name = normalised(member.name, self.name)
            if member.isdir():
                continue
            self._check(member, name, regions)
            regions[name] = (member.offset_data, member.size)
        return regions

    def _check(
        self, member: tarfile.TarInfo, name: bytes, regions: dict[bytes, tuple[int, int]]
    ) -> None:
        if not member.isreg() or member.issparse():
            raise InvalidData(
                f"{self._path}: entry {quote(name)} of type {member.type!r}: expected plain files"
                " and directories only"
            )
        if name in regions:
            raise InvalidData(f"{self._path}: entry {quote(name)} is there twice")


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
