"""From what a startup trace says that a start reads to the bytes of NARs that a bundle carries."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fusesnap.errors import ContentMismatch, InvalidData
from fusesnap.nix.hash import Hash, HashAlgorithm
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.quoting import quote
from fusesnap.nix.startup_bundle import (
    MAX_CONTENT_SIZE,
    MAX_EXTENT_SIZE,
    MAX_EXTENTS,
    BundledExtent,
)
from fusesnap.nix.startup_trace import StartupTrace, TracedFile
from fusesnap.nix.store_path import StorePath
from fusesnap.nix.tree import EntryKind, Tree

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Part:
    """``size`` bytes from ``offset`` of the NAR of ``path``."""

    path: StorePath
    offset: int
    size: int

    @classmethod
    def of(cls, extent: BundledExtent) -> Part:
        """Where an extent is, without what it hashes to."""
        return cls(extent.path, extent.offset, extent.size)

    @property
    def end(self) -> int:
        """Where it ends in the NAR."""
        return self.offset + self.size

    def extent(self, data: bytes) -> BundledExtent:
        """The extent that it is, whose bytes are ``data``."""
        return BundledExtent(self.path, self.offset, self.size, hashlib.sha256(data).digest())


def whole(info: NarInfo) -> list[Part]:
    """All of a NAR, in parts no larger than an extent may be; nothing of one that is more than a bundle holds."""
    if info.nar_size > MAX_CONTENT_SIZE:
        return []
    return list(_pieces(Part(info.store_path, 0, info.nar_size)))


def parts_of(
    trace: StartupTrace, trees: Mapping[StorePath, Tree], first: Sequence[Part] = ()
) -> list[Part]:
    """The parts of NARs that ``trace`` has read, in its order, each no larger than an extent may be, behind ``first``.

    ``trees`` are those of its paths. What is more than a bundle holds is left out, and told in the log. Raises
    :class:`InvalidData` where a file of the trace is not one of the tree.
    """
    begins = [_begin(trace, file, trees) for file in trace.files]
    parts = list(first)
    left = MAX_CONTENT_SIZE - sum(part.size for part in parts)
    for extent in trace.extents:
        path = trace.paths[trace.files[extent.file].path].path
        start = begins[extent.file] + extent.offset
        for part in _pieces(Part(path, start, extent.length)):
            if part.size > left or len(parts) == MAX_EXTENTS:
                log.warning(
                    "the start of closure %s reads %d bytes: its bundle has the first %d of them",
                    trace.closure,
                    trace.size,
                    MAX_CONTENT_SIZE - left,
                )
                return parts
            parts.append(part)
            left -= part.size
    return parts


def check_nars(trace: StartupTrace, narinfos: Mapping[StorePath, NarInfo]) -> None:
    """Raise :class:`InvalidData` where a path of ``trace`` is not among ``narinfos`` with the same NAR."""
    trace.check_closure(narinfos)
    for traced in trace.paths:
        has = narinfos[traced.path].nar_hash
        if traced.nar_hash != has:
            raise InvalidData(
                f"startup trace of {trace.closure}: {traced.path} has the NAR {traced.nar_hash} there,"
                f" and {has} in the cache: record the start of what is published"
            )


def contents_of(pieces: Iterable[bytes], parts: Sequence[Part], info: NarInfo) -> list[bytes]:
    """The bytes of ``parts`` of the NAR of ``info``, which comes in ``pieces``; it is read to its end and hashed.

    Raises :class:`ContentMismatch` where it is another.
    """
    digest, size = hashlib.sha256(), 0
    order = sorted(range(len(parts)), key=lambda number: parts[number].offset)
    found = [bytearray() for _ in parts]
    for piece in pieces:
        digest.update(piece)
        end = size + len(piece)
        while order and parts[order[0]].end <= size:
            order.pop(0)
        for number in order:
            part = parts[number]
            if part.offset >= end:
                break
            found[number] += piece[max(0, part.offset - size) : max(0, part.end - size)]
        size = end
    nar_hash = Hash(HashAlgorithm.SHA256, digest.digest())
    if (nar_hash, size) != (info.nar_hash, info.nar_size):
        raise ContentMismatch(
            f"{info.store_path}: its NAR has {size} bytes and hashes to {nar_hash}, the cache has"
            f" {info.nar_size} and {info.nar_hash}"
        )
    return [bytes(data) for data in found]


def _begin(trace: StartupTrace, file: TracedFile, trees: Mapping[StorePath, Tree]) -> int:
    """Where a file begins in its NAR."""
    path = trace.paths[file.path].path
    entries = trees[path].entries
    if file.entry < len(entries):
        entry = entries[file.entry]
        if entry.kind is EntryKind.REGULAR and entry.size == file.size:
            return entry.offset
    raise InvalidData(
        f"startup trace of {trace.closure}: {path}: entry {file.entry}, {quote(file.name)}, is no file"
        f" of {file.size} bytes in its NAR"
    )


def _pieces(part: Part) -> Iterator[Part]:
    for start in range(part.offset, part.end, MAX_EXTENT_SIZE):
        yield Part(part.path, start, min(MAX_EXTENT_SIZE, part.end - start))
