"""The circuit breaker on a clock that only the test moves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.substituter.breaker import Breaker, BreakerPolicy, BreakerState

POLICY = BreakerPolicy(failures=3, first_pause=2, longest_pause=10, random=lambda: 1.0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(clock, POLICY)


def fail(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        breaker.begin()
        breaker.fail()


def test_a_few_failures_leave_it_closed(breaker: Breaker) -> None:
    fail(breaker, 2)
    assert (breaker.state, breaker.wait(), breaker.failures) == (BreakerState.CLOSED, 0, 2)
    breaker.succeed()
    fail(breaker, 2)
    assert breaker.state is BreakerState.CLOSED


def test_failures_in_a_row_open_it_and_then_one_request_tries(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker, 3)
    assert (breaker.state, breaker.wait()) == (BreakerState.OPEN, 2)
    clock.now += 1.5
    assert breaker.wait() == 0.5
    clock.now += 0.5
    assert (breaker.state, breaker.wait()) == (BreakerState.HALF_OPEN, 0)
    assert breaker.begin()
    assert breaker.wait() > 0
    assert not breaker.begin()
    breaker.succeed()
    assert (breaker.state, breaker.wait(), breaker.failures) == (BreakerState.CLOSED, 0, 0)


def test_pauses_double_up_to_the_longest_and_begin_anew_after_a_success(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker, 3)
    pauses = []
    for _ in range(5):
        pauses.append(breaker.wait())
        clock.now += breaker.wait()
        fail(breaker)
    assert pauses == [2, 4, 8, 10, 10]
    clock.now += breaker.wait()
    breaker.begin()
    breaker.succeed()
    fail(breaker, 3)
    assert breaker.wait() == 2


def test_requests_that_were_under_way_do_not_make_the_pause_longer(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker, 128)
    assert (breaker.wait(), breaker.failures) == (2, 128)
    clock.now += 2
    fail(breaker)
    assert breaker.wait() == 4


def test_a_try_that_is_given_up_leaves_it_to_another(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 2
    assert breaker.begin()
    breaker.abandon()
    assert (breaker.state, breaker.wait()) == (BreakerState.HALF_OPEN, 0)
    assert breaker.begin()


def test_a_late_success_of_an_earlier_request_closes_it(breaker: Breaker) -> None:
    fail(breaker, 3)
    breaker.succeed()
    assert breaker.state is BreakerState.CLOSED


def test_chance_takes_up_to_half_of_a_pause(clock: Clock) -> None:
    breaker = Breaker(clock, BreakerPolicy(failures=1, first_pause=2, random=lambda: 0.0))
    fail(breaker)
    assert breaker.wait() == 1


@given(st.lists(st.sampled_from(["begin", "fail", "succeed", "abandon", "pass"]), max_size=60))
def test_whatever_happens_it_lets_a_request_through_in_time(steps: list[str]) -> None:
    clock = Clock()
    breaker = Breaker(clock, POLICY)
    for step in steps:
        if step == "pass":
            clock.now += 1
        else:
            getattr(breaker, step)()
    assert 0 <= breaker.wait() <= POLICY.longest_pause
    breaker.abandon()
    clock.now += POLICY.longest_pause
    assert breaker.wait() == 0
