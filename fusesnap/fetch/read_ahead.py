"""How far beyond what somebody reads is fetched. Bytes of the compressed file."""

from __future__ import annotations

from collections.abc import Container
from typing import Final

from fusesnap.fetch.link import Link
from fusesnap.nix.chunk_table import ChunkTable

# Bytes of the file that are ahead of a sequential reader at most.
FURTHEST: Final = 4 * 1024 * 1024
# Bytes of the file that follow a miss, with the same urgency: as much as the link carries in about the time that a
# request takes anyway, within these. The first is for a link of which nothing is known yet.
FIRST_REACH: Final = 128 * 1024
LEAST_REACH: Final = 64 * 1024
MOST_REACH: Final = 512 * 1024


class ReadAhead:
    """How far beyond what is wanted is fetched: as long as reads are sequential twice as far each time."""

    def __init__(self) -> None:
        self._window = 0
        self._next = -1

    def window(self, first: int) -> int:
        """Bytes of the file to fetch behind a miss at chunk ``first``, less urgently; 0 for one out of the blue."""
        self._window = min(max(2 * self._window, FIRST_REACH), FURTHEST) * (first == self._next)
        return self._window

    def fetched(self, last: int) -> None:
        """Chunks up to ``last`` were asked for."""
        self._next = last + 1


def reach(link: Link, source: str) -> int:
    """Bytes of the file to fetch behind a miss."""
    underway = int(link.rate * link.round_trip(source))
    return min(max(underway, LEAST_REACH), MOST_REACH) if underway else FIRST_REACH


def before(first: int, guessed: Container[int], chunks: ChunkTable) -> list[int]:
    """Those of the ``guessed`` chunks that come right before ``first`` and are near, ascending.

    What is mapped is read in either direction.
    """
    found: list[int] = []
    left = LEAST_REACH
    for number in range(first - 1, -1, -1):
        left -= chunks[number].file_size
        if left < 0 or number not in guessed:
            break
        found.insert(0, number)
    return found
