"""A waiter's clock counts time without progress."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from fusesnap.errors import DeadlineExceeded, Unavailable
from fusesnap.fetch.flight import Flight, Progress, Reader
from fusesnap.fetch.link import open_link
from fusesnap.fetch.priority import Priority
from fusesnap.nix.nar import NarEnd, Symlink
from fusesnap.nix.store_path import StorePath
from fusesnap.nix.tree import Tree, TreeBuilder

PATH = StorePath("0" * 32, "path")


def tree() -> Tree:
    builder = TreeBuilder()
    builder.receive(Symlink(b"", b"target"))
    builder.receive(NarEnd())
    return builder.tree()


async def test_everybody_gets_what_lands(autojump_clock: MockClock) -> None:
    flight = Flight(PATH)
    landed = tree()
    found = []

    async def wait() -> None:
        found.append(await flight.wait(10, None))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(wait)
        await trio.sleep(5)
        assert flight.state().waiting == 3
        flight.land(landed)
    assert found == [landed] * 3
    assert flight.state().waiting == 0


async def test_without_progress_a_waiter_gives_up_and_says_what_came(
    autojump_clock: MockClock,
) -> None:
    flight = Flight(PATH)
    flight.begin("http://cache", 1000)
    flight.progress(250)
    with pytest.raises(
        DeadlineExceeded, match=r"no progress for 10 s: 250 of 1000 .* http://cache"
    ):
        await flight.wait(10, None)
    assert trio.current_time() == pytest.approx(10)


async def test_as_long_as_bytes_come_it_waits(autojump_clock: MockClock) -> None:
    flight = Flight(PATH)
    flight.begin("http://cache", None)

    async def trickle() -> None:
        for _ in range(100):
            await trio.sleep(9)
            flight.progress(1)
        flight.land(tree())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trickle)
        await flight.wait(10, None)
    assert trio.current_time() == pytest.approx(900)


async def test_what_went_wrong_reaches_every_waiter() -> None:
    flight = Flight(PATH)
    flight.land(Unavailable("down"))
    for _ in range(2):
        with pytest.raises(Unavailable, match="down"):
            await flight.wait(10, None)


async def test_the_last_readers_are_remembered_and_no_more() -> None:
    flight = Flight(PATH)
    flight.land(tree())
    for pid in range(50):
        await flight.wait(10, Reader(pid, "cat"))
    pids = [reader.pid for reader in flight.state().readers]
    assert pids == list(range(50 - Flight.READERS_KEPT, 50))


async def test_a_cancelled_waiter_is_gone(autojump_clock: MockClock) -> None:
    flight = Flight(PATH)
    with trio.move_on_after(1):
        await flight.wait(10, None)
    assert flight.state().waiting == 0


async def test_before_its_turn_the_progress_of_others_counts(autojump_clock: MockClock) -> None:
    line = Progress()
    flying, queued = Flight(PATH, line), Flight(PATH, line)
    flying.board()
    flying.begin("http://cache", None)

    async def trickle() -> None:
        for _ in range(100):
            await trio.sleep(9)
            flying.progress(1)
        assert queued.state().queued
        queued.board()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trickle)
        with pytest.raises(DeadlineExceeded):
            await queued.wait(10, None)
    assert trio.current_time() == pytest.approx(910)


async def test_a_rate_is_of_late(autojump_clock: MockClock) -> None:
    flight = Flight(PATH)
    flight.begin("http://cache", None)
    for _ in range(100):
        await trio.sleep(1)
        flight.progress(1000)
    assert flight.state().rate == pytest.approx(1000)
    await trio.sleep(1000)
    assert flight.state().rate < 20
    assert flight.state().idle == pytest.approx(1000)


async def test_a_path_is_as_urgent_as_who_wants_it(autojump_clock: MockClock) -> None:
    flight = Flight(PATH, priority=Priority.COMPLETION)
    assert flight.state().priority is Priority.COMPLETION
    with trio.move_on_after(1):
        await flight.outcome(10)
    assert flight.state().priority is Priority.COMPLETION
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flight.wait, 10, None)
        await trio.sleep(1)
        assert flight.state().priority is Priority.READER
        nursery.cancel_scope.cancel()
    assert flight.state().priority is Priority.COMPLETION
    flight.want(Priority.TRACE)
    flight.want(Priority.PREFETCH)
    assert flight.state().priority is Priority.TRACE


async def test_what_a_reader_asked_for_is_not_urgent_any_more_when_he_has_given_up() -> None:
    flight = Flight(PATH, priority=Priority.READER)
    assert flight.state().priority is Priority.REST


async def test_while_a_path_is_paused_its_waiters_clock_stands_still(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    link, flight = open_link(nursery), Flight(PATH, Progress())
    with link.passage(Priority.REST, "a", 1_000_000) as passage, flight.crossing(passage):
        flight.begin("http://cache", 1_000_000)

        async def read_for(seconds: float) -> None:
            with link.passage(Priority.READER, "b", None):
                assert flight.state().paused
                await trio.sleep(seconds)

        nursery.start_soon(read_for, 1.5)
        await trio.sleep(0.1)
        with pytest.raises(DeadlineExceeded):
            await flight.outcome(1)
    assert trio.current_time() == pytest.approx(2.5, abs=0.1)
