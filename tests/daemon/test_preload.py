"""What becomes of each name of ``[preload]``, by what finding and fetching say."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import trio

from fusesnap.daemon import preload
from fusesnap.daemon.build import Node
from fusesnap.daemon.prefetch import Prefetched, Show
from fusesnap.daemon.preload import Preload
from fusesnap.errors import ClosureUnavailable, NotFound, PathNotFound, Unavailable

Outcome = Exception | None


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a preload of names whose attempts end as scripted; returns the attempts and the waits between them."""

    async def run(**outcomes: Sequence[Outcome]) -> tuple[list[str], list[float]]:
        waiting = {name: list(each) for name, each in outcomes.items()}
        attempts: list[str] = []
        waits: list[float] = []
        now = 0.0

        async def prefetch(
            node: Node, names: Sequence[str], show: Show, realise: object
        ) -> Prefetched:
            nonlocal now
            assert realise == "realise"
            await trio.lowlevel.checkpoint()
            (name,) = names
            attempts.append(name)
            outcome = waiting[name].pop(0)
            if outcome is not None:
                raise outcome
            for done in (100, 200):
                now += 6
                show("x", done, 300)
            return Prefetched(1, 300, 1)

        async def sleep(seconds: float) -> None:
            waits.append(seconds)
            await trio.lowlevel.checkpoint()

        monkeypatch.setattr(preload, "prefetch", prefetch)
        made = Preload(
            cast("Node", None),
            list(outcomes),
            cast("Any", "realise"),
            clock=lambda: now,
            sleep=sleep,
        )
        await made.run()
        return attempts, waits

    return run


async def test_one_after_the_other_with_progress(
    run: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert await run(a=[None], b=[None]) == (["a", "b"], [])
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "preload: a: 200 of 300 bytes",
        "preload: a: 1 paths, 300 bytes of NARs: 1 fetched, the rest was there",
        "preload: b: 200 of 300 bytes",
        "preload: b: 1 paths, 300 bytes of NARs: 1 fetched, the rest was there",
    ]


async def test_what_may_come_later_is_tried_again(
    run: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    down = Unavailable("down")
    attempts, waits = await run(a=[down, ClosureUnavailable([down]), None], b=[None])
    assert attempts == ["a", "b", "a", "a"]
    assert waits == [10.0, 20.0]
    assert "preload: a: down; to be tried again" in caplog.text


async def test_the_wait_is_bounded(run: Callable[..., Any]) -> None:
    _, waits = await run(a=[Unavailable("down")] * 9 + [None])
    assert waits[-2:] == [600.0, 600.0]


@pytest.mark.parametrize(
    "error", [PathNotFound("gone"), NotFound("gone"), ClosureUnavailable([PathNotFound("gone")])]
)
async def test_what_nobody_has_is_given_up(
    run: Callable[..., Any], caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    assert await run(a=[error], b=[None]) == (["a", "b"], [])
    (said,) = [record.getMessage() for record in caplog.records if "gone" in record.getMessage()]
    assert "again" not in said
