"""What a trace may be, how one is put together, and how several become one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from fusesnap.errors import InvalidData
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.hash import Hash, HashAlgorithm
from fusesnap.nix.startup_trace import (
    BLOCK,
    Circumstances,
    Ending,
    Extent,
    Flaw,
    Lack,
    StartupTrace,
    TraceBuilder,
    TracedFile,
    TracedPath,
    merge_traces,
)

from .traces import CLOSURE, DATA, GLIBC, HELLO, NAR, WELL, example, traces


def read(*reads: tuple[int, int], size: int = 10 * BLOCK) -> list[tuple[int, int]]:
    builder = TraceBuilder()
    file = builder.file(builder.path(HELLO, NAR), 1, size, b"x")
    for offset, length in reads:
        builder.read(file, offset, length, size)
    return [(each.offset, each.length) for each in builder.trace(CLOSURE, WELL).extents]


def test_reads_are_rounded_to_blocks_and_to_the_end_of_the_file() -> None:
    assert read((100, 1)) == [(0, BLOCK)]
    assert read((BLOCK - 1, 2)) == [(0, 2 * BLOCK)]
    assert read((BLOCK, 5 * BLOCK), size=2 * BLOCK + 7) == [(BLOCK, BLOCK + 7)]
    assert read((3 * BLOCK, 4096), size=2 * BLOCK) == []


def test_what_follows_is_joined_and_what_is_there_is_not_repeated() -> None:
    assert read((0, 4096), (4096, 4096), (BLOCK, 4096)) == [(0, 2 * BLOCK)]
    assert read((BLOCK, 1), (0, 4096)) == [(BLOCK, BLOCK), (0, BLOCK)]
    assert read((BLOCK, 1), (0, 3 * BLOCK)) == [(BLOCK, BLOCK), (0, BLOCK), (2 * BLOCK, BLOCK)]


def test_the_order_is_that_of_first_use() -> None:
    trace = example()
    assert [traced.path for traced in trace.paths] == [HELLO, GLIBC, DATA]
    assert trace.extents == (
        Extent(0, 0, 2 * BLOCK),
        Extent(1, 0, BLOCK),
        Extent(0, 6 * BLOCK, 100_000 - 6 * BLOCK),
    )
    assert trace.size == 3 * BLOCK + 100_000 - 6 * BLOCK


def test_paths_outside_of_the_closure_are_refused() -> None:
    trace = example()
    trace.check_closure([DATA, GLIBC, HELLO])
    with pytest.raises(InvalidData, match=f"{GLIBC} does not belong to the closure"):
        trace.check_closure([DATA, HELLO])


FILE = TracedFile(0, 2, 100_000, b"bin/hello")
WRONG: dict[str, dict[str, Any]] = {
    "two extents that are one": {"extents": (Extent(0, 0, BLOCK), Extent(0, BLOCK, BLOCK))},
    "comes twice": {"extents": (Extent(0, BLOCK, BLOCK), Extent(0, 0, 2 * BLOCK))},
    "not whole blocks": {"extents": (Extent(0, 1, BLOCK - 1),)},
    "are not whole blocks of": {"extents": (Extent(0, 0, 10),)},
    "of a file of 100000": {"extents": (Extent(0, 6 * BLOCK, BLOCK),)},
    "0 bytes from 0": {"extents": (Extent(0, 0, 0),)},
    "which is not there": {"extents": (Extent(1, 0, BLOCK),)},
    "a file is listed twice": {"files": (FILE, FILE)},
    "a path is listed twice": {"paths": (TracedPath(HELLO, NAR), TracedPath(HELLO, NAR))},
    "there are 1": {"files": (replace(FILE, path=1),)},
    "is no name within": {"files": (replace(FILE, name=b"bin/../x"),)},
    "'a//b' is no name": {"files": (replace(FILE, name=b"a//b"),)},
    "cannot be ''": {"files": (replace(FILE, name=b""),)},
    "entry 0 cannot be": {"files": (replace(FILE, entry=0),)},
    "is not a SHA-256": {
        "paths": (TracedPath(HELLO, Hash(HashAlgorithm.SHA1, bytes(20))),),
    },
    "field Starts is 0": {"circumstances": replace(WELL, starts=0)},
    "field Recorded is -1": {"circumstances": replace(WELL, recorded=-1)},
    "field Version": {"circumstances": replace(WELL, version="0.1\nSig: x")},
    "not sorted": {
        "circumstances": replace(WELL, lacks=((HELLO, Lack.CACHED), (HELLO, Lack.COMMITTED)))
    },
}


@pytest.mark.parametrize("said", WRONG)
def test_what_cannot_be_a_trace_is_refused(said: str) -> None:
    right = StartupTrace(CLOSURE, WELL, (TracedPath(HELLO, NAR),), (FILE,), (Extent(0, 0, BLOCK),))
    with pytest.raises(InvalidData, match=said):
        replace(right, **WRONG[said])


def test_one_path_cannot_be_two_nars() -> None:
    builder = TraceBuilder()
    builder.path(HELLO, NAR)
    with pytest.raises(InvalidData, match="hello is there as"):
        builder.path(HELLO, Hash(HashAlgorithm.SHA256, bytes(32)))
    file = builder.file(0, 1, 5, b"x")
    assert builder.file(0, 1, 5, b"x") == file
    with pytest.raises(InvalidData, match="entry 1 is 'x' of 5 bytes, and 'y' of 5"):
        builder.file(0, 1, 5, b"y")


@given(traces())
def test_merged_with_itself_a_trace_reads_the_same(trace: StartupTrace) -> None:
    merged = merge_traces([trace, trace])
    assert merged.extents == trace.extents
    assert merged.files == trace.files
    assert merged.paths == trace.paths
    assert merged.circumstances == replace(
        trace.circumstances, starts=2 * trace.circumstances.starts
    )


def test_a_merged_trace_goes_on_with_what_the_second_start_read_besides() -> None:
    builder = TraceBuilder()
    data = builder.file(builder.path(DATA, NAR), 0, 10, b"")
    program = builder.file(builder.path(HELLO, NAR), 2, 100_000, b"bin/hello")
    builder.read(data, 0, 10, 10)
    builder.read(program, 0, 100_000, 100_000)
    other = builder.trace(CLOSURE, replace(WELL, recorded=WELL.recorded + 5, ended=Ending.EXIT))
    merged = merge_traces([example(), other])
    assert merged.paths == example().paths
    assert merged.extents[:3] == example().extents
    assert merged.extents[3:] == (Extent(2, 0, 10), Extent(0, 2 * BLOCK, 4 * BLOCK))
    assert merged.circumstances == Circumstances(WELL.recorded + 5, WELL.version, 2, 0, Ending.EXIT)


def test_a_merged_trace_lacks_what_all_lack() -> None:
    one = replace(
        WELL,
        flaws=frozenset({Flaw.SHARED, Flaw.INTERRUPTED}),
        lacks=((HELLO, Lack.CACHED), (GLIBC, Lack.COMMITTED)),
    )
    two = replace(
        WELL, flaws=frozenset({Flaw.SHARED}), lacks=((GLIBC, Lack.CACHED), (DATA, Lack.CACHED))
    )
    parts = [replace(example(), circumstances=each) for each in (one, two)]
    merged = merge_traces(parts).circumstances
    assert [path for path, _ in merged.lacks] == [GLIBC]
    assert merged.flaws == {Flaw.SHARED}
    assert not merged.complete
    assert merge_traces([*parts, example()]).circumstances.complete


def test_only_starts_of_one_closure_are_merged() -> None:
    with pytest.raises(InvalidData, match="cannot be merged"):
        merge_traces([example(), replace(example(), closure=ClosureDigest("6" * 64))])
    with pytest.raises(InvalidData, match="none to merge"):
        merge_traces([])
