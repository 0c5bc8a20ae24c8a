from __future__ import annotations

import hashlib
import io
import random
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.nix.compression import decompressor
from fusesnap.nix.hash_parts import blanked
from fusesnap.nix.nar import NarEnd, nar_bytes
from fusesnap.publish.packing import Compressor, PackedNar, Packer

from ..store.conftest import Tree, path_named, tree_events

PARTS = [path_named(name).hash_part for name in ("one", "two", "three")]
SIZE = 256


def nar_of(tree: Tree) -> bytes:
    return b"".join(nar_bytes([*tree_events(tree), NarEnd()]))


class InTurn(Executor):
    """Does the work at once."""

    def submit(self, work: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*arguments, **named))
        return future


def pack(nar: bytes, executor: Executor | None = None) -> tuple[PackedNar, bytes]:
    target = io.BytesIO()
    packer = Packer(executor or InTurn(), Compressor(1), SIZE)
    return packer.pack([nar], PARTS, target), target.getvalue()


_words = st.sampled_from([*PARTS, PARTS[0][:9], "x", "\n" * 30, "/nix/store/"])


@given(st.lists(_words, max_size=60).map("".join), st.integers(0, 40))
def test_each_frame_is_a_chunk_and_all_frames_are_the_nar(text: str, before: int) -> None:
    nar = nar_of({"a": b"-" * before, "text": text.encode()})
    packed, file = pack(nar)
    assert b"".join(decompressor("zstd").decompress(file)) == nar
    assert packed.nar_hash.digest == hashlib.sha256(nar).digest()
    assert packed.file_hash.digest == hashlib.sha256(file).digest()
    assert (packed.nar_size, packed.file_size) == (len(nar), len(file))
    for chunk in packed.chunks:
        frame = file[chunk.file_start : chunk.file_end]
        assert chunk.unpack(frame) == nar[chunk.start : chunk.end]


@given(st.lists(_words, max_size=60).map("".join), st.integers(0, 40))
def test_hash_parts_are_blanked_also_where_chunks_meet(text: str, before: int) -> None:
    nar = nar_of({"a": b"-" * before, "text": text.encode()})
    table = pack(nar)[0].chunks
    blank = blanked(nar, 0, table.occurrences)
    for found in table.occurrences:
        assert nar[found.position : found.end].decode() == table.hash_parts[found.which]
    for chunk in table:
        expected = hashlib.sha256(blank[chunk.start : chunk.end]).digest()
        assert table.blanked_digest(chunk.number) == expected
    remaining = blank.decode("latin-1")
    assert not any(part in remaining for part in PARTS)


def test_only_hash_parts_that_occur_are_listed() -> None:
    table = pack(nar_of(PARTS[2].encode()))[0].chunks
    assert table.hash_parts == (PARTS[2],)
    assert [found.which for found in table.occurrences] == [0]


def test_threads_keep_the_order() -> None:
    nar = nar_of(random.Random(2).randbytes(SIZE * 300))  # noqa: S311
    with ThreadPoolExecutor(4) as executor:
        assert pack(nar, executor)[1] == pack(nar)[1]


def test_what_a_source_raises_comes_through_and_no_work_is_left() -> None:
    def pieces() -> Any:
        yield nar_of(bytes(SIZE * 200))[: SIZE * 100]
        raise RuntimeError("gone")

    with ThreadPoolExecutor(1) as executor, pytest.raises(RuntimeError, match="gone"):
        Packer(executor, Compressor(1), SIZE).pack(pieces(), PARTS, io.BytesIO())


def test_a_frame_tells_its_size() -> None:
    """A reader takes no more memory for a chunk than the index says."""
    packed, file = pack(nar_of(bytes(1000)))
    for chunk in packed.chunks:
        assert zstandard.frame_content_size(file[chunk.file_start : chunk.file_end]) == chunk.size
