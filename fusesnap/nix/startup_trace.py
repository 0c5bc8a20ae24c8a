"""Startup traces: what the start of an image reads, in the order in which it first does.

``startup_trace_text`` reads and writes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from typing import Final

from fusesnap.errors import InvalidData
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.hash import Hash, HashAlgorithm
from fusesnap.nix.quoting import quote
from fusesnap.nix.signature import Signature
from fusesnap.nix.store_path import StorePath

# What a read is rounded to. Smaller pieces cost more requests than they save bytes, larger ones triple the bytes.
BLOCK: Final = 16 * 1024
# A start that reads more than a gigabyte in pieces of 16 KiB is none that a trace helps.
MAX_EXTENTS: Final = 65_536
MAX_FILES: Final = 65_536
# As many as a closure may have.
MAX_PATHS: Final = 65_536
MAX_FILE_SIZE: Final = (1 << 63) - 1
MAX_SIGNATURES: Final = 64
_VERSION: Final = re.compile(r"[\x21-\x7e]{1,64}", re.ASCII)


class Ending(StrEnum):
    """Why a recording ended."""

    IDLE = "idle"  # nothing new was read for a while
    EXIT = "exit"  # the program ended, or its container
    TIME = "time"  # it had taken as long as a start may
    SIZE = "size"  # it had read as much as a trace may have


class Lack(StrEnum):
    """Why what a start read of a path may be missing in a trace."""

    COMMITTED = "committed"  # it was in the local store, where the kernel reads it alone
    CACHED = "cached"  # the kernel may have had parts of it in its page cache


class Flaw(StrEnum):
    """What else was wrong with a recording."""

    INTERRUPTED = "interrupted"  # the process that recorded died in the middle of it
    SHARED = "shared"  # others read the same paths at the same time: some is theirs, or was read by them before


@dataclass(frozen=True, slots=True)
class TracedPath:
    """A store path, and the NAR in which entries and offsets are those of the trace."""

    path: StorePath
    nar_hash: Hash


@dataclass(frozen=True, slots=True)
class TracedFile:
    """An entry that was opened: the ``path``-th of the trace's paths, its ``entry``-th entry in NAR order.

    ``size`` of its contents is in bytes; ``name`` is relative to the store path, empty for the path itself.
    """

    path: int
    entry: int
    size: int
    name: bytes


@dataclass(frozen=True, slots=True)
class Extent:
    """``length`` bytes from ``offset`` of the ``file``-th of the trace's files.

    Both ends are multiples of ``BLOCK``, or the end of the file.
    """

    file: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Circumstances:
    """How a trace came about.

    ``recorded``: seconds since 1970; ``version``: of fusesnap; ``starts``: how many were merged; ``readahead``: of the
    kernel, in bytes, which may have read that much more than the program asked for. ``lacks`` is sorted by path.
    """

    recorded: int
    version: str
    starts: int
    readahead: int
    ended: Ending
    flaws: frozenset[Flaw] = frozenset()
    lacks: tuple[tuple[StorePath, Lack], ...] = ()

    @property
    def complete(self) -> bool:
        """Whether everything that the start read of store paths is in the trace."""
        return not self.flaws and not self.lacks


@dataclass(frozen=True, slots=True)
class StartupTrace:
    """``paths`` in the order of first access, ``files`` and ``extents`` in the order of first use.

    No block of a file comes twice, and an extent does not continue the one before it. Raises :class:`InvalidData`
    where a part is not so.
    """

    closure: ClosureDigest
    circumstances: Circumstances
    paths: tuple[TracedPath, ...]
    files: tuple[TracedFile, ...]
    extents: tuple[Extent, ...]
    signatures: tuple[Signature, ...] = ()

    def __post_init__(self) -> None:
        _check_counts(self)
        _check_circumstances(self.circumstances)
        _check_files(self)
        _check_extents(self)

    @property
    def size(self) -> int:
        """Bytes of all extents."""
        return sum(extent.length for extent in self.extents)

    def check_closure(self, closure: Iterable[StorePath]) -> None:
        """Raise :class:`InvalidData`, naming one, if there are paths that do not belong to ``closure``.

        A trace says what to fetch: it must not make a node fetch what its image does not name.
        """
        members = set(closure)
        for traced in self.paths:
            if traced.path not in members:
                raise InvalidData(
                    f"startup trace of {self.closure}: {traced.path} does not belong to the closure"
                )


class TraceBuilder:
    """Puts a trace together from what was read, in its order; a block counts the first time."""

    def __init__(self) -> None:
        self._paths: dict[StorePath, tuple[int, TracedPath]] = {}
        self._files: dict[tuple[int, int], tuple[int, TracedFile]] = {}
        self._blocks: set[tuple[int, int]] = set()
        self._extents: list[Extent] = []

    def path(self, path: StorePath, nar_hash: Hash) -> int:
        """The number of a path. Raises :class:`InvalidData` if it is there with another NAR."""
        index, known = self._paths.setdefault(path, (len(self._paths), TracedPath(path, nar_hash)))
        if known.nar_hash != nar_hash:
            raise InvalidData(
                f"startup trace: {path} is there as {known.nar_hash}, and as {nar_hash}"
            )
        return index

    def file(self, path: int, entry: int, size: int, name: bytes) -> int:
        """The number of an entry of the ``path``-th path."""
        file = TracedFile(path, entry, size, name)
        index, known = self._files.setdefault((path, entry), (len(self._files), file))
        if known != file:
            raise InvalidData(
                f"startup trace: entry {entry} is {quote(known.name)} of {known.size} bytes,"
                f" and {quote(name)} of {size}"
            )
        return index

    def read(self, file: int, offset: int, length: int, size: int) -> None:
        """Bytes of the ``file``-th file, which has ``size``: rounded to blocks, without what is there already."""
        end = min(offset + length, size)
        for block in range(offset // BLOCK, -(-end // BLOCK)):
            if (file, block) in self._blocks:
                continue
            self._blocks.add((file, block))
            start = block * BLOCK
            self._add(Extent(file, start, min(BLOCK, size - start)))

    def trace(self, closure: ClosureDigest, circumstances: Circumstances) -> StartupTrace:
        """What was put together. Raises :class:`InvalidData`, also where there is more than a trace may hold."""
        return StartupTrace(
            closure,
            circumstances,
            tuple(path for _, path in self._paths.values()),
            tuple(file for _, file in self._files.values()),
            tuple(self._extents),
        )

    def _add(self, extent: Extent) -> None:
        last = self._extents[-1] if self._extents else None
        if last is not None and _continues(last, extent):
            self._extents[-1] = replace(last, length=last.length + extent.length)
        else:
            self._extents.append(extent)


def merge_traces(traces: Iterable[StartupTrace]) -> StartupTrace:
    """Several starts of one closure as one: what the first read in its order, then what the next read besides.

    It lacks what all of them lack. Signatures are not kept. Raises :class:`InvalidData` where there is no trace, where
    they are of different closures, or where a path is not the same NAR in all.
    """
    merged = list(traces)
    if not merged:
        raise InvalidData("startup trace: none to merge")
    builder = TraceBuilder()
    for trace in merged:
        if trace.closure != merged[0].closure:
            raise InvalidData(
                f"startup trace of {trace.closure}: cannot be merged with one of {merged[0].closure}"
            )
        numbers = [builder.path(traced.path, traced.nar_hash) for traced in trace.paths]
        files = [
            builder.file(numbers[file.path], file.entry, file.size, file.name)
            for file in trace.files
        ]
        for extent in trace.extents:
            size = trace.files[extent.file].size
            builder.read(files[extent.file], extent.offset, extent.length, size)
    return builder.trace(merged[0].closure, _merged_circumstances(merged))


def _merged_circumstances(traces: list[StartupTrace]) -> Circumstances:
    all_of_them = [trace.circumstances for trace in traces]
    newest = max(all_of_them, key=lambda each: each.recorded)
    lacks = set.intersection(*({path for path, _ in each.lacks} for each in all_of_them))
    why = {path: lack for each in all_of_them for path, lack in each.lacks if path in lacks}
    return replace(
        newest,
        starts=min(sum(each.starts for each in all_of_them), MAX_EXTENTS),
        readahead=max(each.readahead for each in all_of_them),
        flaws=frozenset.intersection(*(each.flaws for each in all_of_them)),
        lacks=tuple(sorted(why.items())),
    )


def _continues(last: Extent, extent: Extent) -> bool:
    return extent.file == last.file and extent.offset == last.offset + last.length


def _check_counts(trace: StartupTrace) -> None:
    for what, count, most in (
        ("paths", len(trace.paths), MAX_PATHS),
        ("files", len(trace.files), MAX_FILES),
        ("extents", len(trace.extents), MAX_EXTENTS),
        ("lacking paths", len(trace.circumstances.lacks), MAX_PATHS),
        ("signatures", len(trace.signatures), MAX_SIGNATURES),
    ):
        if count > most:
            raise InvalidData(f"startup trace: {count} {what}, expected at most {most}")


def _check_circumstances(said: Circumstances) -> None:
    for what, number, least, most in (
        ("Recorded", said.recorded, 0, (1 << 53) - 1),
        ("Starts", said.starts, 1, MAX_EXTENTS),
        ("Readahead", said.readahead, 0, 1 << 30),
    ):
        if not least <= number <= most:
            raise InvalidData(
                f"startup trace: field {what} is {number}, expected {least} to {most}"
            )
    if not _VERSION.fullmatch(said.version):
        raise InvalidData(f"startup trace: field Version is {quote(said.version)}")
    if any(first >= second for (first, _), (second, _) in pairwise(said.lacks)):
        raise InvalidData("startup trace: field Lacks: paths are not sorted and unique")


def _check_files(trace: StartupTrace) -> None:
    if len({traced.path for traced in trace.paths}) != len(trace.paths):
        raise InvalidData("startup trace: a path is listed twice")
    for traced in trace.paths:
        if traced.nar_hash.algorithm is not HashAlgorithm.SHA256:
            raise InvalidData(f"startup trace: {traced.path}: {traced.nar_hash} is not a SHA-256")
    if len({(file.path, file.entry) for file in trace.files}) != len(trace.files):
        raise InvalidData("startup trace: a file is listed twice")
    for file in trace.files:
        _check_file(file, len(trace.paths))


def _check_file(file: TracedFile, paths: int) -> None:
    if not 0 <= file.path < paths:
        raise InvalidData(f"startup trace: file of path {file.path}, there are {paths}")
    if not (0 <= file.entry <= MAX_FILE_SIZE and 0 <= file.size <= MAX_FILE_SIZE):
        raise InvalidData(f"startup trace: entry {file.entry} of {file.size} bytes is out of range")
    names = file.name.split(b"/") if file.name else []
    if any(name in (b"", b".", b"..") or b"\0" in name for name in names):
        raise InvalidData(f"startup trace: {quote(file.name)} is no name within a store path")
    if bool(names) != bool(file.entry):
        raise InvalidData(f"startup trace: entry {file.entry} cannot be {quote(file.name)}")


def _check_extents(trace: StartupTrace) -> None:
    seen: dict[int, list[tuple[int, int]]] = {}
    last: Extent | None = None
    for extent in trace.extents:
        if not 0 <= extent.file < len(trace.files):
            raise InvalidData(f"startup trace: extent of file {extent.file}, which is not there")
        size, end = trace.files[extent.file].size, extent.offset + extent.length
        if extent.offset < 0 or extent.length <= 0 or end > size:
            raise InvalidData(
                f"startup trace: {extent.length} bytes from {extent.offset} of a file of {size}"
            )
        if extent.offset % BLOCK or (end % BLOCK and end != size):
            raise InvalidData(
                f"startup trace: {extent.length} bytes from {extent.offset} are not whole blocks of {BLOCK}"
            )
        if last is not None and _continues(last, extent):
            raise InvalidData(f"startup trace: two extents that are one, at {extent.offset}")
        seen.setdefault(extent.file, []).append((extent.offset, end))
        last = extent
    for pieces in seen.values():
        for (_, end), (start, _) in pairwise(sorted(pieces)):
            if start < end:
                raise InvalidData(f"startup trace: the block at {start} comes twice")
