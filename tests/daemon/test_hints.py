"""What the services process tells the worker of starts arrives there."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import trio

from fusesnap.daemon import control
from fusesnap.daemon.hints import HeardHints, HintedStarts, IsForeseen, Programs
from fusesnap.errors import Unavailable
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
        self.brings = False
        self.ready: list[frozenset[StorePath]] = []
        self.send, self.receive = trio.open_memory_channel[tuple[object, ...]](10)

    async def begin(self, start: Start) -> None:
        await self.send.send(("begin", start))

    async def foresee(
        self, closure: ClosureDigest, paths: frozenset[StorePath], carried: StartupTrace | None
    ) -> None:
        await self.send.send(("foresee", closure, paths, carried))

    async def find(self, closure: ClosureDigest, paths: frozenset[StorePath]) -> bool:
        self.bundled.append(closure)
        return self.brings

    async def get_ready(self, paths: frozenset[StorePath]) -> None:
        self.ready.append(paths)

    async def open(self) -> None:
        await self.send.send(("open",))

    async def knows(self, closure: ClosureDigest) -> bool:
        return closure == CLOSURE

    async def follow(
        self, paths: frozenset[StorePath], programs: Programs, is_foreseen: IsForeseen
    ) -> None:
        assert await is_foreseen()
        await self.send.send(("follow", paths, programs))

    async def end(self, key: str) -> None:
        await self.send.send(("end", key))


@pytest.fixture
async def worker(tmp_path: Path, nursery: trio.Nursery) -> Heard:
    heard = Heard()
    hints = HeardHints(
        STORE,
        cast("Traces", heard),
        heard.get_ready,
        heard.find,
        heard.learnt.append,
        heard.follow,
        heard.open,
        nursery,
    )
    await nursery.start(control.serve, tmp_path / "control.sock", hints.calls)
    return heard


async def test_a_start_arrives_with_what_is_lazy_of_it(
    worker: Heard, tmp_path: Path, nursery: trio.Nursery
) -> None:
    starts = HintedStarts(STORE, tmp_path / "control.sock", nursery)
    starts.begins("default/3/one", Path("/s/3/fs"), PATHS, frozenset({HELLO}))
    expected = Start("default/3/one", "/s/3/fs", CLOSURE, PATHS, frozenset({HELLO}))
    assert await worker.receive.receive() == ("begin", expected)
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert worker.learnt == worker.ready == [frozenset({HELLO})]
    starts.ended("default/3/one")
    assert await worker.receive.receive() == ("end", "default/3/one")


async def test_when_a_pull_begins_the_way_to_the_caches_is_opened(
    worker: Heard, tmp_path: Path, nursery: trio.Nursery
) -> None:
    HintedStarts(STORE, tmp_path / "control.sock", nursery).pull_begins()
    assert await worker.receive.receive() == ("open",)


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


async def programs_of(name: str) -> Programs:
    match name:
        case "image":
            return [["/bin/one", "/opt/one"], ["/bin/two"]]
        case "unknown":
            return []
        case _:
            raise Unavailable("containerd: away")


async def test_what_an_image_runs_arrives(
    worker: Heard, tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    starts = HintedStarts(STORE, tmp_path / "control.sock", nursery, programs_of)
    starts.admitted("image", PATHS)
    expected = ("follow", PATHS, [["/bin/one", "/opt/one"], ["/bin/two"]])
    assert await worker.receive.receive() == expected
    with caplog.at_level(logging.INFO):
        starts.admitted("other", PATHS)
        starts.admitted("unknown", PATHS)
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert "other: it is not known what its containers start with: containerd: away" in caplog.text
    assert worker.bundled == [CLOSURE]  # by the first alone


async def test_where_a_bundle_brings_the_start_nothing_is_guessed(
    worker: Heard, tmp_path: Path, nursery: trio.Nursery
) -> None:
    worker.brings = True
    starts = HintedStarts(STORE, tmp_path / "control.sock", nursery, programs_of)
    starts.begins("default/3/one", Path("/s/3/fs"), PATHS, frozenset({HELLO}))
    assert (await worker.receive.receive())[0] == "begin"
    starts.admitted("image", PATHS)
    await trio.testing.wait_all_tasks_blocked(0.01)
    starts.ended("one")
    assert await worker.receive.receive() == ("end", "one")
    assert worker.learnt == [frozenset({HELLO})]
    assert worker.ready == []


async def test_who_is_not_to_know_is_not_told(
    worker: Heard, tmp_path: Path, nursery: trio.Nursery
) -> None:
    starts = HintedStarts(STORE, tmp_path / "control.sock", nursery)
    starts.admitted("image", PATHS)
    starts.ended("one")
    assert await worker.receive.receive() == ("end", "one")


async def test_a_worker_that_is_away_keeps_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with trio.open_nursery() as nursery:
            starts = HintedStarts(STORE, tmp_path / "nowhere.sock", nursery)
            starts.ended("one")
    assert "the worker did not take a hint (end)" in caplog.text
