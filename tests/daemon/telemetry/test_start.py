"""What a start waited for, from records."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.daemon.telemetry.records import HERE, Phase, WaitRecord
from fusesnap.daemon.telemetry.start import (
    NEAREST,
    QUIET,
    Segment,
    bursts,
    cut,
    flattened,
    longest_chain,
    merged,
    segments_of,
    span_of,
    start_of,
    union,
)

from ...cli.waterfall.samples import (
    BEGAN,
    CACHE,
    CHAIN,
    FETCHES,
    MIRROR,
    RECORD,
    base,
    fetch,
    nothing,
    sample,
    wait,
)

spans = st.tuples(st.integers(0, 50), st.integers(0, 20)).map(lambda pair: (pair[0], sum(pair)))


@given(st.lists(spans, max_size=9))
def test_no_other_chain_is_longer_and_nothing_in_it_overlaps(
    waits: list[tuple[float, float]],
) -> None:
    chain = [waits[number] for number in longest_chain(waits)]
    assert all(first[1] <= second[0] for first, second in pairwise(chain))
    found = sum(end - begin for begin, end in chain)
    for count in range(len(waits) + 1):
        for some in combinations(sorted(waits), count):
            if all(first[1] <= second[0] for first, second in pairwise(some)):
                assert sum(end - begin for begin, end in some) <= found


@given(st.lists(spans, max_size=20))
def test_a_moment_is_in_the_union_if_it_is_in_one_of_the_spans(
    some: list[tuple[float, float]],
) -> None:
    whole = merged(some)
    moments = [number + 0.5 for number in range(71)]
    covered = [moment for moment in moments if any(begin < moment < end for begin, end in some)]
    assert covered == [
        moment for moment in moments if any(begin < moment < end for begin, end in whole)
    ]
    assert union(some) == len(covered)
    assert all(first[1] < second[0] for first, second in pairwise(whole))


def test_a_start_ends_when_nothing_has_waited_for_long() -> None:
    first = wait(1, "a", 0, 5)
    within = wait(2, "a", 5 + QUIET, 6 + QUIET)
    later = wait(3, "a", 6 + 2 * QUIET + 1, None)
    assert bursts([first, within, later]) == [[first, within], [later]]
    assert bursts([]) == []


def test_a_wait_that_lasts_keeps_a_start_alive() -> None:
    long, other = wait(1, "a", 0, 100), wait(2, "b", 99 + QUIET, 100 + QUIET)
    assert bursts([long, other]) == [[long, other]]


def test_a_start_begins_with_prepare_unless_that_was_long_ago() -> None:
    soon, late = [wait(1, "a", 3, 4)], [wait(1, "a", 3000, 3001)]
    assert span_of(soon, RECORD, first=True) == (BEGAN, BEGAN + 4)
    assert span_of(late, RECORD, first=True) == (BEGAN + 3000, BEGAN + 3001)
    assert span_of(soon, RECORD, first=False) == (BEGAN + 3, BEGAN + 4)
    assert span_of([], RECORD, first=True) == (BEGAN, RECORD.ended)


def test_a_fetch_goes_through_its_phases() -> None:
    whole = fetch(1, "x", (0, 1, 2, 3, 4))
    assert [(each.phase, each.end - each.begin) for each in segments_of(whole, BEGAN + 9)] == [
        (phase, 1) for phase in (Phase.QUEUED, Phase.ASKING, Phase.TRANSFER, Phase.VERIFY)
    ]


@pytest.mark.parametrize(
    ("steps", "last"), [(1, Phase.QUEUED), (2, Phase.ASKING), (3, Phase.TRANSFER)]
)
def test_a_fetch_that_has_not_ended_lasts_until_it_was_seen(steps: int, last: Phase) -> None:
    whole = fetch(1, "x", (0, 1, 2, 3, 4))
    found = segments_of(replace(whole, steps=whole.steps[:steps], landed=None), BEGAN + 9)
    assert (found[-1].phase, found[-1].end) == (last, BEGAN + 9)


phases = st.builds(
    lambda phase, span: Segment(phase, *span), st.sampled_from(NEAREST), spans
).filter(lambda segment: segment.end > segment.begin)


@given(st.lists(phases, max_size=8))
def test_of_parts_that_are_under_way_together_the_nearest_to_its_end_is_told(
    some: list[Segment],
) -> None:
    found = flattened(some)
    assert all(first.end <= second.begin for first, second in pairwise(found))
    for moment in (number + 0.5 for number in range(71)):
        here = [each.phase for each in some if each.begin < moment < each.end]
        told = [each.phase for each in found if each.begin < moment < each.end]
        assert told == sorted(set(here), key=NEAREST.index)[:1]


def test_parts_of_a_path_are_one_row() -> None:
    first = replace(fetch(1, "x", (0, 0, 1, 2, 2), 100), part=(0, 100))
    second = replace(fetch(1, "x", (1, 1, 1.5, 4, 4), 200), number=2, part=(100, 300))
    (row,) = start_of([wait(1, first.path, 0, 3)], [first, second], RECORD, frozenset()).rows
    assert (row.received, row.expected, row.retries) == (300, 300, 0)
    assert [(each.phase, each.begin, each.end) for each in row.segments] == [
        (Phase.ASKING, 0, 1),
        (Phase.TRANSFER, 1, 4),
    ]


def test_time_in_no_phase_is_the_disks() -> None:
    segments = [Segment(Phase.ASKING, 1, 2), Segment(Phase.TRANSFER, 2, 4)]
    assert cut(segments, 0, 3) == {Phase.ASKING: 1, Phase.TRANSFER: 1, Phase.DISK: 1}
    assert cut([], 0, 3) == {Phase.DISK: 3}


def test_the_sample_is_explained() -> None:
    start = sample()
    assert start.seconds == pytest.approx(2.74)
    assert start.prepared == pytest.approx(0.02)
    assert [row.path[33:] for row in start.rows if row.on_chain] == [
        "redis-7.0.15",
        "glibc-2.40-66",
        "here-already",
    ]
    assert (start.chain_waits, start.later) == (3, 2)
    assert start.chain == pytest.approx(0.9 + 1.68 + 0.03)
    assert start.blocked == pytest.approx(0.9 + 1.68 + 0.03)
    assert sum(start.chain_phases.values()) == pytest.approx(start.chain)
    assert start.chain_phases[Phase.TRANSFER] == pytest.approx(0.55 + 1.1)
    assert start.bytes_by_cache == {CACHE: 3_000_000, MIRROR: 2_600_000}
    assert start.bytes_received == 5_600_000
    assert start.bytes_of_others == 4_000_000
    assert sum(link.mine for link in start.links) == pytest.approx(5_600_000)
    assert sum(link.others for link in start.links) == pytest.approx(4_000_000)


def test_what_others_fetch_is_no_part_of_the_start() -> None:
    rows = {row.path[33:]: row for row in sample().rows}
    assert not rows["java-of-another-container"].mine
    assert rows["a-name-so-long-that-nobody-could-want-to-read-all-of-it-1.0"].mine
    (disk,) = rows["here-already"].segments
    assert disk.phase is Phase.DISK
    assert (disk.begin, disk.end) == pytest.approx((2.71, 2.74))


def test_bytes_from_before_the_start_are_not_counted() -> None:
    long = fetch(1, "redis-7.0.15", (-10, -10, -10, 10, 11), 2_000)
    start = start_of([wait(1, long.path, 0.1, 5)], [long], RECORD, CHAIN)
    assert start.bytes_received == pytest.approx(500, abs=1)


def test_what_was_made_of_other_paths_did_not_cross_the_link() -> None:
    here = fetch(1, "redis-7.0.15", (0, 1, 1, 1, 1), 500)
    here = replace(here, attempts=(replace(here.attempts[0], cache=HERE),))
    came = replace(fetch(1, "redis-7.0.15", (0, 1, 1, 2, 2), 100), number=2)
    start = start_of([wait(1, here.path, 0.1, 5)], [here, came], RECORD, CHAIN)
    assert start.bytes_by_cache == {HERE: 500, CACHE: 100}
    assert start.bytes_received == 100
    assert sum(link.mine for link in start.links) == pytest.approx(100)


def test_a_fetch_that_was_over_before_is_left_out() -> None:
    old = fetch(1, "redis-7.0.15", (-10, -9, -8, -7, -6))
    start = start_of([wait(1, "b", 0.1, 1)], [old], RECORD, CHAIN)
    assert [row.path for row in start.rows] == ["b"]


def test_a_path_that_failed_and_came_the_second_time_is_one_row() -> None:
    failed = replace(fetch(1, "x", (0, 0, 1, 1.5, 2)), error="HTTP 500", received=10)
    again = replace(fetch(1, "x", (3, 3, 4, 5, 6)), number=2)
    waits: list[WaitRecord] = [wait(1, failed.path, 0, 2), wait(2, failed.path, 3, 6)]
    (row,) = start_of(waits, [failed, again], RECORD, frozenset()).rows
    assert row.error is None
    assert [segment.phase for segment in row.segments].count(Phase.TRANSFER) == 2
    assert [wait.on_chain for wait in row.waits] == [True, True]


def test_a_wait_whose_worker_died_lasts_to_the_end_of_the_start() -> None:
    waits = [wait(1, "a", 0, None), wait(2, base(1, "x"), 2, 5)]
    start = start_of(waits, FETCHES, RECORD, CHAIN)
    (row,) = [row for row in start.rows if row.path == "a"]
    assert row.waits[0].end == pytest.approx(5)


def test_a_start_that_waited_for_nothing() -> None:
    start = nothing()
    assert (start.rows, start.chain_waits, start.blocked) == ((), 0, 0)
    assert start.seconds == pytest.approx(0.01)
