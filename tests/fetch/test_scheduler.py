"""What is decided, step by step, at times that the test makes up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fusesnap.fetch.gauge import Width
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.scheduler import (
    FAST,
    FIRST_WINDOW,
    LONG_QUIET,
    LOOK_AGAIN,
    NEAR,
    QUIET,
    STARVED,
    TRIAL,
    TURN,
    LinkLimits,
    Load,
    LoadState,
    Scheduler,
)

MIB = 1 << 20


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(LinkLimits())


def add(
    scheduler: Scheduler, priority: Priority, size: int | None = 50 * MIB, source: str = "a"
) -> Load:
    load = Load(priority, source, size)
    scheduler.add(load)
    return load


def passing(scheduler: Scheduler, *busy: Load, seconds: float) -> Iterator[float]:
    """Let time pass, in which those that are ``busy`` and run receive a MiB a second."""
    for step in range(1, int(seconds / LOOK_AGAIN) + 1):
        now = step * LOOK_AGAIN
        for load in busy:
            if load.state is LoadState.RUNNING:
                scheduler.received(load, MIB // 4, now)
        scheduler.decide(now)
        yield now


def test_nothing_starves_and_a_turn_ends(scheduler: Scheduler) -> None:
    reader = add(scheduler, Priority.READER, None)
    trace = add(scheduler, Priority.TRACE)
    completion = add(scheduler, Priority.COMPLETION)
    scheduler.decide(0)
    ran: dict[Load, list[float]] = {trace: [], completion: []}
    for now in passing(scheduler, reader, trace, completion, seconds=4 * STARVED):
        assert reader.state is LoadState.RUNNING
        for load, times in ran.items():
            if load.state is LoadState.RUNNING:
                times.append(now)
        assert trace.state is not LoadState.RUNNING or completion.state is not LoadState.RUNNING
    for times in ran.values():
        assert STARVED <= times[0] <= STARVED + 2 * TURN
        assert len(times) * LOOK_AGAIN <= 4 * TURN


@pytest.mark.parametrize("worked", [0.0, 50.0])
def test_a_reader_whose_cache_is_silent_leaves_the_link_to_others(
    scheduler: Scheduler, worked: float
) -> None:
    reader = add(scheduler, Priority.READER, source="silent")
    completion = add(scheduler, Priority.COMPLETION, source="other")
    for _ in passing(scheduler, reader, seconds=2):
        assert completion.state is LoadState.WAITING
    silent_from = 2.0
    scheduler.fed(reader, 0.0, worked)
    reader.waits_since = silent_from
    times = [silent_from + step * LOOK_AGAIN for step in range(1, 60)]
    ran = []
    for now in times:
        scheduler.decide(now)
        if completion.state is LoadState.RUNNING:
            ran.append(now)
    began = silent_from + TRIAL + QUIET
    assert began <= ran[0] <= began + 2 * LOOK_AGAIN
    assert reader.state is LoadState.RUNNING
    reader.waits_since = None
    for now in (times[-1] + step * LOOK_AGAIN for step in range(8)):
        scheduler.received(reader, MIB, now)
        scheduler.decide(now)
    assert completion.state is LoadState.PAUSED


@pytest.mark.parametrize(("rate", "quiet"), [(FAST // 4, QUIET), (2 * FAST, LONG_QUIET)])
def test_on_a_fast_link_a_start_may_think_for_longer(
    scheduler: Scheduler, rate: int, quiet: float
) -> None:
    reader, completion = add(scheduler, Priority.READER, None), add(scheduler, Priority.COMPLETION)
    for step in range(20):
        scheduler.decide(step / 10)
        scheduler.received(reader, rate // 10, step / 10)
    scheduler.remove(reader)
    assert completion not in scheduler.decide(1.9 + quiet - 0.1)
    assert completion in scheduler.decide(1.9 + quiet + 0.1)
    assert completion.state is LoadState.RUNNING


@pytest.mark.parametrize(
    ("urgent", "answered", "quiet"),
    [
        (Priority.READER, NEAR / 2, LONG_QUIET),
        (Priority.TRACE, NEAR / 2, LONG_QUIET),
        (Priority.READER, 2 * NEAR, QUIET),
    ],
)
def test_a_cache_nearby_is_fast_until_more_is_known(
    scheduler: Scheduler, urgent: Priority, answered: float, quiet: float
) -> None:
    start, completion = add(scheduler, urgent), add(scheduler, Priority.COMPLETION)
    scheduler.decide(0)
    scheduler.asked(start, 0)
    scheduler.received(start, 1000, answered)
    scheduler.decide(answered)
    scheduler.remove(start)
    assert completion not in scheduler.decide(answered + quiet - 0.1)
    assert completion in scheduler.decide(answered + quiet + 0.1)


@pytest.mark.parametrize("then", [None, Priority.READER])
def test_a_start_of_which_all_is_known_may_think_for_longer(
    scheduler: Scheduler, then: Priority | None
) -> None:
    stream = Load(Priority.TRACE, "a", None, foreseen=True)
    scheduler.add(stream)
    completion = add(scheduler, Priority.COMPLETION)
    for step in range(20):
        scheduler.decide(step / 10)
        scheduler.received(stream, FAST // 40, step / 10)
    scheduler.remove(stream)
    if then is not None:  # it reads something else, which makes that no shorter
        reader = add(scheduler, then, 100)
        scheduler.decide(2.0)
        scheduler.remove(reader)
    assert completion not in scheduler.decide(1.9 + LONG_QUIET - 0.1)
    assert completion in scheduler.decide(1.9 + LONG_QUIET + 0.1)


def test_it_says_nothing_of_what_stays_as_it_is(scheduler: Scheduler) -> None:
    reader, rest = add(scheduler, Priority.READER), add(scheduler, Priority.REST)
    assert scheduler.decide(0) == [reader]
    assert scheduler.decide(1) == []
    scheduler.remove(reader)
    assert scheduler.decide(2) == [rest]
    assert scheduler.looks_again() is None


def test_a_window_holds_twice_what_is_on_its_way(scheduler: Scheduler) -> None:
    assert scheduler.window("a") == FIRST_WINDOW
    load = add(scheduler, Priority.READER, None)
    scheduler.decide(0)
    scheduler.asked(load, 0)
    for step in range(1, 41):
        scheduler.received(load, MIB, step * 0.25)
    assert scheduler.round_trip("a") == 0.25
    assert scheduler.rate == pytest.approx(4 * MIB)
    assert scheduler.window("a") == pytest.approx(2 * MIB)
    assert scheduler.window("b") == FIRST_WINDOW


def test_small_files_say_nothing_of_what_the_link_carries(scheduler: Scheduler) -> None:
    for step in range(1, 41):
        load = add(scheduler, Priority.READER, 1000)
        scheduler.decide(step * 0.25)
        scheduler.received(load, 1000, step * 0.25)
        scheduler.remove(load)
    assert scheduler.rate == 0
    assert scheduler.window("a") == FIRST_WINDOW


@pytest.mark.parametrize("priority", [Priority.TRACE, Priority.READER])
def test_what_runs_goes_on_until_the_first_byte_of_what_nobody_waits_for(
    scheduler: Scheduler, priority: Priority
) -> None:
    rest = add(scheduler, Priority.REST)
    scheduler.decide(0)
    urgent = add(scheduler, priority)
    late = add(scheduler, Priority.REST, 100)
    scheduler.decide(1)
    runs = LoadState.PAUSED if priority is Priority.READER else LoadState.RUNNING
    assert (urgent.state, rest.state, late.state) == (LoadState.RUNNING, runs, LoadState.WAITING)
    scheduler.received(urgent, 1000, 2)
    scheduler.decide(2)
    assert (urgent.state, rest.state) == (LoadState.RUNNING, LoadState.PAUSED)


def test_a_held_connection_counts_but_for_readers() -> None:
    scheduler = Scheduler(LinkLimits(connections=1))
    rest = add(scheduler, Priority.REST)
    scheduler.decide(0)
    rest.holds = True
    reader = add(scheduler, Priority.READER)
    assert scheduler.decide(1) == [reader, rest]
    assert [reader.state, rest.state] == [LoadState.RUNNING, LoadState.PAUSED]
    scheduler.remove(reader)
    trace = add(scheduler, Priority.TRACE)
    scheduler.decide(2)
    assert [trace.state, rest.state] == [LoadState.WAITING, LoadState.RUNNING]


def test_those_of_unknown_size_are_taken_for_large() -> None:
    scheduler = Scheduler(LinkLimits(transfers=8))
    for _ in range(4):
        add(scheduler, Priority.READER, None)
    assert len(scheduler.decide(0)) == 2


def test_one_more_transfer_is_given_up_where_it_brings_nothing() -> None:
    width = Width(8)
    received, tried = 0, []
    for second in range(40):
        width.look(second, received, limits=True)
        tried.append(width.value)
        received += 1000
    assert set(tried) == {1, 2}
    assert tried.count(2) < 10


def test_as_many_transfers_as_bring_more_are_found() -> None:
    width = Width(8)
    received = 0
    for second in range(40):
        width.look(second, received, limits=True)
        received += 1000 * min(width.value, 5)
    assert width.value in (5, 6)


@pytest.mark.parametrize("modest", [True, False])
def test_others_use_the_link_while_a_modest_reader_waits_for_its_first_byte(
    scheduler: Scheduler, modest: bool
) -> None:
    reader = Load(Priority.READER, "a", 10_000, modest)
    scheduler.add(reader)
    rest = add(scheduler, Priority.REST)
    scheduler.decide(0)
    assert reader.state is LoadState.RUNNING
    assert rest.state is (LoadState.RUNNING if modest else LoadState.WAITING)


def test_a_modest_reader_that_has_much_to_come_has_the_link_for_itself(
    scheduler: Scheduler,
) -> None:
    reader = Load(Priority.READER, "a", 50 * MIB, modest=True)
    scheduler.add(reader)
    rest = add(scheduler, Priority.REST)
    scheduler.decide(0)
    assert (reader.state, rest.state) == (LoadState.RUNNING, LoadState.WAITING)
