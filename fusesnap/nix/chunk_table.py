"""The chunks of a NAR: where each one is in the NAR and in the compressed file, and what it hashes to."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import zstandard

from fusesnap.errors import ContentMismatch, InvalidData
from fusesnap.nix.hash_parts import Occurrence, blanked

DIGEST_SIZE: Final = hashlib.sha256().digest_size
# A chunk is held in memory whole, twice, before anything of it is used. `fusesnap publish` makes chunks of at most half
# of this.
MAX_CHUNK_SIZE: Final = 1024 * 1024
# What zstd cannot compress it stores, with 3 bytes a block of 128 KiB and 18 around the frame (RFC 8878, 3.1.1).
MAX_CHUNK_FILE_SIZE: Final = MAX_CHUNK_SIZE + 1024


@dataclass(frozen=True, slots=True)
class Chunk:
    """``size`` bytes of a NAR from ``start``: the ``file_size`` bytes of the file from ``file_start``.

    ``digest`` is the SHA-256 of the bytes of the NAR.
    """

    number: int
    start: int
    size: int
    file_start: int
    file_size: int
    digest: bytes

    @property
    def end(self) -> int:
        """Where it ends in the NAR."""
        return self.start + self.size

    @property
    def file_end(self) -> int:
        """Where it ends in the file."""
        return self.file_start + self.file_size

    def unpack(self, frame: bytes) -> bytes:
        """Return the contents of the chunk, of which ``frame`` are the bytes in the file, checked.

        Raises :class:`ContentMismatch` where they are another's, :class:`InvalidData` where they are no frame.
        """
        try:
            size = zstandard.frame_content_size(frame)
            # A frame that lies of its size cannot make us take more memory than the chunk has.
            if size != self.size:
                raise ContentMismatch(
                    f"chunk {self.number} unfolds to {size} bytes, not {self.size}"
                )
            data = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise InvalidData(f"chunk {self.number} cannot be decompressed: {error}") from None
        self.check(data)
        return data

    def check(self, data: bytes) -> None:
        """Raise :class:`ContentMismatch` unless ``data`` is the chunk."""
        if len(data) != self.size:
            raise ContentMismatch(
                f"chunk {self.number} has {len(data)} bytes, expected {self.size}"
            )
        digest = hashlib.sha256(data).digest()
        if digest != self.digest:
            raise ContentMismatch(
                f"chunk {self.number} hashes to sha256:{digest.hex()}, expected sha256:{self.digest.hex()}"
            )


class ChunkTable:
    """All chunks of a NAR, as columns; immutable.

    ``hash_parts`` are the different hash parts of store paths that occur in the NAR, ``occurrences`` where they do.
    """

    __slots__ = ("_blanked", "_digests", "_file_starts", "_starts", "hash_parts", "occurrences")

    hash_parts: tuple[str, ...]
    occurrences: Sequence[Occurrence]

    def __init__(
        self,
        sizes: Sequence[int],
        file_sizes: Sequence[int],
        digests: bytes,
        hash_parts: tuple[str, ...] = (),
        occurrences: Sequence[Occurrence] = (),
        blanked_digests: bytes = b"",
    ) -> None:
        """Raises :class:`InvalidData` where the columns do not fit one another.

        ``digests`` holds the chunks' SHA-256 one after another, ``blanked_digests`` those of chunks in which hash
        parts occur, with these zeroed.
        """
        _check_sizes(sizes, file_sizes)
        _check_column("digests", digests, len(sizes))
        self._starts = array("Q", accumulate(sizes, initial=0))
        self._file_starts = array("Q", accumulate(file_sizes, initial=0))
        self._digests = digests
        self.hash_parts = hash_parts
        self.occurrences = occurrences
        self._check_occurrences()
        self._blanked = self._place_blanked(blanked_digests)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> Chunk:
        if not 0 <= number < len(self):
            raise IndexError(number)
        starts, file_starts = self._starts, self._file_starts
        return Chunk(
            number,
            starts[number],
            starts[number + 1] - starts[number],
            file_starts[number],
            file_starts[number + 1] - file_starts[number],
            self._digests[number * DIGEST_SIZE : (number + 1) * DIGEST_SIZE],
        )

    def __iter__(self) -> Iterator[Chunk]:
        return map(self.__getitem__, range(len(self)))

    @property
    def nar_size(self) -> int:
        """Bytes of the NAR."""
        return self._starts[-1]

    @property
    def file_size(self) -> int:
        """Bytes of the compressed file."""
        return self._file_starts[-1]

    @property
    def digests(self) -> bytes:
        """The SHA-256 of every chunk, one after another."""
        return self._digests

    @property
    def blanked_digests(self) -> bytes:
        """The SHA-256 of every chunk in which hash parts occur, with these zeroed."""
        return b"".join(self._blanked[number] for number in sorted(self._blanked))

    def covering(self, start: int, end: int) -> range:
        """Return the numbers of the chunks that have bytes ``start`` to ``end`` of the NAR; empty for no bytes."""
        end = min(end, self.nar_size)
        if start >= end:
            return range(0)
        return range(bisect_right(self._starts, start) - 1, bisect_left(self._starts, end))

    def blanked_digest(self, number: int) -> bytes:
        """Return the SHA-256 of chunk ``number`` with its hash parts zeroed; its own where it has none."""
        return self._blanked.get(number) or self[number].digest

    def occurrences_in(self, number: int) -> Sequence[Occurrence]:
        """Return the hash parts of which at least one byte is in chunk ``number``."""
        chunk = self[number]
        first = bisect_right(self.occurrences, chunk.start, key=lambda found: found.end)
        last = bisect_left(self.occurrences, chunk.end, key=lambda found: found.position)
        return self.occurrences[first:last]

    def blank(self, number: int, data: bytes) -> bytes:
        """Return ``data``, the contents of chunk ``number``, with its hash parts zeroed."""
        return blanked(data, self[number].start, self.occurrences_in(number))

    def _check_occurrences(self) -> None:
        free = 0
        for found in self.occurrences:
            if found.position < free:
                raise InvalidData(f"hash part at byte {found.position} of the NAR overlaps another")
            if found.which >= len(self.hash_parts):
                raise InvalidData(
                    f"hash part {found.which} is named, expected one of {len(self.hash_parts)}"
                )
            free = found.end
        if free > self.nar_size:
            raise InvalidData(f"hash part ends at byte {free}, the NAR has {self.nar_size}")

    def _place_blanked(self, digests: bytes) -> dict[int, bytes]:
        numbers: dict[int, None] = {}
        for found in self.occurrences:
            numbers.update(dict.fromkeys(self.covering(found.position, found.end)))
        _check_column("digests of blanked chunks", digests, len(numbers))
        return {
            number: digests[place : place + DIGEST_SIZE]
            for number, place in zip(numbers, range(0, len(digests), DIGEST_SIZE), strict=True)
        }


def _check_sizes(sizes: Sequence[int], file_sizes: Sequence[int]) -> None:
    if len(sizes) != len(file_sizes):
        raise InvalidData(f"{len(sizes)} chunks of the NAR, but {len(file_sizes)} of the file")
    for what, column, most in (
        ("NAR", sizes, MAX_CHUNK_SIZE),
        ("file", file_sizes, MAX_CHUNK_FILE_SIZE),
    ):
        for number, size in enumerate(column):
            if not 0 < size <= most:
                raise InvalidData(
                    f"chunk {number} has {size} bytes of the {what}, expected 1 to {most}"
                )


def _check_column(what: str, digests: bytes, count: int) -> None:
    if len(digests) != count * DIGEST_SIZE:
        raise InvalidData(
            f"{what} have {len(digests)} bytes, expected {count * DIGEST_SIZE} for {count} chunks"
        )
