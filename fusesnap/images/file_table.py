"""The files of an image as columns: some 45 bytes a file, where objects would take ten times that."""

from __future__ import annotations

import stat
from array import array
from collections.abc import Sequence
from typing import Final

from fusesnap.images.layer import FileKind, LayerEntry, Segments, Xattrs

# In the column of layers: a directory that no layer has an entry for.
_IMPLIED: Final = -1
_IMPLIED_MODE: Final = FileKind.DIRECTORY | 0o755


class FileTable:
    """Rows of metadata; a row's number is the file's identity, shared by its hard links.

    ``modes`` have kind and permissions, ``mtimes`` are in nanoseconds, ``sizes`` and ``offsets`` in
    bytes. What few files have is kept beside the columns.
    """

    __slots__ = (
        "_layers",
        "gids",
        "modes",
        "mtimes",
        "offsets",
        "rdevs",
        "segments",
        "sizes",
        "targets",
        "uids",
        "xattrs",
    )

    def __init__(self) -> None:
        self.modes = array("H")
        self.uids = array("I")
        self.gids = array("I")
        self.mtimes = array("q")
        self.sizes = array("Q")
        self.offsets = array("Q")
        self._layers = array("h")
        self.targets: dict[int, bytes] = {}
        self.rdevs: dict[int, int] = {}
        self.xattrs: dict[int, Xattrs] = {}
        self.segments: dict[int, Segments] = {}

    def __len__(self) -> int:
        return len(self.modes)

    def add(self, entry: LayerEntry, layer: int) -> int:
        """Append what ``entry`` of the layer at position ``layer`` says; return its row."""
        row = self._append(
            entry.kind | entry.mode,
            entry.uid,
            entry.gid,
            entry.mtime_ns,
            entry.size,
            entry.offset,
            layer,
        )
        if entry.target:
            self.targets[row] = entry.target
        if entry.rdev:
            self.rdevs[row] = entry.rdev
        if entry.xattrs:
            self.xattrs[row] = entry.xattrs
        if entry.segments is not None:
            self.segments[row] = entry.segments
        return row

    def add_implied(self) -> int:
        """Append a directory that is there because something is in it: 0755, root's, of 1970."""
        return self._append(_IMPLIED_MODE, 0, 0, 0, 0, 0, _IMPLIED)

    def assign(self, row: int, source: int) -> None:
        """Give the directory ``row`` the metadata of the directory ``source``."""
        for column in (self.modes, self.uids, self.gids, self.mtimes, self._layers):
            column[row] = column[source]
        self.xattrs.pop(row, None)
        if source in self.xattrs:
            self.xattrs[row] = self.xattrs[source]

    def is_directory(self, row: int) -> bool:
        """Say whether ``row`` is a directory."""
        return stat.S_ISDIR(self.modes[row])

    def kind(self, row: int) -> FileKind:
        """Return the kind of file."""
        return FileKind(stat.S_IFMT(self.modes[row]))

    def layer(self, row: int) -> int | None:
        """Return the position of the layer that the row came from; None if it is implied."""
        layer = self._layers[row]
        return None if layer == _IMPLIED else layer

    def select(self, rows: Sequence[int]) -> FileTable:
        """Return a table of ``rows`` only, in that order."""
        chosen = FileTable()
        for name in ("modes", "uids", "gids", "mtimes", "sizes", "offsets", "_layers"):
            column = getattr(self, name)
            getattr(chosen, name).extend(column[row] for row in rows)
        for name in ("targets", "rdevs", "xattrs", "segments"):
            source, target = getattr(self, name), getattr(chosen, name)
            if source:
                target.update((new, source[old]) for new, old in enumerate(rows) if old in source)
        return chosen

    def _append(
        self, mode: int, uid: int, gid: int, mtime: int, size: int, offset: int, layer: int
    ) -> int:
        self.modes.append(mode)
        self.uids.append(uid)
        self.gids.append(gid)
        self.mtimes.append(mtime)
        self.sizes.append(size)
        self.offsets.append(offset)
        self._layers.append(layer)
        return len(self.modes) - 1
