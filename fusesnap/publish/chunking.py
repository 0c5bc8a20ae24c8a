"""Where a NAR is cut into chunks.

A file larger than a chunk begins one of its own, and is cut at multiples of the chunk's size from its beginning: its
pages then do not straddle chunks, and a file that is the same in two NARs has the same chunks. Smaller files, links and
names are packed together; a cut is made before the file that would not fit any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

from fusesnap.nix.nar import (
    DirectoryStart,
    FileData,
    NarEvent,
    NarParser,
    NeedData,
    RegularFile,
    Symlink,
)
from fusesnap.nix.tree import Tree, TreeBuilder

# docs/architecture.md, "How large a chunk is", has the measurements.
DEFAULT_CHUNK_SIZE: Final = 64 * 1024


class _Cuts:
    """Where the next chunks begin."""

    def __init__(self, chunk_size: int) -> None:
        self._chunk_size = chunk_size
        self._start = 0  # of the chunk that is open
        self.pending: deque[int] = deque()

    def receive(self, event: NarEvent, offset: int) -> None:
        """Take an event, up to which the NAR has ``offset`` bytes."""
        match event:
            case RegularFile(_, size, _, begin) if size > self._chunk_size:
                self._cut(begin)
                for place in range(begin + self._chunk_size, begin + size, self._chunk_size):
                    self._cut(place)
            case RegularFile(_, size, _, begin):
                if begin + size > self._start + self._chunk_size:
                    self._cut(begin)
            case DirectoryStart() | Symlink():
                if offset > self._start + self._chunk_size:
                    self._cut(offset)
            case _:
                pass

    def _cut(self, place: int) -> None:
        if place > self._start:
            self.pending.append(place)
            self._start = place


class Chunker:
    """Cuts one NAR, and reads its tree on the way."""

    def __init__(self, chunk_size: int = DEFAULT_CHUNK_SIZE) -> None:
        self._parser = NarParser()
        self._builder = TreeBuilder()
        self._cuts = _Cuts(chunk_size)

    def chunks(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Give the chunks of the NAR that comes in ``pieces``.

        Raises :class:`InvalidData` where it is none. No chunk is larger than the chunk's size and one entry.
        """
        held = bytearray()
        start = 0  # of what is held
        for piece in pieces:
            held += piece
            self._parse(piece)
            while (cut := self._next_cut(start + len(held))) is not None:
                yield bytes(memoryview(held)[: cut - start])
                del held[: cut - start]
                start = cut
        self._parser.close()
        if held:
            yield bytes(held)

    def tree(self) -> Tree:
        """Return the tree, once all chunks were given."""
        return self._builder.tree()

    def _parse(self, piece: bytes) -> None:
        self._parser.receive_data(piece)
        while not isinstance(event := self._parser.next_event(), NeedData):
            if not isinstance(event, FileData):
                self._cuts.receive(event, self._parser.offset)
                self._builder.receive(event)

    def _next_cut(self, end: int) -> int | None:
        pending = self._cuts.pending
        return pending.popleft() if pending and pending[0] <= end else None
