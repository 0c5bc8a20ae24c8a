"""Work that several want at once."""

from __future__ import annotations

import pytest
import trio

from fusesnap.errors import PathNotFound, Unavailable
from fusesnap.services.shared_work import SharedWork


class Work:
    """Work that a test lets go on. ``tidying`` holds it up when it is cancelled."""

    def __init__(self) -> None:
        self.begun = 0
        self.ended = 0
        self.gate = trio.Event()
        self.tidying: trio.Event | None = None

    async def __call__(self) -> int:
        self.begun += 1
        try:
            await self.gate.wait()
        finally:
            if self.tidying is not None:
                with trio.CancelScope(shield=True):
                    await self.tidying.wait()
            self.ended += 1
        return self.begun


@pytest.fixture
def shared(nursery: trio.Nursery) -> SharedWork[int]:
    return SharedWork[int](nursery)


async def test_it_is_done_once_for_all(shared: SharedWork[int], nursery: trio.Nursery) -> None:
    work, results = Work(), []

    async def want() -> None:
        results.append(await shared.result("a", work))

    nursery.start_soon(want)
    nursery.start_soon(want)
    await trio.testing.wait_all_tasks_blocked()
    work.gate.set()
    await trio.testing.wait_all_tasks_blocked()
    assert results == [1, 1]
    assert await shared.result("a", work) == 2  # the next one does it anew


async def test_other_work_is_other_work(shared: SharedWork[int], nursery: trio.Nursery) -> None:
    work = Work()
    nursery.start_soon(shared.result, "a", work)
    nursery.start_soon(shared.result, "b", work)
    await trio.testing.wait_all_tasks_blocked()
    assert work.begun == 2
    work.gate.set()


async def test_it_goes_on_while_one_waits_and_ends_with_the_last(
    shared: SharedWork[int], nursery: trio.Nursery
) -> None:
    work, first, second = Work(), trio.CancelScope(), trio.CancelScope()

    async def want(scope: trio.CancelScope) -> None:
        with scope:
            await shared.result("a", work)

    nursery.start_soon(want, first)
    nursery.start_soon(want, second)
    await trio.testing.wait_all_tasks_blocked()
    first.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert work.ended == 0
    second.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert (work.begun, work.ended) == (1, 1)


async def test_what_was_given_up_tidies_up_before_the_next_begins(
    shared: SharedWork[int], nursery: trio.Nursery
) -> None:
    work = Work()
    work.tidying = trio.Event()
    with trio.CancelScope() as scope:
        nursery.start_soon(shared.result, "other", Work())
        async with trio.open_nursery() as own:
            own.start_soon(shared.result, "a", work)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    work.gate.set()
    results = []

    async def again() -> None:
        results.append(await shared.result("a", work))

    nursery.start_soon(again)
    await trio.testing.wait_all_tasks_blocked()
    assert work.begun == 1
    work.tidying.set()
    await trio.testing.wait_all_tasks_blocked()
    assert results == [2]
    nursery.cancel_scope.cancel()


async def test_everybody_is_told_why_it_failed(
    shared: SharedWork[int], nursery: trio.Nursery
) -> None:
    gate, told = trio.Event(), []

    async def fail() -> int:
        await gate.wait()
        raise PathNotFound("no cache has it")

    async def want() -> None:
        try:
            await shared.result("a", fail)
        except PathNotFound as error:
            told.append(str(error))

    nursery.start_soon(want)
    nursery.start_soon(want)
    await trio.testing.wait_all_tasks_blocked()
    gate.set()
    await trio.testing.wait_all_tasks_blocked()
    assert told == ["no cache has it"] * 2


async def test_at_the_end_of_the_daemon_who_waits_is_told() -> None:
    async with trio.open_nursery() as own:
        shared = SharedWork[int](own)
        async with trio.open_nursery() as nursery:

            async def want() -> None:
                with pytest.raises(Unavailable, match="stopping"):
                    await shared.result("a", Work())

            nursery.start_soon(want)
            await trio.testing.wait_all_tasks_blocked()
            own.cancel_scope.cancel()
            # The one who waits is in another scope, as calls that are under way are.
