"""Requests that wait: seen, counted, and ended from outside."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from fusesnap.errors import DeadlineExceeded, PathNotFound, ReaderReleased, StorageFailure
from fusesnap.fetch.flight import Flight, Reader
from fusesnap.filesystem.error_counts import ErrorCount, ErrorCounts
from fusesnap.filesystem.operations import errno_of
from fusesnap.filesystem.wait_events import Answered, Blocked, WaitEvent
from fusesnap.filesystem.waiting import Openers, Question, WaitingRequests
from fusesnap.nix.store_path import StorePath

PATH = StorePath("0" * 32, "path")
OTHER = StorePath("1" * 32, "other")

Watch = Callable[[Flight], None]


def table() -> WaitingRequests:
    return WaitingRequests(lambda pid: Reader(pid, f"program-{pid}"), ErrorCounts())


def question(path: StorePath = PATH, pid: int | None = 7, inode: int = 1) -> Question:
    return Question("lookup", path, inode, b"bin", pid)


def flight_from(cache: str, expected: int) -> Flight:
    flight = Flight(PATH)
    flight.begin(cache, expected)
    return flight


async def never(watch: Watch) -> str:
    await trio.sleep_forever()
    raise AssertionError("unreachable")


async def test_what_is_answered_leaves_the_table(autojump_clock: MockClock) -> None:
    waiting = table()

    async def fetch(watch: Watch) -> str:
        assert len(waiting) == 1
        await trio.sleep(3)
        return "tree"

    assert await waiting.wait(question(), fetch) == "tree"
    assert len(waiting) == 0
    assert waiting.errors.all() == []


async def test_who_waits_for_what_is_shown_the_longest_wait_first(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    waiting = table()
    flight = flight_from("http://cache", 4000)

    async def fetch(watch: Watch) -> str:
        watch(flight)
        return await never(watch)

    nursery.start_soon(waiting.wait, question(), fetch)
    await trio.sleep(10)
    flight.progress(1000)
    nursery.start_soon(waiting.wait, question(OTHER, pid=8), never)
    await trio.sleep(2)
    first, second = waiting.states()
    assert (first.question, first.readers) == (question(), (Reader(7, "program-7"),))
    assert first.asked
    assert first.seconds == pytest.approx(12)
    assert first.flight is not None
    assert (first.flight.cache, first.flight.received) == ("http://cache", 1000)
    assert first.flight.idle == pytest.approx(2)
    assert first.flight.rate == pytest.approx(1000 / 12)
    assert second.flight is None
    assert second.seconds == pytest.approx(2)
    nursery.cancel_scope.cancel()


async def test_where_nobody_says_who_reads_the_last_openers_are_shown(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    waiting = table()
    waiting.opened(1, 5)
    waiting.opened(1, 6)
    waiting.opened(2, 9)
    nursery.start_soon(waiting.wait, question(pid=None, inode=1), never)
    nursery.start_soon(waiting.wait, question(pid=None, inode=3), never)
    await trio.sleep(1)
    states = {state.question.inode: state for state in waiting.states()}
    known, unknown = states[1], states[3]
    assert [reader.pid for reader in known.readers] == [5, 6]
    assert not known.asked
    assert unknown.readers == ()
    nursery.cancel_scope.cancel()


async def test_released_waits_end_with_an_error_that_names_the_path_and_the_reason(
    autojump_clock: MockClock,
) -> None:
    waiting = table()
    raised: list[ReaderReleased] = []

    async def reader(asked: Question) -> None:
        with pytest.raises(ReaderReleased) as caught:
            await waiting.wait(asked, never)
        raised.append(caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader, question())
        nursery.start_soon(reader, question(pid=8))
        nursery.start_soon(reader, question(OTHER, pid=9))
        await trio.sleep(2)
        count = waiting.release(lambda each: each.question.path == PATH, "somebody cancelled it")
        assert count == 2
        # What is on its way out already does not count a second time.
        assert waiting.release(lambda each: each.question.path == PATH, "again") == 0
        await trio.sleep(1)
        assert [state.question.path for state in waiting.states()] == [OTHER]
        assert waiting.release(lambda each: True, "the rest") == 1
    assert f"{PATH}: waited 2.0 s for an answer when somebody cancelled it" in str(raised[0])
    assert {errno_of(error) for error in raised} == {errno.EIO}
    assert [(each.kind, each.count) for each in waiting.errors.all()] == [("released", 3)]


async def test_a_reader_that_is_being_killed_is_answered(autojump_clock: MockClock) -> None:
    waiting = table()
    dying: set[int] = set()
    outcome: list[ReaderReleased] = []

    async def reader() -> None:
        with pytest.raises(ReaderReleased) as caught:
            await waiting.wait(question(), never)
        outcome.append(caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.release_killed, dying.__contains__)
        nursery.start_soon(reader)
        await trio.sleep(30)
        assert len(waiting) == 1
        dying.add(7)
        await trio.sleep(1)
        assert len(waiting) == 0
        nursery.cancel_scope.cancel()
    assert errno_of(outcome[0]) == errno.EINTR


async def test_a_request_that_several_may_have_made_is_kept_for_the_living(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    waiting = table()
    waiting.opened(1, 5)
    waiting.opened(1, 6)
    dying = {5}
    nursery.start_soon(waiting.release_killed, dying.__contains__)
    nursery.start_soon(waiting.wait, question(pid=None), never)
    nursery.start_soon(waiting.wait, question(pid=None, inode=2), never)  # nobody is known
    await trio.sleep(30)
    assert len(waiting) == 2
    nursery.cancel_scope.cancel()


async def test_nobody_looks_after_requests_that_are_young(autojump_clock: MockClock) -> None:
    waiting = table()
    looked: list[int] = []

    def look(pid: int) -> bool:
        looked.append(pid)
        return False

    async def quick(watch: Watch) -> str:
        await trio.sleep(0.9)
        return "tree"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.release_killed, look)
        for _ in range(5):
            await waiting.wait(question(), quick)
        nursery.cancel_scope.cancel()
    assert looked == []


async def test_the_end_of_the_process_is_no_error(autojump_clock: MockClock) -> None:
    waiting = table()
    with trio.move_on_after(1):
        await waiting.wait(question(), never)
    assert len(waiting) == 0
    assert waiting.errors.all() == []


async def test_errors_are_counted_by_kind_and_cache() -> None:
    waiting = table()

    async def stall(watch: Watch) -> str:
        watch(flight_from("http://slow", 10))
        raise DeadlineExceeded(f"{PATH}: no progress")

    async def absent(watch: Watch) -> str:
        raise PathNotFound(f"{PATH}: nowhere")

    for fetch, times in ((stall, 2), (absent, 1)):
        for _ in range(times):
            with pytest.raises((DeadlineExceeded, PathNotFound)):
                await waiting.wait(question(), fetch)
    assert waiting.errors.all() == [
        ErrorCount("deadline", "http://slow", 2, f"{PATH}: no progress"),
        ErrorCount("not found", None, 1, f"{PATH}: nowhere"),
    ]


def test_a_full_disk_is_told_apart() -> None:
    counts = ErrorCounts()
    counts.count(StorageFailure("full", errno.ENOSPC), None)
    counts.count(ValueError("a bug"), None)
    assert [each.kind for each in counts.all()] == ["disk", "unexpected"]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9))))
def test_openers_are_the_last_ones_each_once(opened: list[tuple[int, int]]) -> None:
    openers = Openers()
    for inode, pid in opened:
        openers.remember(inode, pid)
    for inode in range(10):
        newest_first = [pid for where, pid in reversed(opened) if where == inode]
        expected = list(dict.fromkeys(newest_first))[: Openers.EACH]
        assert list(reversed(openers.of(inode))) == expected


def test_openers_of_many_files_are_forgotten() -> None:
    openers = Openers()
    for inode in range(Openers.INODES + 10):
        openers.remember(inode, 1)
    assert openers.of(9) == ()
    assert openers.of(10) == (1,)


async def test_each_wait_is_told_of_with_its_beginning_and_its_end(
    autojump_clock: MockClock,
) -> None:
    heard: list[WaitEvent] = []
    waiting = WaitingRequests(lambda pid: Reader(pid, "cat"), ErrorCounts(), heard.append)
    missing = PathNotFound("nobody has it")

    async def fetch(watch: Watch) -> str:
        return "tree"

    async def fail(watch: Watch) -> str:
        raise missing

    await waiting.wait(question(), fetch)
    with pytest.raises(PathNotFound):
        await waiting.wait(question(OTHER, pid=None), fail)
    with trio.move_on_after(1):
        await waiting.wait(question(), never)
    assert heard == [
        Blocked(1, question(), (Reader(7, "cat"),)),
        Answered(1),
        Blocked(2, question(OTHER, pid=None), ()),
        Answered(2, missing),
        Blocked(3, question(), (Reader(7, "cat"),)),
        Answered(3, cancelled=True),
    ]


async def test_one_who_is_released_hears_why(autojump_clock: MockClock) -> None:
    heard: list[WaitEvent] = []
    waiting = WaitingRequests(lambda pid: Reader(pid, "cat"), ErrorCounts(), heard.append)
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(ReaderReleased):
                await waiting.wait(question(), never)

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        waiting.release(lambda _: True, "somebody said so")
    ended = heard[-1]
    assert isinstance(ended, Answered)
    assert isinstance(ended.error, ReaderReleased)
