"""What the services process tells the worker of starts arrives there."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import trio

from fusesnap.daemon import control
from fusesnap.daemon.traces import HintedStarts, calls
from fusesnap.fetch.traces.recording import Start
from fusesnap.fetch.traces.traces import Traces
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.startup_trace import StartupTrace
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.trace_labels import trace_labels

from ..nix.traces import DATA, GLIBC, HELLO, example

STORE = StoreDir()
PATHS = frozenset({HELLO, GLIBC, DATA})
CLOSURE = ClosureDigest.of(PATHS, STORE)


class Heard:
    """Writes down what a worker would do."""

    def __init__(self) -> None:
        self.learnt: list[frozenset[StorePath]] = []
        self.bundled: list[ClosureDigest] = []
        self.send, self.receive = trio.open_memory_channel[tuple[object, ...]](10)

    async def begin(self, start: Start) -> None:
        await self.send.send(("begin", start))

    async def foresee(
        self, closure: ClosureDigest, paths: frozenset[StorePath], carried: StartupTrace | None
    ) -> None:
        await self.send.send(("foresee", closure, paths, carried))

    async def find(self, closure: ClosureDigest, paths: frozenset[StorePath]) -> bool:
        self.bundled.append(closure)
        return False

    async def end(self, key: str) -> None:
        await self.send.send(("end", key))


@pytest.fixture
async def worker(tmp_path: Path, nursery: trio.Nursery) -> Heard:
    heard = Heard()
    answers = calls(STORE, cast("Traces", heard), heard.find, heard.learnt.append, nursery)
    await nursery.start(control.serve, tmp_path / "control.sock", answers)
    return heard


async def test_a_start_arrives_with_what_is_lazy_of_it(
    worker: Heard, tmp_path: Path, nursery: trio.Nursery
) -> None:
    starts = HintedStarts(STORE, tmp_path / "control.sock", nursery)
    starts.begins("default/3/one", Path("/s/3/fs"), PATHS, frozenset({HELLO}))
    expected = Start("default/3/one", "/s/3/fs", CLOSURE, PATHS, frozenset({HELLO}))
    assert await worker.receive.receive() == ("begin", expected)
    assert worker.learnt == [frozenset({HELLO})]
    starts.ended("default/3/one")
    assert await worker.receive.receive() == ("end", "default/3/one")


async def test_an_image_arrives_with_the_trace_that_it_carries(
    worker: Heard, tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    starts = HintedStarts(STORE, tmp_path / "control.sock", nursery)
    trace = replace(example(), closure=CLOSURE)
    starts.foreseen(PATHS, {"other": "x", **trace_labels(trace)})
    assert await worker.receive.receive() == ("foresee", CLOSURE, PATHS, trace)
    starts.foreseen(PATHS, {})
    assert await worker.receive.receive() == ("foresee", CLOSURE, PATHS, None)
    starts.foreseen(PATHS, dict.fromkeys(trace_labels(trace), "damaged"))
    assert await worker.receive.receive() == ("foresee", CLOSURE, PATHS, None)
    assert "the trace that an image carries is not used: label" in caplog.text


async def test_a_worker_that_is_away_keeps_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with trio.open_nursery() as nursery:
            starts = HintedStarts(STORE, tmp_path / "nowhere.sock", nursery)
            starts.ended("one")
    assert "the worker did not take a hint (end)" in caplog.text
