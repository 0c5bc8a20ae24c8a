from __future__ import annotations

import pytest

from fusesnap.errors import DeadlineExceeded, PathNotFound, Unavailable
from fusesnap.substituter.retry import Refusal, Retries, RetryPolicy, Throttled, may_mend


def waits(retries: Retries, count: int) -> list[float | None]:
    return [retries.next_wait() for _ in range(count)]


def test_waits_double_up_to_the_longest() -> None:
    policy = RetryPolicy(attempts=9, first_wait=1, longest_wait=8, total=1000, random=lambda: 1.0)
    assert waits(policy.start(), 6) == [1, 2, 4, 8, 8, 8]


def test_chance_takes_up_to_half_of_a_wait() -> None:
    policy = RetryPolicy(attempts=9, first_wait=1, longest_wait=8, total=1000, random=lambda: 0.0)
    assert waits(policy.start(), 4) == [0.5, 1, 2, 4]


def test_attempts_include_the_first() -> None:
    assert waits(RetryPolicy(attempts=3, random=lambda: 1.0).start(), 3)[2] is None
    assert waits(RetryPolicy(attempts=1).start(), 1) == [None]


def test_waits_add_up_to_no_more_than_the_total() -> None:
    policy = RetryPolicy(attempts=100, first_wait=1, longest_wait=4, total=10, random=lambda: 1.0)
    assert waits(policy.start(), 5) == [1, 2, 4, None, None]


def test_many_attempts_do_not_overflow() -> None:
    policy = RetryPolicy(attempts=10_000, total=float("inf"), random=lambda: 1.0)
    assert waits(policy.start(), 9_000)[-1] == policy.longest_wait


def test_progress_begins_anew() -> None:
    policy = RetryPolicy(attempts=2, first_wait=1, total=1, random=lambda: 1.0)
    retries = policy.start()
    assert waits(retries, 1) == [1]
    retries.progressed()
    assert waits(retries, 1) == [1]
    retries.progressed()
    assert retries.next_wait() == 1
    assert retries.next_wait() is None


def test_cache_that_names_a_time_is_left_alone_for_it() -> None:
    policy = RetryPolicy(first_wait=1, total=20, random=lambda: 1.0)
    assert policy.start().next_wait(at_least=15) == 15
    assert policy.start().next_wait(at_least=21) is None


@pytest.mark.parametrize(
    ("error", "mends"),
    [
        (Unavailable("500"), True),
        (DeadlineExceeded("late"), True),
        (Throttled("429", 3), True),
        (Refusal("401"), False),
        (PathNotFound("404"), False),
        (None, False),
    ],
)
def test_what_may_mend(error: Unavailable | None, mends: bool) -> None:
    assert may_mend(error) is mends


async def test_wait_sleeps_and_then_gives_up() -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    retries = RetryPolicy(attempts=3, first_wait=1, random=lambda: 1.0, sleep=sleep).start()
    await retries.wait(Unavailable("first"))
    await retries.wait(Throttled("second", 7))
    last = Unavailable("third")
    with pytest.raises(Unavailable) as caught:
        await retries.wait(last)
    assert caught.value is last
    assert slept == [1, 7]


async def test_refusal_is_not_waited_for() -> None:
    refusal = Refusal("401")
    with pytest.raises(Refusal) as caught:
        await RetryPolicy().start().wait(refusal)
    assert caught.value is refusal
