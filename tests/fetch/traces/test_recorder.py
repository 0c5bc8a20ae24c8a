"""Whose a read is, what of it is written down, and when a start is over."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from fusesnap.fetch.traces.recorder import MAX_RECORDINGS
from fusesnap.fetch.traces.recording import Conditions, Recording, lacking
from fusesnap.nix.startup_trace import BLOCK, Ending, Extent, Flaw, Lack, TracedFile
from fusesnap.nix.store_path import StorePath

from .starts import GLIBC, HELLO, LINK, OTHER, PROGRAM, SIZE, Bench, nar_hash, reads, start, traced


def test_a_start_is_written_down_in_its_order() -> None:
    bench = Bench()
    recording = bench.record(start("one"), Conditions(5, "0.1", 16384, {GLIBC: Lack.CACHED}))
    bench.recorder.accessed(2, 7)
    bench.open(1, 7)
    bench.recorder.read(1, PROGRAM, 0, 4096)
    bench.open(2, 7)
    bench.recorder.read(2, PROGRAM, 40_000, 16384)
    bench.recorder.read(1, PROGRAM, 4096, 20_000)
    bench.open(3, 7)  # it belongs to another closure
    trace = traced(recording, Ending.EXIT)
    assert [(each.path, each.nar_hash) for each in trace.paths] == [
        (GLIBC, nar_hash(2)),
        (HELLO, nar_hash(1)),
    ]
    assert trace.files == (
        TracedFile(1, PROGRAM, SIZE, b"bin/run"),
        TracedFile(0, PROGRAM, SIZE, b"bin/run"),
    )
    assert trace.extents == (
        Extent(0, 0, BLOCK),
        Extent(1, 2 * BLOCK, 2 * BLOCK),
        Extent(0, BLOCK, BLOCK),
    )
    said = trace.circumstances
    assert (said.recorded, said.version, said.readahead, said.starts) == (5, "0.1", 16384, 1)
    assert (said.ended, said.flaws, said.lacks) == (
        Ending.EXIT,
        frozenset(),
        ((GLIBC, Lack.CACHED),),
    )


def test_what_is_no_file_has_nothing_to_read() -> None:
    bench = Bench()
    recording = bench.record(start("one"))
    bench.open(1, 7, entry=LINK)
    assert traced(recording).files == ()
    assert [each.path for each in traced(recording).paths] == [HELLO]


def test_what_another_container_reads_is_not_counted() -> None:
    bench = Bench()
    recording = bench.record(start("one"))
    bench.recorder.found({7: "/upper/one", 8: "/upper/elsewhere"})
    bench.open(2, 8)
    bench.recorder.read(2, PROGRAM, 0, 4096)
    assert traced(recording).paths == ()
    assert traced(recording).circumstances.flaws == {Flaw.SHARED}  # some may have been read before
    bench.open(2, 7)
    bench.recorder.read(2, PROGRAM, 0, 4096)
    assert reads(recording) == [("glibc", BLOCK)]


def test_who_turns_out_to_be_in_another_container_is_taken_back() -> None:
    bench = Bench()
    recording = bench.record(start("one"))
    bench.open(1, 7)
    bench.open(2, 8)
    bench.recorder.read(1, PROGRAM, 0, 4096)
    bench.recorder.read(2, PROGRAM, 0, 4096)
    bench.recorder.found({7: "/upper/one", 8: "/upper/elsewhere"})
    bench.recorder.read(2, PROGRAM, 4 * BLOCK, 4096)
    assert reads(recording) == [("hello", BLOCK)]
    assert [each.path for each in traced(recording).paths] == [HELLO]
    assert traced(recording).circumstances.flaws == {Flaw.SHARED}


def test_a_stranger_who_never_read_it_is_no_flaw() -> None:
    bench = Bench()
    recording = bench.record(start("one"))
    bench.open(1, 7)
    bench.open(3, 8)
    bench.recorder.found({7: "/upper/one", 8: "/upper/elsewhere"})
    assert traced(recording).circumstances.complete


def test_two_starts_of_one_image_do_not_take_from_one_another() -> None:
    bench = Bench()
    one, two = bench.record(start("one")), bench.record(start("two"))
    bench.recorder.found({7: "/upper/one", 8: "/upper/two"})
    bench.open(1, 7)
    bench.open(2, 8)
    bench.recorder.read(1, PROGRAM, 0, 4096)
    bench.recorder.read(2, PROGRAM, 0, 4096)
    assert reads(one) == [("hello", BLOCK)]
    assert reads(two) == [("glibc", BLOCK)]
    assert traced(one).circumstances.flaws == traced(two).circumstances.flaws == {Flaw.SHARED}


def test_who_is_gone_before_it_was_looked_at_counts_for_all_and_that_is_said() -> None:
    bench = Bench()
    one, two = bench.record(start("one")), bench.record(start("two"))
    bench.open(1, 9)
    bench.recorder.found({9: None})
    bench.recorder.read(1, PROGRAM, 0, 4096)
    assert reads(one) == reads(two) == [("hello", BLOCK)]
    assert not one.credible
    bench.open(1, 7)
    bench.recorder.found({7: "/upper/one"})
    assert one.credible
    assert not two.credible  # perhaps it has not started at all
    assert traced(one).circumstances.flaws == {Flaw.SHARED}
    bench.recorder.remove("two")
    three = bench.record(start("three", OTHER))
    bench.open(3, 10)
    assert traced(three).circumstances.complete  # nobody else has this path
    assert three.credible


async def test_who_is_unknown_is_asked_for_until_it_is_in_a_container() -> None:
    bench = Bench()
    bench.record(start("one"))
    bench.open(1, 7)
    bench.open(2, 8)
    assert await bench.recorder.unknown() == {7, 8}
    bench.recorder.found({7: "/upper/one", 8: None})
    bench.open(2, 7)
    with trio.move_on_after(0) as nobody:
        await bench.recorder.unknown()
    assert nobody.cancelled_caught
    bench.open(2, 8)  # it may have entered its container since
    assert await bench.recorder.unknown() == {8}


def test_a_file_that_was_open_before_is_another_containers() -> None:
    bench = Bench()
    recording = bench.record(start("one"))
    bench.recorder.read(1, PROGRAM, 0, 4096)
    assert reads(recording) == []
    assert traced(recording).circumstances.flaws == {Flaw.SHARED}


def test_a_recording_goes_on_in_the_next_process() -> None:
    first = Bench()
    before = first.record(start("one"), Conditions(5, "0.1", 16384, {GLIBC: Lack.COMMITTED}))
    first.open(1, 7)
    first.recorder.read(1, PROGRAM, 2 * BLOCK, 4096)
    second = Bench()
    earlier = traced(before)
    conditions = Conditions(5, "0.1", 16384, {GLIBC: Lack.COMMITTED})
    recording = second.record(start("one"), conditions, earlier)
    recording.interrupted = True
    second.recorder.read(1, PROGRAM, 0, 4096)  # the file is open still
    trace = traced(recording)
    assert trace.extents == (Extent(0, 2 * BLOCK, BLOCK), Extent(0, 0, BLOCK))
    assert trace.circumstances == replace(
        earlier.circumstances, flaws=frozenset({Flaw.INTERRUPTED})
    )


def test_a_start_is_over_when_it_reads_nothing_new_and_waits_for_nothing() -> None:
    bench = Bench()
    recording = bench.record(start("one"))
    bench.clock.now += 1000  # created, and not started
    assert bench.recorder.over(()) == []
    bench.open(1, 7)
    bench.clock.now += 9.9
    assert bench.recorder.over(()) == []
    bench.recorder.read(1, PROGRAM, 0, 4096)
    bench.clock.now += 9.9
    assert bench.recorder.over(()) == []
    bench.recorder.read(1, PROGRAM, 0, 4096)  # nothing new
    bench.clock.now += 0.2
    assert bench.recorder.over([HELLO]) == []
    assert bench.recorder.over([OTHER]) == [(recording, Ending.IDLE)]


def test_a_start_that_does_not_end_is_cut() -> None:
    bench = Bench()
    recording = bench.record(start("one"))
    for offset in range(600):
        bench.open(1, 7)
        bench.clock.now += 1
        bench.recorder.read(1, PROGRAM, offset * BLOCK, 1)
    assert bench.recorder.over([HELLO]) == [(recording, Ending.TIME)]
    for offset in range(600, 16_384):
        bench.recorder.read(1, PROGRAM, offset * BLOCK, 1)
    assert bench.recorder.over(()) == [(recording, Ending.SIZE)]


def test_containers_that_never_start_make_room() -> None:
    bench = Bench()
    started = bench.record(start("started"))
    bench.open(1, 7)
    for number in range(MAX_RECORDINGS - 1):
        assert bench.recorder.add(_armed(bench, f"idle-{number}")) is None
    given_up = bench.recorder.add(_armed(bench, "newest"))
    assert given_up is not None
    assert given_up.start.key == "idle-0"
    assert started in list(bench.recorder.recordings())
    assert "newest" in bench.recorder


def _armed(bench: Bench, key: str) -> Recording:
    return Recording(start(key, OTHER), Conditions(5, "0.1", 0, {}), bench.clock)


def test_when_nothing_is_recorded_nothing_is_kept() -> None:
    asked: list[int] = []

    def path_of(ordinal: int) -> StorePath | None:
        asked.append(ordinal)
        return HELLO

    bench = Bench(path_of=path_of)
    bench.open(1, 7)
    bench.recorder.read(1, PROGRAM, 0, 4096)
    assert asked == []
    assert bench.recorder.take_newly_shown() == [1]
    assert bench.recorder.take_newly_shown() == []
    bench.recorder.shown([5])
    assert bench.recorder.shown_before() == {1, 5}
    bench.record(start("one"))
    for _ in range(3):
        bench.open(1, 7)
    assert asked == [1]


def test_what_is_missing_from_the_start() -> None:
    lazy = replace(start("one", HELLO, GLIBC, OTHER), lazy=frozenset({GLIBC, OTHER}))
    assert lacking(lazy, [GLIBC, HELLO]) == {HELLO: Lack.COMMITTED, GLIBC: Lack.CACHED}


@pytest.mark.parametrize("offset", [0, 5 * BLOCK, SIZE + BLOCK])
def test_reads_beyond_the_end_count_for_nothing(offset: int) -> None:
    bench = Bench()
    recording = bench.record(start("one"))
    bench.open(1, 7)
    bench.recorder.read(1, PROGRAM, offset, 2 * BLOCK)
    assert sum(size for _, size in reads(recording)) == max(0, min(SIZE - offset, 2 * BLOCK))
