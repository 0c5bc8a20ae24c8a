"""What of a path is fetched besides what is read of it: guesses, from where in it was read before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from fusesnap.fetch.read_ahead import FURTHEST, ReadAhead
from fusesnap.nix.chunk_table import ChunkTable
from fusesnap.nix.nar_index import NarIndex

# Bytes of a file up to which it is small: whoever reads of it reads all of it, and then perhaps another.
SMALL_FILE: Final = 128 * 1024
# Bytes of the compressed file that are guessed at after the second small file, twice as many after each that follows.
FIRST_GUESS: Final = 512 * 1024
# Bytes of the compressed file in one request for small files. Few enough that it is never stopped for a reader: what is
# on its way then would be lost, and readers come one after another.
SCATTERED_RUN: Final = 128 * 1024
# Chunks that are looked at for one guess.
_LOOKED_AT: Final = 1024


@dataclass(frozen=True, slots=True)
class Guess:
    """Chunks, ascending: ``near`` are worth as much as what is read, ``far`` come behind all who wait.

    So do ``scattered``, in requests of at most ``SCATTERED_RUN``.
    """

    near: list[int]
    far: list[int]
    scattered: list[int]


class SmallFiles:
    """The chunks that hold small files.

    An interpreter reads its modules out of a directory here and there, and each costs it a round trip in which the link
    has nothing else to do.
    """

    def __init__(self, chunks: ChunkTable, hold_small: Sequence[int]) -> None:
        """``hold_small`` has 1 for each chunk in which there is something of a small file, else 0."""
        self._chunks = chunks
        self._hold_small = hold_small
        self._allowed = 0  # bytes of the file that the next miss has guessed at; none at the first

    @classmethod
    def of(cls, index: NarIndex) -> SmallFiles:
        """Those of a path. It looks at every entry: for a thread."""
        hold_small = bytearray(len(index.chunks))
        for offset, size in index.tree.files():
            if 0 < size <= SMALL_FILE:
                for number in index.chunks.covering(offset, offset + size):
                    hold_small[number] = 1
        return cls(index.chunks, hold_small)

    def after(self, missed: int, is_due: Callable[[int], bool], pending: int) -> list[int]:
        """What to fetch after a reader had to wait for chunk ``missed``, ascending.

        ``is_due`` says whether a chunk is neither here nor coming, ``pending`` how many bytes of the file are coming of
        which nobody knows whether they are wanted.
        """
        if not self._hold_small[missed]:
            return []
        left = self._allowed - pending
        self._allowed = min(max(2 * self._allowed, FIRST_GUESS), FURTHEST)
        found = []
        for number in filter(is_due, islice(self._from(missed), _LOOKED_AT)):
            left -= self._chunks[number].file_size
            if left < 0:
                break
            found.append(number)
        return sorted(found)

    def _from(self, number: int) -> Iterator[int]:
        """Those behind it, which are beside it in a directory or below it, and then those before it, the next first."""
        behind, before = range(number, len(self._chunks)), range(number - 1, -1, -1)
        return (each for numbers in (behind, before) for each in numbers if self._hold_small[each])


class Guesses:
    """Those of one path; nothing is known of ``small`` files where that is not looked at."""

    def __init__(self, chunks: ChunkTable, small: SmallFiles | None) -> None:
        self._chunks = chunks
        self._small = small
        self._ahead = ReadAhead()

    def after(
        self, due: Sequence[int], reach: int, is_due: Callable[[int], bool], pending: int
    ) -> Guess:
        """What to fetch with the chunks ``due``, for which a reader waits, and which are in the order of the file.

        ``reach``: bytes of the file that are near. For the others see ``SmallFiles.after``.
        """
        window = self._ahead.window(due[0])
        near = self._following(due[-1] + 1, reach, is_due)
        last = (near or due)[-1]
        far = self._following(last + 1, window, is_due)
        self._ahead.fetched((far or [last])[-1])
        taken = {*due, *near, *far}
        scattered = (
            self._small.after(due[0], lambda each: each not in taken and is_due(each), pending)
            if self._small is not None
            else []
        )
        return Guess(near, far, scattered)

    def _following(self, first: int, window: int, is_due: Callable[[int], bool]) -> list[int]:
        """Chunks from ``first`` on, as long as they are due and ``window`` bytes hold them."""
        found = []
        for number in range(first, len(self._chunks)):
            window -= self._chunks[number].file_size
            if window < 0 or not is_due(number):
                break
            found.append(number)
        return found
