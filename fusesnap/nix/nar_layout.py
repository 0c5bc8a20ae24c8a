"""Where everything stands in a NAR whose tree is known: any range of it, as what the tree says and contents of files.

Nothing but contents is missing from a tree: names, sizes, links and what is between them are spelled in one way only.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from fusesnap.nix.nar_grammar import (
    CLOSE_ENTRY,
    CLOSE_ROOT,
    DIRECTORY,
    ENTRY,
    EXECUTABLE,
    MAGIC,
    NODE,
    REGULAR,
    SYMLINK,
    spell,
)
from fusesnap.nix.tree import Entry, EntryKind, Tree


@dataclass(frozen=True, slots=True)
class Contents:
    """``size`` bytes from ``offset`` of the contents of file ``entry``, its index in the tree."""

    entry: int
    offset: int
    size: int


class NarLayout:
    """The NAR of one tree. Making it takes some microseconds an entry."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._starts = array("Q")  # where each entry begins, with what is left of those before it
        place = 0
        for number, entry in enumerate(tree.entries):
            self._starts.append(place)
            place += len(self._before(number, entry)) + len(self._after(number, entry))
            place += entry.size if entry.kind is EntryKind.REGULAR else 0
        self.nar_size = place

    def range(self, start: int, end: int) -> Iterator[bytes | Contents]:
        """What bytes ``start`` to ``end`` of the NAR are, in their order; nothing is empty."""
        number = bisect_right(self._starts, start) - 1
        while start < end and number < len(self._starts):
            place = self._starts[number]
            for piece in self._pieces(number):
                size = piece.size if isinstance(piece, Contents) else len(piece)
                first, last = max(start - place, 0), min(end - place, size)
                if first < last:
                    yield _part(piece, first, last)
                place += size
            start = max(start, place)
            number += 1

    def _pieces(self, number: int) -> Iterator[bytes | Contents]:
        entry = self._tree.entries[number]
        yield self._before(number, entry)
        if entry.kind is EntryKind.REGULAR:
            yield Contents(number, 0, entry.size)
        yield self._after(number, entry)

    def _before(self, number: int, entry: Entry) -> bytes:
        opening = ENTRY + spell(entry.name) + NODE if number else MAGIC
        match entry.kind:
            case EntryKind.DIRECTORY:
                return opening + DIRECTORY
            case EntryKind.SYMLINK:
                return opening + SYMLINK + spell(entry.target)
            case EntryKind.REGULAR:
                kind = EXECUTABLE if entry.executable else REGULAR
                return opening + kind + entry.size.to_bytes(8, "little")

    def _after(self, number: int, entry: Entry) -> bytes:
        """What closes an entry, and the directories that end with it."""
        padding = bytes(-entry.size % 8) if entry.kind is EntryKind.REGULAR else b""
        entries = self._tree.entries
        # The directory that goes on with the next entry; none does behind the last one.
        goes_on = entries[number + 1].parent if number + 1 < len(entries) else -1
        ended, closing = number, []
        while ended != goes_on:
            closing.append(CLOSE_ENTRY if ended else CLOSE_ROOT)
            if not ended:
                break
            ended = entries[ended].parent
        return padding + b"".join(closing)


def _part(piece: bytes | Contents, first: int, last: int) -> bytes | Contents:
    if isinstance(piece, Contents):
        return Contents(piece.entry, piece.offset + first, last - first)
    return piece[first:last]
