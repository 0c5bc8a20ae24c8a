"""The tree of a NAR, kept compact: names, kinds, sizes and offsets, without contents.

An entry's index is its position in NAR order (pre-order, names sorted by their bytes), so it is the
same wherever the tree came from; inode numbers are made of it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import Final, overload

from fusesnap.errors import InvalidData
from fusesnap.nix.nar import (
    DirectoryEnd,
    DirectoryStart,
    FileData,
    FileEnd,
    NarEnd,
    NarEvent,
    RegularFile,
    Symlink,
)
from fusesnap.nix.quoting import quote

# When everything in a store was last modified: one second after the epoch, as Nix has it, and a nanosecond. Nix looks
# at the second alone; containerd's walking differ compares the contents of two files where neither time has
# nanoseconds (``sameFile`` in ``fs/path.go`` of containerd/continuity), and would read, and fetch, all there is.
STORE_MTIME_NS: Final = 1_000_000_001


class EntryKind(Enum):
    """What a NAR can hold."""

    DIRECTORY = 0
    REGULAR = 1
    SYMLINK = 2


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a tree.

    ``parent`` is the index of the directory that it is in; the root is its own. ``size`` is in
    bytes: of the contents, of the target, or 0 for a directory. ``target`` is empty unless it is a
    link. ``offset`` is where a file's contents begin in the NAR, 0 for everything else.
    """

    kind: EntryKind
    name: bytes
    parent: int
    size: int
    executable: bool
    target: bytes
    offset: int


class _Columns:
    """A tree as columns.

    Some 40 bytes an entry and its name, where objects would take ten times that.
    """

    __slots__ = (
        "executable",
        "kinds",
        "name_ends",
        "names",
        "offsets",
        "parents",
        "sizes",
        "targets",
    )

    def __init__(self) -> None:
        self.kinds = bytearray()
        self.executable = bytearray()
        self.parents = array("I")
        self.sizes = array("Q")
        self.offsets = array("Q")  # for a link: where its target begins in ``targets``
        self.names = bytearray()
        self.name_ends = array("Q", (0,))  # name i lies between the ends i and i + 1
        self.targets = bytearray()

    def append(self, kind: EntryKind, name: bytes, parent: int, size: int, offset: int) -> None:
        self.kinds.append(kind.value)
        self.executable.append(0)
        self.parents.append(parent)
        self.sizes.append(size)
        self.offsets.append(offset)
        self.names += name
        self.name_ends.append(len(self.names))

    def name(self, index: int) -> bytes:
        return bytes(self.names[self.name_ends[index] : self.name_ends[index + 1]])

    def target(self, index: int) -> bytes:
        start = self.offsets[index]
        return bytes(self.targets[start : start + self.sizes[index]])


class _Entries(Sequence[Entry]):
    """Entries made as they are asked for."""

    __slots__ = ("_columns",)

    def __init__(self, columns: _Columns) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns.kinds)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> list[Entry]: ...
    def __getitem__(self, index: int | slice) -> Entry | list[Entry]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._entry(range(len(self))[index])

    def __iter__(self) -> Iterator[Entry]:
        return map(self._entry, range(len(self)))

    def _entry(self, index: int) -> Entry:
        columns = self._columns
        kind = EntryKind(columns.kinds[index])
        link = kind is EntryKind.SYMLINK
        return Entry(
            kind,
            columns.name(index),
            columns.parents[index],
            columns.sizes[index],
            bool(columns.executable[index]),
            columns.target(index) if link else b"",
            0 if link else columns.offsets[index],
        )


