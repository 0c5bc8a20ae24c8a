"""Writes the tar of a layer that holds directories, empty files and links: the same bytes for the same entries.

Source of the format: POSIX.1-2017, ``pax``, "ustar Interchange Format" and "pax Extended Header".
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from fusesnap.images.layer import FileKind

_TYPES: Final = {
    FileKind.DIRECTORY: tarfile.DIRTYPE,
    FileKind.REGULAR: tarfile.REGTYPE,
    FileKind.SYMLINK: tarfile.SYMTYPE,
}


@dataclass(frozen=True, slots=True)
class NewEntry:
    """An entry of a new layer, root's and without a time: ``path`` relative, ``mode`` the twelve permission bits.

    ``target`` is a link's. A regular file is empty. ``records`` are put into an extended header.
    """

    path: str
    kind: FileKind
    mode: int
    target: str = ""
    records: Mapping[str, str] = field(default_factory=dict)


def layer_tar(entries: Iterable[NewEntry]) -> bytes:
    """Return the uncompressed tar with ``entries`` in their order, which is to be parents first."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry in entries:
            info = tarfile.TarInfo(entry.path)
            info.type, info.mode, info.linkname = _TYPES[entry.kind], entry.mode, entry.target
            info.pax_headers = dict(entry.records)
            tar.addfile(info)
    return written.getvalue()


def directories(path: str, mode: int = 0o755) -> list[NewEntry]:
    """Return the entries of the directory ``path``, absolute or not, and of those above it."""
    parts = path.strip("/").split("/")
    return [
        NewEntry("/".join(parts[: count + 1]), FileKind.DIRECTORY, mode)
        for count in range(len(parts))
    ]
