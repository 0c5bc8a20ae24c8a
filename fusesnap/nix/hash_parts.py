"""Hash parts of store paths within a NAR, and contents with them blanked.

After a rebuild of something low, every store path above it has another hash part, and most files differ in nothing
else. So contents are also named with their hash parts zeroed: what has the same name then can be made from one another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from fusesnap.nix.hash import NIX32_ALPHABET
from fusesnap.nix.store_path import HASH_PART_LENGTH

_BLANK: Final = bytes(HASH_PART_LENGTH)
# Maps what a hash part is spelled with to 1 and everything else to 0: a search for 32 ones finds every candidate
# without looking at each byte in Python.
_SPELLED: Final = bytes(chr(byte) in NIX32_ALPHABET for byte in range(256))
_CANDIDATE: Final = b"\1" * HASH_PART_LENGTH


@dataclass(frozen=True, slots=True)
class Occurrence:
    """A hash part in a NAR: where it begins, in bytes, and which one of a list it is."""

    position: int
    which: int

    @property
    def end(self) -> int:
        """Where it ends in the NAR."""
        return self.position + HASH_PART_LENGTH


class HashPartScanner:
    """Finds the hash parts of a list in a NAR that comes in pieces. Occurrences do not overlap."""

    def __init__(self, hash_parts: Iterable[str]) -> None:
        self._which = {part.encode(): number for number, part in enumerate(hash_parts)}
        self._tail = b""
        self._offset = 0  # of the tail in the NAR
        self._free = 0  # where the last occurrence ended

    def feed(self, data: bytes) -> Iterator[Occurrence]:
        """Take the next piece and give what is complete with it."""
        data = self._tail + data
        for start in self._candidates(data):
            number = self._which.get(data[start : start + HASH_PART_LENGTH])
            if number is not None and self._offset + start >= self._free:
                found = Occurrence(self._offset + start, number)
                self._free = found.end
                yield found
        keep = min(len(data), HASH_PART_LENGTH - 1)
        self._offset += len(data) - keep
        self._tail = data[len(data) - keep :]

    def _candidates(self, data: bytes) -> Iterator[int]:
        mask = data.translate(_SPELLED)
        start = mask.find(_CANDIDATE)
        while start >= 0:
            end = mask.find(b"\0", start)
            end = len(mask) if end < 0 else end
            yield from range(start, end - HASH_PART_LENGTH + 1)
            start = mask.find(_CANDIDATE, end)


def blanked(data: bytes, offset: int, occurrences: Sequence[Occurrence]) -> bytes:
    """Return ``data``, which stands at ``offset`` in the NAR, with every byte of ``occurrences`` zeroed."""
    return _filled(data, offset, ((found.position, _BLANK) for found in occurrences))


def with_hash_parts(
    data: bytes, offset: int, occurrences: Sequence[Occurrence], hash_parts: Sequence[str]
) -> bytes:
    """Return ``data`` with the hash part that belongs there in the place of each of ``occurrences``."""
    return _filled(
        data, offset, ((found.position, hash_parts[found.which].encode()) for found in occurrences)
    )


def _filled(data: bytes, offset: int, places: Iterable[tuple[int, bytes]]) -> bytes:
    result = bytearray(data)
    for position, text in places:
        start = position - offset
        if start < 0:
            start, text = 0, text[-start:]  # noqa: PLW2901 - the chunk begins within it
        result[start : start + len(text)] = text[: len(data) - start]
    return bytes(result)
