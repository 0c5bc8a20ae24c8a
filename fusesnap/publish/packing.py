"""A NAR becomes a file of independent zstd frames, and the table of them."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import BinaryIO, Final

import zstandard

from fusesnap.nix.chunk_table import ChunkTable
from fusesnap.nix.hash import Hash, HashAlgorithm
from fusesnap.nix.hash_parts import HashPartScanner, Occurrence, blanked
from fusesnap.nix.tree import Tree
from fusesnap.publish.chunking import DEFAULT_CHUNK_SIZE, Chunker

# docs/architecture.md, "How large a chunk is", has the measurements.
DEFAULT_LEVEL: Final = 19
MAX_LEVEL: Final = zstandard.MAX_COMPRESSION_LEVEL
# Chunks of one NAR on their way through the compressors: enough to keep some tens of processors busy, and a few MiB.
_AHEAD: Final = 64


@dataclass(frozen=True, slots=True)
class PackedNar:
    """A NAR as it was written: hashes and sizes (bytes) of the NAR and of the file, its tree and its chunks."""

    nar_hash: Hash
    nar_size: int
    file_hash: Hash
    file_size: int
    tree: Tree
    chunks: ChunkTable


@dataclass(frozen=True, slots=True)
class _Frame:
    size: int
    digest: bytes
    data: bytes


class Compressor:
    """Makes frames. For any number of threads: each has a context of its own, which zstd cannot share."""

    def __init__(self, level: int = DEFAULT_LEVEL) -> None:
        self._level = level
        self._local = threading.local()

    def frame(self, chunk: bytes) -> _Frame:
        """Return the frame of one chunk."""
        context = getattr(self._local, "context", None)
        if context is None:
            context = self._local.context = zstandard.ZstdCompressor(level=self._level)
        return _Frame(len(chunk), hashlib.sha256(chunk).digest(), context.compress(chunk))


@dataclass(slots=True)
class Packer:
    """Packs NARs. ``executor``'s threads compress; zstd and SHA-256 let go of the interpreter lock meanwhile."""

    executor: Executor
    compressor: Compressor
    chunk_size: int = DEFAULT_CHUNK_SIZE

    def pack(
        self, pieces: Iterable[bytes], hash_parts: Sequence[str], target: BinaryIO
    ) -> PackedNar:
        """Write the NAR that comes in ``pieces`` to ``target``.

        ``hash_parts`` are those of store paths that may occur in it. Raises :class:`InvalidData` where it is no NAR,
        and what ``pieces`` and ``target`` raise.
        """
        packing = _Packing(hash_parts)
        chunker = Chunker(self.chunk_size)
        for frame in self._frames(packing.seen(chunker.chunks(pieces))):
            packing.write(frame, target)
        return packing.result(chunker.tree())

    def _frames(self, chunks: Iterable[bytes]) -> Iterator[_Frame]:
        waiting: deque[Future[_Frame]] = deque()
        try:
            for chunk in chunks:
                waiting.append(self.executor.submit(self.compressor.frame, chunk))
                if len(waiting) >= _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class _Packing:
    """What is known of a NAR that is being packed."""

    def __init__(self, hash_parts: Sequence[str]) -> None:
        self._scanner = HashPartScanner(hash_parts)
        self._hash_parts = tuple(hash_parts)
        self._nar_hash = hashlib.sha256()
        self._file_hash = hashlib.sha256()
        self._nar_size = 0
        self._file_size = 0
        self._sizes: list[int] = []
        self._file_sizes: list[int] = []
        self._digests: list[bytes] = []
        self._occurrences: list[Occurrence] = []
        self._blanked = _BlankedDigests()

    def seen(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Look at each chunk on its way to the compressors."""
        for chunk in chunks:
            self._nar_hash.update(chunk)
            found = list(self._scanner.feed(chunk))
            self._occurrences += found
            self._blanked.feed(chunk, self._nar_size, found)
            self._nar_size += len(chunk)
            yield chunk

    def write(self, frame: _Frame, target: BinaryIO) -> None:
        """Append a frame to the file."""
        target.write(frame.data)
        self._file_hash.update(frame.data)
        self._file_size += len(frame.data)
        self._sizes.append(frame.size)
        self._file_sizes.append(len(frame.data))
        self._digests.append(frame.digest)

    def result(self, tree: Tree) -> PackedNar:
        """Return all of it."""
        used, occurrences = _renumbered(self._hash_parts, self._occurrences)
        chunks = ChunkTable(
            self._sizes,
            self._file_sizes,
            b"".join(self._digests),
            used,
            occurrences,
            self._blanked.finish(),
        )
        return PackedNar(
            Hash(HashAlgorithm.SHA256, self._nar_hash.digest()),
            self._nar_size,
            Hash(HashAlgorithm.SHA256, self._file_hash.digest()),
            self._file_size,
            tree,
            chunks,
        )


class _BlankedDigests:
    """Hashes chunks with their hash parts zeroed.

    A hash part that begins in one chunk is complete only with the next, so a chunk is held until that one has come.
    """

    def __init__(self) -> None:
        self._digests: list[bytes] = []
        self._held: tuple[bytes, int] = (b"", 0)
        self._touching: list[Occurrence] = []

    def feed(self, chunk: bytes, start: int, found: Sequence[Occurrence]) -> None:
        """Take the next chunk, which begins at ``start``, and what was found with it."""
        self._touching += found
        self._close()
        self._held = (chunk, start)
        self._touching = [each for each in self._touching if each.end > start]

    def finish(self) -> bytes:
        """Return the digests of all chunks in which there are hash parts."""
        self._close()
        return b"".join(self._digests)

    def _close(self) -> None:
        chunk, start = self._held
        inside = [each for each in self._touching if each.position < start + len(chunk)]
        if inside:
            self._digests.append(hashlib.sha256(blanked(chunk, start, inside)).digest())


def _renumbered(
    hash_parts: Sequence[str], occurrences: Sequence[Occurrence]
) -> tuple[tuple[str, ...], tuple[Occurrence, ...]]:
    """Leave out the hash parts that do not occur."""
    used = sorted({found.which for found in occurrences})
    number = {which: place for place, which in enumerate(used)}
    return (
        tuple(hash_parts[which] for which in used),
        tuple(Occurrence(found.position, number[found.which]) for found in occurrences),
    )