class Tree:
    """An immutable tree; made by :class:`TreeBuilder`.

    An index out of range raises :class:`IndexError`.
    """

    __slots__ = ("_children", "_columns", "_first_child", "entries")

    entries: Sequence[Entry]  # in NAR order; index 0 is the root

    def __init__(self, columns: _Columns) -> None:
        self._columns = columns
        self.entries = _Entries(columns)
        self._first_child, self._children = _group_by_parent(columns.parents)

    def __len__(self) -> int:
        return len(self._columns.kinds)

    def kind(self, index: int) -> EntryKind:
        """Return what entry ``index`` is, without making the whole :class:`Entry`."""
        return EntryKind(self._columns.kinds[index])

    def files(self) -> Iterator[tuple[int, int]]:
        """Where the contents of each regular file begin in the NAR, and how many bytes they have; in NAR order."""
        columns, regular = self._columns, EntryKind.REGULAR.value
        for kind, offset, size in zip(columns.kinds, columns.offsets, columns.sizes, strict=True):
            if kind == regular:
                yield offset, size

    @property
    def may_have_programs(self) -> bool:
        """Whether a file may be a program or a library."""
        return any(self._columns.executable) or b".so" in self._columns.names

    def child(self, index: int, name: bytes) -> int | None:
        """Return the index of the entry ``name`` of directory ``index``, if it has one."""
        children = self.children(index)
        place = bisect_left(children, name, key=self._columns.name)
        if place < len(children) and self._columns.name(children[place]) == name:
            return children[place]
        return None

    def children(self, index: int) -> Sequence[int]:
        """Return the indices of the entries of directory ``index`` in the order of their names.

        Empty for what is no directory.
        """
        return self._children[self._first_child[index] : self._first_child[index + 1]]

    def path(self, index: int) -> bytes:
        """Return the path of entry ``index`` relative to the root, whose own is empty."""
        names = []
        while index:
            names.append(self._columns.name(index))
            index = self._columns.parents[index]
        return b"/".join(reversed(names))

    def link_target(self, index: int) -> bytes:
        """Return the target of link ``index``, empty for what is no link."""
        return self._columns.target(index) if self.kind(index) is EntryKind.SYMLINK else b""


def _group_by_parent(parents: Sequence[int]) -> tuple[array[int], memoryview[int]]:
    """Return where each entry's children begin among all children, and the children.

    NAR order is name order within a directory, so filling in NAR order leaves each group sorted.
    """
    counts = array("I", bytes(4 * len(parents)))
    for parent in parents[1:]:
        counts[parent] += 1
    first = array("I", accumulate(counts, initial=0))
    place = array("I", first)
    children = array("I", bytes(4 * (len(parents) - 1)))
    for index, parent in enumerate(parents[1:], 1):
        children[place[parent]] = index
        place[parent] += 1
    return first, memoryview(children)


class TreeBuilder:
    """Builds a :class:`Tree` from the events of one NAR."""

    __slots__ = ("_columns", "_complete", "_last", "_open")

    def __init__(self) -> None:
        self._columns = _Columns()
        self._open: list[int] = []  # the directories that are open
        self._last: list[bytes] = []  # the last name seen in each of them
        self._complete = False

    def receive(self, event: NarEvent) -> None:
        """Take the next event.

        Raises :class:`InvalidData` where a directory's names are not sorted and unique.
        """
        match event:
            case FileData() | FileEnd():
                pass
            case RegularFile(name, size, executable, offset):
                self._append(EntryKind.REGULAR, name, size, offset)
                self._columns.executable[-1] = executable
            case DirectoryStart(name):
                self._open.append(self._append(EntryKind.DIRECTORY, name))
                self._last.append(b"")
            case DirectoryEnd():
                self._open.pop()
                self._last.pop()
            case Symlink(name, target):
                columns = self._columns
                self._append(EntryKind.SYMLINK, name, len(target), len(columns.targets))
                columns.targets += target
            case NarEnd():
                self._complete = True

    def tree(self) -> Tree:
        """Return the tree; raises :class:`InvalidData` before :class:`NarEnd` was received."""
        if not self._complete:
            raise InvalidData("NAR: its tree was asked for before its end")
        return Tree(self._columns)

    def _append(self, kind: EntryKind, name: bytes, size: int = 0, offset: int = 0) -> int:
        index = len(self._columns.kinds)
        parent = 0
        if self._open:
            if name <= self._last[-1]:
                raise InvalidData(
                    f"NAR: {quote(name)} comes after {quote(self._last[-1])}: not sorted"
                )
            self._last[-1] = name
            parent = self._open[-1]
        elif index:
            raise InvalidData(f"NAR: {quote(name)} comes after the end of the root")
        self._columns.append(kind, name, parent, size, offset)
        return index
