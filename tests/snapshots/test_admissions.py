"""Paths are admitted once for all who ask at the same time or a moment later."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import pytest
import trio
import trio.testing

from fusesnap.errors import ClosureUnavailable, PathNotFound
from fusesnap.nix.store_path import StorePath
from fusesnap.snapshots.admissions import BELIEVED_FOR, Admissions

A, B, C = (StorePath(letter * 32, "path") for letter in "abc")


class HeldSource:
    """Answers when it may; ``asked`` has what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[frozenset[StorePath]] = []
        self.may_answer = trio.Event()
        self.failure: ClosureUnavailable | None = None

    async def expect(self, root: StorePath) -> None:
        """Nothing tells of it at once."""

    async def admit(
        self, paths: Collection[StorePath], shown: Collection[StorePath]
    ) -> Mapping[StorePath, int]:
        self.asked.append(frozenset(paths))
        await self.may_answer.wait()
        if self.failure is not None:
            raise self.failure
        return dict.fromkeys(paths, 7)

    async def realise(self, path: StorePath) -> None:
        raise AssertionError(path)

    def prefetch(self, paths: Sequence[StorePath]) -> None:
        raise AssertionError(paths)


@pytest.fixture
def source() -> HeldSource:
    return HeldSource()


async def test_who_asks_for_the_same_waits_and_asks_for_the_rest(source: HeldSource) -> None:
    admissions, answers = Admissions(source), []

    async def admit(*paths: StorePath) -> None:
        answers.append(await admissions.admit(paths, ()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(admit, A, B)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(admit, B, C)
        nursery.start_soon(admit, C)
        await trio.testing.wait_all_tasks_blocked()
        assert source.asked == [{A, B}, {C}]
        source.may_answer.set()
    assert sorted(answers, key=len) == [{C: 7}, {A: 7, B: 7}, {B: 7, C: 7}]
    assert source.asked == [{A, B}, {C}]


async def test_an_answer_is_believed_for_a_while(
    source: HeldSource, autojump_clock: trio.testing.MockClock
) -> None:
    source.may_answer.set()
    admissions = Admissions(source)
    for _ in range(2):
        assert await admissions.admit([A], ()) == {A: 7}
    assert source.asked == [{A}]
    await trio.sleep(BELIEVED_FOR)
    await admissions.admit([A], ())
    assert source.asked == [{A}, {A}]


async def test_a_failure_is_told_to_who_asked_and_others_ask_themselves(
    source: HeldSource,
) -> None:
    admissions = Admissions(source)
    source.failure = ClosureUnavailable([PathNotFound("no cache has it")])
    failed: list[ClosureUnavailable] = []

    async def admit() -> None:
        try:
            await admissions.admit([A], ())
        except ClosureUnavailable as error:
            failed.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(admit)
        await trio.testing.wait_all_tasks_blocked()
        source.may_answer.set()
    assert source.asked == [{A}, {A}]
    assert len(failed) == 2


async def test_who_is_cancelled_leaves_the_others_to_ask(source: HeldSource) -> None:
    admissions = Admissions(source)
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(0):
            await admissions.admit([A], ())
        nursery.start_soon(admissions.admit, [A], ())
        await trio.testing.wait_all_tasks_blocked()
        source.may_answer.set()
    assert source.asked == [{A}, {A}]
