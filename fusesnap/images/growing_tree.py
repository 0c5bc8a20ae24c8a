"""The tree of an image while its layers are being merged."""

from __future__ import annotations

import stat
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Final

from fusesnap.errors import InvalidData
from fusesnap.images.file_table import FileTable
from fusesnap.nix.quoting import quote

MAX_LINKS: Final = 40  # as many symbolic links as Linux follows in one path (MAXSYMLINKS)


@dataclass(slots=True)
class Directory:
    """What is in a directory: rows of the table by name. It has one name itself, in ``parent``."""

    parent: int
    name: bytes
    names: dict[bytes, int] = field(default_factory=dict)


class GrowingTree:
    """Names over rows of a :class:`FileTable`; the root is :attr:`root`.

    ``hidden`` and ``opaque`` keep, by a directory's row, what whiteouts hid in it.
    """

    def __init__(self) -> None:
        self.table = FileTable()
        self.root = self.table.add_implied()
        self.directories = {self.root: Directory(self.root, b"")}
        self.hidden: dict[int, set[bytes]] = {}
        self.opaque: set[int] = set()

    def get(self, directory: int, name: bytes) -> int | None:
        """Return the row of ``name``; None if there is none."""
        return self.directories[directory].names.get(name)

    def put(self, directory: int, name: bytes, row: int) -> None:
        """Name ``row`` in a directory; nothing may have that name yet."""
        self.directories[directory].names[name] = row
        if self.table.is_directory(row):
            self.directories[row] = Directory(directory, name)

    def imply(self, directory: int, name: bytes) -> int:
        """Make a directory that no layer declares."""
        row = self.table.add_implied()
        self.put(directory, name, row)
        return row

    def remove(self, directory: int, name: bytes) -> None:
        """Take ``name`` away, and all that is below it."""
        doomed = [self.directories[directory].names.pop(name)]
        while doomed:
            row = doomed.pop()
            gone = self.directories.pop(row, None)
            if gone is not None:
                self.hidden.pop(row, None)
                self.opaque.discard(row)
                doomed.extend(gone.names.values())

    def clear(self, directory: int) -> None:
        """Take away everything in a directory."""
        for name in list(self.directories[directory].names):
            self.remove(directory, name)

    def path(self, directory: int, name: bytes) -> bytes:
        """Return the path of ``name`` in ``directory``, from the root."""
        parts = [name]
        while directory != self.root:
            parts.append(self.directories[directory].name)
            directory = self.directories[directory].parent
        return b"/".join(reversed(parts))

    def require(self, path: bytes, where: str) -> int:
        """Return the directory at ``path``, through links, made where it is not there.

        Raises InvalidData, naming the layer as ``where``, for a path through what is no directory.
        """
        walk = _Walk(self, path, where)
        while (step := walk.next()) is not None:
            directory, name = step
            row = self.get(directory, name)
            if row is None:
                walk.here = self.imply(directory, name)
            elif not walk.enter(row):
                raise InvalidData(
                    f"{where}: {quote(path)}: expected a directory at"
                    f" {quote(self.path(directory, name))}, which is another file"
                )
        return walk.here

    def look(self, path: bytes, where: str, replaced: Set[bytes] = frozenset()) -> int | None:
        """Return the directory at ``path``, through links; None if there is none.

        A link whose own path is in ``replaced`` counts for nothing.
        """
        walk = _Walk(self, path, where)
        while (step := walk.next()) is not None:
            directory, name = step
            row = self.get(directory, name)
            if row is None or (row in self.table.targets and self.path(*step) in replaced):
                return None
            if not walk.enter(row):
                return None
        return walk.here


class _Walk:
    """A path being followed, link by link, never above the root."""

    __slots__ = ("_links", "_path", "_pending", "_tree", "_where", "here")

    def __init__(self, tree: GrowingTree, path: bytes, where: str) -> None:
        self._tree = tree
        self._path = path
        self._where = where
        self._pending = path.split(b"/")[::-1]
        self._links = 0
        self.here = tree.root

    def next(self) -> tuple[int, bytes] | None:
        """Return the directory and the name to look up in it; None at the end."""
        while self._pending:
            name = self._pending.pop()
            if name == b"..":
                self.here = self._tree.directories[self.here].parent
            elif name not in (b"", b"."):
                return self.here, name
        return None

    def enter(self, row: int) -> bool:
        """Go into a directory or follow a link; False for anything else."""
        mode = self._tree.table.modes[row]
        if stat.S_ISDIR(mode):
            self.here = row
            return True
        if not stat.S_ISLNK(mode):
            return False
        self._links += 1
        if self._links > MAX_LINKS:
            raise InvalidData(
                f"{self._where}: {quote(self._path)}: expected at most {MAX_LINKS} symbolic links"
                " on the way, got more"
            )
        target = self._tree.table.targets[row]
        if target.startswith(b"/"):
            self.here = self._tree.root
        self._pending.extend(target.split(b"/")[::-1])
        return True
