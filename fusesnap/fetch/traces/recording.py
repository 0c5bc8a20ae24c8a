"""One start that is being recorded.

A recording is told what reaches us, and by whom; what reaches us is not all that is read:

* What the kernel has in its page cache or finds in the local store does not. So the recording is told at its beginning
  which paths that may be true of, and says so in its trace.
* The kernel names a process when a file is looked up or opened, not when it is read. So what is read of a file counts
  for whoever opened it; where that were several, for each of them.
* A process is known by its container's root. One that is gone before it could be looked at, or that prepares the
  container from outside, is taken for part of the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from fusesnap.errors import InvalidData
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.hash import Hash
from fusesnap.nix.startup_trace import (
    BLOCK,
    Circumstances,
    Ending,
    Flaw,
    Lack,
    StartupTrace,
    TraceBuilder,
    merge_traces,
)
from fusesnap.nix.store_path import StorePath
from fusesnap.nix.tree import EntryKind, Tree

_SHIFT: Final = BLOCK.bit_length() - 1


@dataclass(frozen=True, slots=True)
class Start:
    """A container that is about to start.

    ``key`` names it among all that are there; ``upper`` is the upper directory of its root, by which its processes are
    known, or ``None`` where nobody else reads. ``paths`` are the store paths that it shows, ``closure`` their name, and
    ``lazy`` those of them whose reads reach us.
    """

    key: str
    upper: str | None
    closure: ClosureDigest
    paths: frozenset[StorePath]
    lazy: frozenset[StorePath]


@dataclass(frozen=True, slots=True)
class Conditions:
    """``recorded`` in seconds since 1970; ``version`` is ours; ``readahead`` the kernel's, in bytes.

    ``lacks``: the paths of which something may be read without us.
    """

    recorded: int
    version: str
    readahead: int
    lacks: Mapping[StorePath, Lack]


class RecordedFile:
    """An entry of a path, and which blocks of it were read. ``openers`` are threads, ``None`` where unknown."""

    __slots__ = ("blocks", "entry", "name", "openers", "ordinal", "path", "recording", "size")

    def __init__(self, recording: Recording, path: StorePath, ordinal: int, entry: int) -> None:
        self.recording = recording
        self.path = path
        self.ordinal = ordinal
        self.entry = entry
        self.name: bytes | None = None
        self.size: int | None = None
        self.openers: set[int | None] = set()
        self.blocks: set[int] = set()

    def read(self, offset: int, size: int) -> None:
        """``size`` bytes from ``offset`` were asked for. It is called for every read: mostly there is nothing new."""
        first, last = offset >> _SHIFT, offset + size - 1 >> _SHIFT
        known = self.blocks
        if first in known and (last == first or (last == first + 1 and last in known)):
            return
        for block in range(first, last + 1):
            if block not in known:
                known.add(block)
                self.recording.note_block(self, block)


@dataclass(frozen=True, slots=True)
class Draft:
    """What was recorded so far, as it was at one moment: a trace is made of it in a thread."""

    start: Start
    circumstances: Circumstances
    paths: tuple[tuple[StorePath, int], ...]
    files: tuple[RecordedFile, ...]
    reads: tuple[tuple[RecordedFile, int], ...]
    earlier: StartupTrace | None

    def trace(
        self,
        nar_hash: Callable[[int], Hash | None],
        tree: Callable[[StorePath], Tree | None],
    ) -> StartupTrace:
        """The trace. Blocking: ``nar_hash`` asks a database by ordinal, ``tree`` reads a directory.

        Raises :class:`InvalidData` where it cannot be one, and what the two raise.
        """
        builder = TraceBuilder()
        ordinals = dict(self.paths)
        hashes = {path: nar_hash(ordinal) for path, ordinal in ordinals.items()}
        sizes: dict[RecordedFile, tuple[int, int]] = {}

        def add_path(path: StorePath) -> int | None:
            found = hashes.get(path)
            return None if found is None else builder.path(path, found)

        def add_file(file: RecordedFile) -> None:
            path = add_path(file.path) if ordinals.get(file.path) == file.ordinal else None
            named = None if path is None else _named(file, tree)
            if path is not None and named is not None:
                sizes[file] = (builder.file(path, file.entry, named[0], named[1]), named[0])

        for path, _ in self.paths:
            add_path(path)
        for file in self.files:
            add_file(file)
        for file, block in self.reads:
            if file in sizes:
                number, size = sizes[file]
                builder.read(number, block << _SHIFT, BLOCK, size)
        return self._with_earlier(builder.trace(self.start.closure, self.circumstances))

    def _with_earlier(self, trace: StartupTrace) -> StartupTrace:
        if self.earlier is None:
            return trace
        try:
            merged = merge_traces([self.earlier, trace])
        except InvalidData:  # a path has become another NAR meanwhile: what is newer counts
            return trace
        return replace(merged, circumstances=self.circumstances)


class Recording:
    """What a start has read so far. ``clock`` is a monotonic one in seconds.

    ``earlier`` is what another process had recorded of it, up to its own end.
    """

    def __init__(
        self,
        start: Start,
        conditions: Conditions,
        clock: Callable[[], float],
        earlier: StartupTrace | None = None,
    ) -> None:
        self.start = start
        self._conditions = conditions
        self._clock = clock
        self._earlier = earlier
        self._paths: dict[StorePath, int] = {}
        self._accessors: dict[StorePath, set[int | None]] = {}
        self._files: dict[tuple[int, int], RecordedFile] = {}
        self._reads: list[tuple[RecordedFile, int]] = []
        self._readers: set[int | None] = set()
        self._doubtful: set[int] = set()
        self._shared = False
        self._seen = False
        self.began: float | None = clock() if earlier is not None else None
        self.newest = clock()
        self.interrupted = False
        self.changed = False

    @property
    def continued(self) -> bool:
        """Whether another process has recorded the beginning."""
        return self._earlier is not None

    @property
    def blocks(self) -> int:
        """How many blocks were read."""
        return len(self._reads) + (self._earlier.size >> _SHIFT if self._earlier else 0)

    def accessed(self, path: StorePath, ordinal: int, pid: int | None) -> None:
        """Something of ``path`` is asked for."""
        accessors = self._accessors.get(path)
        if accessors is None or self._paths[path] != ordinal:
            self._paths[path] = ordinal
            accessors = self._accessors.setdefault(path, set())
            self._note()
        accessors.add(pid)
        self._readers.add(pid)

    def opened(
        self, path: StorePath, ordinal: int, tree: Tree | None, entry: int, pid: int | None
    ) -> RecordedFile | None:
        """``pid`` opens an entry of ``path``; ``tree`` where it is known. ``None`` if nothing can be read of it."""
        if tree is not None and tree.kind(entry) is not EntryKind.REGULAR:
            return None
        file = self._files.get((ordinal, entry))
        if file is None:
            self.accessed(path, ordinal, pid)
            file = self._files[ordinal, entry] = RecordedFile(self, path, ordinal, entry)
            self._note()
        if file.name is None and tree is not None:
            file.name, file.size = tree.path(entry), tree.entries[entry].size
        file.openers.add(pid)
        self._readers.add(pid)
        return file

    def note_block(self, file: RecordedFile, block: int) -> None:
        """A block is read for the first time."""
        self._reads.append((file, block))
        self._note()

    def share(self) -> None:
        """Somebody else reads what belongs to this closure."""
        self._shared = True
        self.changed = True

    def doubt(self, pid: int) -> None:
        """``pid`` could belong to another start as well."""
        self._doubtful.add(pid)

    def own(self, pid: int) -> None:
        """``pid`` belongs to this start."""
        self._doubtful.discard(pid)
        self._seen = True

    @property
    def credible(self) -> bool:
        """Whether it is about this container: not if others were starting, and none of its processes was ever seen."""
        return self._seen or not self._doubtful

    def knows(self, pid: int) -> bool:
        """Whether anything was counted that ``pid`` did."""
        return pid in self._readers

    def disown(self, pid: int) -> None:
        """``pid`` turned out to be of another container: what it alone has read is not of this start."""
        self._doubtful.discard(pid)
        self._readers.discard(pid)
        self.share()
        for path, accessors in list(self._accessors.items()):
            accessors.discard(pid)
            if not accessors:
                del self._accessors[path], self._paths[path]
        for key, file in list(self._files.items()):
            file.openers.discard(pid)
            if not file.openers:
                del self._files[key]

    def has_file(self, file: RecordedFile) -> bool:
        """Whether ``file`` still counts."""
        return self._files.get((file.ordinal, file.entry)) is file

    def draft(self, ended: Ending) -> Draft:
        """What there is now."""
        flaws = {Flaw.INTERRUPTED: self.interrupted, Flaw.SHARED: self._shared or self._doubtful}
        if self._earlier is not None:
            flaws |= dict.fromkeys(self._earlier.circumstances.flaws, True)
        conditions = self._conditions
        return Draft(
            self.start,
            Circumstances(
                conditions.recorded,
                conditions.version,
                1,
                conditions.readahead,
                ended,
                frozenset(flaw for flaw, there in flaws.items() if there),
                tuple(sorted(conditions.lacks.items())),
            ),
            tuple(self._paths.items()),
            tuple(self._files.values()),
            tuple(self._reads),
            self._earlier,
        )

    def _note(self) -> None:
        self.newest = self._clock()
        self.began = self.newest if self.began is None else self.began
        self.changed = True


def lacking(start: Start, cached: Iterable[StorePath]) -> Mapping[StorePath, Lack]:
    """What the recording of ``start`` lacks, if parts of ``cached`` may be in the kernel's page cache."""
    there = dict.fromkeys(start.paths - start.lazy, Lack.COMMITTED)
    return dict.fromkeys(cached, Lack.CACHED) | there


def _named(
    file: RecordedFile, tree: Callable[[StorePath], Tree | None]
) -> tuple[int, bytes] | None:
    """Size and name of a file; of one that was open before we came, its path's tree has to be looked at."""
    if file.name is not None and file.size is not None:
        return file.size, file.name
    found = tree(file.path)
    if found is None or file.entry >= len(found) or found.kind(file.entry) is not EntryKind.REGULAR:
        return None
    return found.entries[file.entry].size, found.path(file.entry)
