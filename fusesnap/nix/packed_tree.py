"""A tree as few bytes: what a NAR says of it and nothing that follows from that.

Where a file's contents begin in the NAR is not written down: the spelling of a NAR leaves no choice, so it is counted,
and nobody can lie about it. What is unpacked is held to what :mod:`fusesnap.nix.nar` holds a NAR to, in the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from fusesnap.errors import InvalidData
from fusesnap.nix.nar import DirectoryEnd, DirectoryStart, NarEnd, RegularFile, Symlink
from fusesnap.nix.nar_grammar import (
    CLOSE_ENTRY,
    CLOSE_ROOT,
    DEFAULT_LIMITS,
    DIRECTORY,
    ENTRY,
    EXECUTABLE,
    MAGIC,
    MAX_FILE_SIZE,
    NODE,
    REGULAR,
    SYMLINK,
    NarLimits,
    check_name,
    check_target,
    spelled_size,
)
from fusesnap.nix.quoting import quote
from fusesnap.nix.tree import EntryKind, Tree, TreeBuilder

T = TypeVar("T")

_DIRECTORY: Final = 0
_REGULAR: Final = 1
_EXECUTABLE: Final = 2
_SYMLINK: Final = 3


@dataclass(frozen=True, slots=True)
class PackedTree:
    """A tree in NAR order (pre-order, names sorted by their bytes).

    ``kinds`` has a byte an entry: 0 directory, 1 file, 2 executable file, 3 link. ``names`` are those of all entries
    but the root, ``targets`` those of all links, each ended by a NUL. ``children`` holds how many entries each
    directory has, ``sizes`` how many bytes each file.
    """

    kinds: bytes
    names: bytes
    children: Sequence[int]
    sizes: Sequence[int]
    targets: bytes


def pack_tree(tree: Tree) -> PackedTree:
    """Write ``tree``, which is one that :class:`TreeBuilder` made."""
    kinds = bytearray()
    names, targets = [], []
    children: list[int] = []
    sizes: list[int] = []
    for index, entry in enumerate(tree.entries):
        names.append(entry.name)
        match entry.kind:
            case EntryKind.DIRECTORY:
                kinds.append(_DIRECTORY)
                children.append(len(tree.children(index)))
            case EntryKind.REGULAR:
                kinds.append(_EXECUTABLE if entry.executable else _REGULAR)
                sizes.append(entry.size)
            case EntryKind.SYMLINK:
                kinds.append(_SYMLINK)
                targets.append(entry.target)
    return PackedTree(bytes(kinds), _ended(names[1:]), children, sizes, _ended(targets))


def unpack_tree(packed: PackedTree, limits: NarLimits = DEFAULT_LIMITS) -> tuple[Tree, int]:
    """Return the tree and the size in bytes of its NAR.

    Raises :class:`InvalidData` where no NAR is of that tree.
    """
    if len(packed.kinds) > limits.max_entries:
        raise InvalidData(f"tree: more than {limits.max_entries} entries")
    return _Unpacking(packed, limits).run()


def _ended(items: list[bytes]) -> bytes:
    return b"".join(item + b"\0" for item in items)


class _Column(Generic[T]):
    """One column, read from its beginning to its end."""

    def __init__(self, what: str, items: Iterator[T]) -> None:
        self._what = what
        self._items = items

    def next(self) -> T:
        for item in self._items:
            return item
        raise InvalidData(f"tree: too few {self._what}")

    def close(self) -> None:
        for _ in self._items:
            raise InvalidData(f"tree: too many {self._what}")


def _texts(what: str, data: bytes) -> _Column[bytes]:
    if data and not data.endswith(b"\0"):
        raise InvalidData(f"tree: the last of its {what} is cut short")
    return _Column(what, iter(data.split(b"\0")[:-1]))


@dataclass(slots=True)
class _Open:
    """A directory that is being read: entries still to come, and the last one's name."""

    left: int
    last: bytes = b""


class _Unpacking:
    """Goes through the columns and counts the bytes of the NAR on the way."""

    def __init__(self, packed: PackedTree, limits: NarLimits) -> None:
        self._kinds = packed.kinds
        self._names = _texts("names", packed.names)
        self._targets = _texts("targets", packed.targets)
        self._children = _Column("counts of directories", iter(packed.children))
        self._sizes = _Column("sizes of files", iter(packed.sizes))
        self._limits = limits
        self._builder = TreeBuilder()
        self._open: list[_Open] = []
        self._position = len(MAGIC)

    def run(self) -> tuple[Tree, int]:
        if not self._kinds:
            raise InvalidData("tree: has no root")
        for index, kind in enumerate(self._kinds):
            self._entry(index, kind)
        if self._open:
            raise self._error(f"{self._open[-1].left} entries are missing")
        for column in (self._names, self._targets, self._children, self._sizes):
            column.close()
        self._builder.receive(NarEnd())
        return self._builder.tree(), self._position

    def _entry(self, index: int, kind: int) -> None:
        name = self._name() if index else b""
        match kind:
            case 0:
                self._directory(name)
            case 1 | 2:
                self._file(name, executable=kind == _EXECUTABLE)
            case 3:
                self._symlink(name)
            case _:
                raise self._error(f"kind is {kind}, expected 0 to {_SYMLINK}")

    def _name(self) -> bytes:
        if not self._open:
            raise self._error("more entries follow the end of the root")
        name = self._names.next()
        directory = self._open[-1]
        self._check(check_name, name, directory.last)
        directory.left -= 1
        directory.last = name
        self._position += len(ENTRY) + spelled_size(len(name)) + len(NODE)
        return name

    def _directory(self, name: bytes) -> None:
        if len(self._open) >= self._limits.max_depth:
            raise self._error(f"nested deeper than {self._limits.max_depth} directories")
        self._position += len(DIRECTORY)
        self._builder.receive(DirectoryStart(name))
        self._open.append(_Open(self._children.next()))
        self._close_directories()

    def _file(self, name: bytes, *, executable: bool) -> None:
        size = self._sizes.next()
        if size > MAX_FILE_SIZE:
            raise self._error(f"file of {size} bytes, expected at most {MAX_FILE_SIZE}")
        self._position += len(EXECUTABLE if executable else REGULAR) + 8
        self._builder.receive(RegularFile(name, size, executable, self._position))
        self._position += size + -size % 8
        self._close_object()

    def _symlink(self, name: bytes) -> None:
        target = self._targets.next()
        self._check(check_target, target)
        self._position += len(SYMLINK) + spelled_size(len(target))
        self._builder.receive(Symlink(name, target))
        self._close_object()

    def _close_object(self) -> None:
        self._position += len(CLOSE_ENTRY if self._open else CLOSE_ROOT)
        self._close_directories()

    def _close_directories(self) -> None:
        while self._open and not self._open[-1].left:
            self._open.pop()
            self._builder.receive(DirectoryEnd())
            self._position += len(CLOSE_ENTRY if self._open else CLOSE_ROOT)

    def _check(self, check: Callable[..., None], *arguments: bytes) -> None:
        try:
            check(*arguments)
        except InvalidData as error:
            raise self._error(str(error)) from None

    def _error(self, what: str) -> InvalidData:
        path = b"/".join(directory.last for directory in self._open if directory.last)
        where = f" near {quote(path)}" if path else ""
        return InvalidData(f"tree{where}: {what}")
