"""Inode numbers that are computed, never handed out.

A number says all that is needed to serve it, so there is no inode table, no lookup count to lose, and nothing to
rebuild after a crash: the kernel's old numbers mean the same to the next process.

From the highest bit down (the sign bit stays clear, for programs that read st_ino as signed)::

    1 bit 0 | 2 bits kind | 15 bits view | 24 bits ordinal | 22 bits entry
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from fusesnap.errors import InvalidData

ENTRY_BITS = 22  # entries of one NAR; the largest packages of nixpkgs have some 200,000
ORDINAL_BITS = 24  # (store path, narHash) pairs that one state directory ever meets
VIEW_BITS = 15  # views that one state directory ever has
MAX_ENTRY = (1 << ENTRY_BITS) - 1
MAX_ORDINAL = (1 << ORDINAL_BITS) - 1
MAX_VIEW = (1 << VIEW_BITS) - 1


class InodeKind(IntEnum):
    """Which room of the mount a number belongs to.

    FIXED: the directories above store paths; the entry is which of them.
    STORE: an entry of a store path; the ordinal is its pin, the entry its position in NAR order.
    CLAIMED: the root of a store path that an image's placeholder says is a directory: all that may be said of it
    before its NAR is verified.
    IMAGE: a node of a standalone mount's image layers; the entry is its index.
    """

    FIXED = 0
    STORE = 1
    CLAIMED = 2
    IMAGE = 3


@dataclass(frozen=True, slots=True)
class Inode:
    """The parts of a number."""

    kind: InodeKind
    entry: int
    ordinal: int = 0
    view: int = 0

    @property
    def number(self) -> int:
        """The number that the kernel gets. Raises ``InvalidData`` where a part is too large for its bits."""
        if not (self.entry <= MAX_ENTRY and self.ordinal <= MAX_ORDINAL and self.view <= MAX_VIEW):
            raise InvalidData(
                f"an inode holds at most entry {MAX_ENTRY}, ordinal {MAX_ORDINAL}, view {MAX_VIEW}; this is {self}"
            )
        high = (self.kind << VIEW_BITS | self.view) << ORDINAL_BITS | self.ordinal
        return high << ENTRY_BITS | self.entry

    @classmethod
    def parse(cls, number: int) -> Inode:
        """The parts of a number that :attr:`number` made."""
        high = number >> (ENTRY_BITS + ORDINAL_BITS)
        return cls(
            kind=InodeKind(high >> VIEW_BITS),
            entry=number & MAX_ENTRY,
            ordinal=number >> ENTRY_BITS & MAX_ORDINAL,
            view=high & MAX_VIEW,
        )
