"""Sets of bytes, as ranges. No I/O."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class ByteRanges:
    """Ranges, each from its start up to its end; those that overlap or touch are one."""

    def __init__(self) -> None:
        self._edges: list[int] = []  # starts and ends in turn, ascending

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._edges[::2], self._edges[1::2], strict=True)

    def __bool__(self) -> bool:
        return bool(self._edges)

    def add(self, start: int, end: int) -> None:
        """Bytes ``start`` up to ``end`` are in the set from now on."""
        self._splice(start, end, kept=0)

    def remove(self, start: int, end: int) -> None:
        """Bytes ``start`` up to ``end`` are in the set no more."""
        self._splice(start, end, kept=1)

    def gaps(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of ``start`` up to ``end`` that are not in the set, in order."""
        edges, at = self._edges, bisect_right(self._edges, start)
        if at % 2:  # within a range
            start, at = edges[at], at + 1
        while start < end:
            following = edges[at] if at < len(edges) else end
            yield start, min(following, end)
            if at >= len(edges):
                return
            start, at = edges[at + 1], at + 2

    def _splice(self, start: int, end: int, *, kept: int) -> None:
        """An edge remains where it is not within ranges (``kept`` 0), or where it is (1)."""
        if start >= end:
            return
        first, last = bisect_left(self._edges, start), bisect_right(self._edges, end)
        left = [start] if first % 2 == kept else []
        right = [end] if last % 2 == kept else []
        self._edges[first:last] = left + right
