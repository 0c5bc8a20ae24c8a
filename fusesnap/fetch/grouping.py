"""Which chunks one request carries: what is beside one another, and what lies between."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import Final

from fusesnap.nix.chunk_table import ChunkTable
from fusesnap.store.partial_nars import PartialNar

# Bytes of the file that are rather fetched than asked for around: less than most links carry in a round trip.
NEAR: Final = 32 * 1024
# Bytes of the file in one request at most: what is more urgent interrupts it, but not without loss; and who wants its
# last chunk waits for all of it.
LARGEST_RUN: Final = 512 * 1024


def grouped(
    numbers: Iterable[int],
    chunks: ChunkTable,
    partial: PartialNar,
    coming: Container[int],
    largest: int,
) -> Iterator[list[int]]:
    """Split chunks ``numbers``, ascending; a small gap is rather fetched than asked for around.

    A group has at most ``largest`` bytes of the file, or one chunk.
    What of a gap is in ``partial`` is not in a group, and over what is ``coming`` none reaches.
    """
    group: list[int] = []
    for number in numbers:
        if group and not _belongs(group, number, chunks, coming, largest):
            yield group
            group = []
        if group:
            group += partial.missing(range(group[-1] + 1, number))
        group.append(number)
    if group:
        yield group


def _belongs(
    group: list[int], number: int, chunks: ChunkTable, coming: Container[int], largest: int
) -> bool:
    between = range(group[-1] + 1, number)
    gap = sum(chunks[each].file_size for each in between)
    length = chunks[number].file_end - chunks[group[0]].file_start
    return gap <= NEAR and length <= largest and not any(each in coming for each in between)
