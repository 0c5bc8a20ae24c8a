"""What is missing of running containers is asked for once, and again when it may have been forgotten."""

from __future__ import annotations

from collections.abc import Sequence

import trio
from trio.testing import MockClock

from fusesnap.daemon.completion import ASK_AGAIN, Completion
from fusesnap.errors import StorageFailure
from fusesnap.nix.store_path import StorePath

A, B, C = (StorePath(letter * 32, "path") for letter in "abc")


class Bench:
    """A node of which a test says what is missing."""

    def __init__(self) -> None:
        self.missing: list[StorePath] = []
        self.failures = 0
        self.heard = trio.Event()
        self.asked: list[list[StorePath]] = []
        self.completion = Completion(self.look, self.complete)

    def look(self) -> Sequence[StorePath]:
        if self.failures:
            self.failures -= 1
            raise StorageFailure("the disk is gone", 5)
        return list(self.missing)

    def complete(self, paths: Sequence[StorePath]) -> None:
        self.asked.append(list(paths))
        self.heard.set()


async def test_each_path_is_asked_for_once() -> None:
    bench = Bench()
    for missing in ([], [A, B], [A, B], [B], [B, C]):
        bench.missing = missing
        await bench.completion.look()
    assert bench.asked == [[A, B], [C]]


async def test_a_path_that_was_lost_again_is_asked_for_again() -> None:
    bench = Bench()
    for missing in ([A], [], [A]):
        bench.missing = missing
        await bench.completion.look()
    assert bench.asked == [[A], [A]]


async def test_after_a_while_all_are_asked_for_again(mock_clock: MockClock) -> None:
    bench = Bench()
    bench.missing = [A, B]
    for seconds in (0.0, ASK_AGAIN / 2, ASK_AGAIN / 2):
        mock_clock.jump(seconds)
        await bench.completion.look()
    assert bench.asked == [[A, B], [A, B]]


async def test_what_fails_is_tried_again(autojump_clock: MockClock) -> None:
    bench = Bench()
    bench.missing = [A]
    bench.failures = 3
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.completion.run)
        await bench.heard.wait()
        nursery.cancel_scope.cancel()
    assert bench.failures == 0
    assert bench.asked == [[A]]
