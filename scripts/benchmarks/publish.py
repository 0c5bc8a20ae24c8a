"""How large a chunk is, and how hard it is compressed: what each choice costs a publisher and a reader.

    scripts/bench publish [--closure NAME] [--json]

Packs a real closure again and again, in one thread, with one knob turned at a time, and compares with what `nix copy`
writes: xz, and zstd of a whole NAR. Bytes do not depend on the machine; seconds are of CPU, all in one run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import zstandard
from nacl.signing import SigningKey
from testbed.closure import debian_closure
from testbed.nix_store import NixStore
from testbed.workplace import default_work

from fusesnap.nix.nar import nar_bytes
from fusesnap.nix.nar_index import NarIndex
from fusesnap.nix.signature import SecretKey
from fusesnap.nix.store_path import StoreDir
from fusesnap.nix.tree import EntryKind
from fusesnap.publish.packing import Compressor, PackedNar, Packer
from fusesnap.store.tree_reader import nar_events

CLOSURES = {
    "redis": ("redis-server", "redis-tools", "bash"),
    "shell": ("bash", "coreutils", "grep", "sed", "gawk", "findutils", "gzip"),
}
SIZES = (16, 32, 64, 128, 256)
LEVELS = (3, 9, 15, 19, 22)
SIZE, LEVEL = 64, 19
PAGE = 4096


@dataclass(frozen=True, slots=True)
class Row:
    """One choice. Bytes of all files and all indexes; what one page costs to read, on average over all pages."""

    name: str
    file_bytes: int
    index_bytes: int
    page_bytes: int | None
    cpu_seconds: float
    read_seconds: float


class InTurn(Executor):
    """Does the work at once, in the thread that asks: so that CPU time is the work's."""

    def submit(self, work: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*arguments, **named))
        return future


class Sink:
    """Keeps what is written, for reading it again."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        self.pieces.append(data)
        return len(data)


def key() -> SecretKey:
    """Any key: it is for the size of a signature."""
    made = SigningKey(hashlib.sha256(b"bench").digest())
    return SecretKey("bench-1", bytes(made) + bytes(made.verify_key))


def closure_nars(name: str) -> dict[str, bytes]:
    """The NARs of a closure by base name."""
    store = NixStore(default_work() / "store")
    closure = debian_closure(store, f"cold-{name}", CLOSURES[name])
    return {
        path.rpartition("/")[2]: b"".join(nar_bytes(nar_events(store.real(path))))
        for path in closure.paths
    }


def packed_row(nars: dict[str, bytes], size: int, level: int) -> Row:
    """Pack everything with these two, read it all again, chunk by chunk."""
    packer = Packer(InTurn(), Compressor(level), size * 1024)
    hash_parts = [name[:32] for name in nars]
    files = indexes = 0
    costs: list[int] = []
    spent = read = 0.0
    for name, nar in nars.items():
        sink = Sink()
        start = time.process_time()
        packed = packer.pack([nar], hash_parts, _binary(sink))
        spent += time.process_time() - start
        files += packed.file_size
        indexes += _index_size(name, packed)
        costs += page_costs(packed)
        start = time.process_time()
        for chunk, frame in zip(packed.chunks, sink.pieces, strict=True):
            chunk.unpack(frame)
        read += time.process_time() - start
    page = sum(costs) // len(costs)
    return Row(f"{size} KiB, zstd -{level}", files, indexes, page, spent, read)


def _binary(sink: Sink) -> BinaryIO:
    return sink  # type: ignore[return-value]


def _index_size(name: str, packed: PackedNar) -> int:
    path = StoreDir().parse(f"/nix/store/{name}")
    index = NarIndex(path, packed.nar_hash, packed.tree, packed.chunks, StoreDir())
    return len(index.to_bytes(key()))


def page_costs(packed: PackedNar) -> Iterator[int]:
    """Of each page of each file: bytes of the chunks that hold it."""
    for entry in packed.tree.entries:
        if entry.kind is not EntryKind.REGULAR:
            continue
        for start in range(entry.offset, entry.offset + entry.size, PAGE):
            end = min(start + PAGE, entry.offset + entry.size)
            numbers = packed.chunks.covering(start, end)
            yield sum(packed.chunks[number].file_size for number in numbers)


def whole_row(
    nars: dict[str, bytes],
    name: str,
    pack: Callable[[bytes], bytes],
    unpack: Callable[[bytes], Any],
) -> Row:
    """What a stock cache has: one stream a NAR."""
    start = time.process_time()
    files = [pack(nar) for nar in nars.values()]
    spent = time.process_time() - start
    start = time.process_time()
    for file in files:
        unpack(file)
    return Row(name, sum(map(len, files)), 0, None, spent, time.process_time() - start)


def rows(nars: dict[str, bytes]) -> Iterator[Row]:
    """All choices, each once."""
    yield whole_row(
        nars, "whole NAR, xz -6", lambda nar: lzma.compress(nar, preset=6), lzma.decompress
    )
    context = zstandard.ZstdCompressor(level=19)
    yield whole_row(nars, "whole NAR, zstd -19", context.compress, zstandard.decompress)
    for size in SIZES:
        yield packed_row(nars, size, LEVEL)
    for level in LEVELS:
        if level != LEVEL:
            yield packed_row(nars, SIZE, level)


def table(done: Sequence[Row], nar_bytes_: int) -> str:
    """For people."""
    best = done[0].file_bytes
    head = f"{'':22}{'MB':>8}{'to xz':>7}{'index kB':>10}{'kB a page':>11}{'MB/s in':>9}{'out':>7}"
    lines = [head]
    for row in done:
        page = f"{row.page_bytes / 1e3:.1f}" if row.page_bytes is not None else "-"
        lines.append(
            f"{row.name:22}{row.file_bytes / 1e6:8.2f}{row.file_bytes / best:7.3f}"
            f"{row.index_bytes / 1e3:10.1f}{page:>11}{nar_bytes_ / 1e6 / row.cpu_seconds:9.1f}"
            f"{nar_bytes_ / 1e6 / row.read_seconds:7.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--closure", choices=sorted(CLOSURES), default="redis")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    nars = closure_nars(arguments.closure)
    size = sum(map(len, nars.values()))
    done = list(rows(nars))
    if arguments.json:
        print(json.dumps({"nar_bytes": size, "rows": [asdict(row) for row in done]}, indent=2))
        return
    print(f"{arguments.closure}: {len(nars)} paths, {size / 1e6:.1f} MB of NARs, one thread\n")
    print(table(done, size))


if __name__ == "__main__":
    main()
