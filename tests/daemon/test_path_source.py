"""One process of a node fetches; the others ask it, and help themselves while it is away."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from fusesnap.daemon import control
from fusesnap.daemon.path_source import HintingPathSource
from fusesnap.errors import PathNotFound
from fusesnap.fetch.realiser import Realiser
from fusesnap.fetch.unpack_frames import encode_error
from fusesnap.nix.store_path import StoreDir, StorePath

PATH = StorePath("a" * 32, "path")


class Own:
    """A realiser of this process that notes what it had to do."""

    def __init__(self) -> None:
        self.realised: list[StorePath] = []

    async def realise(self, path: StorePath) -> None:
        self.realised.append(path)


class Worker:
    """What the worker answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any, Any]] = []
        self.heard = trio.Event()
        self.answer: dict[str, Any] = {}

    async def hear(self, question: Mapping[str, Any]) -> dict[str, Any]:
        paths = question.get("path", question.get("paths"))
        self.asked.append((question["call"], paths, question.get("priority")))
        self.heard.set()
        return self.answer


@pytest.fixture
def own() -> Own:
    return Own()


@pytest.fixture
def source(own: Own, tmp_path: Path, nursery: trio.Nursery) -> HintingPathSource:
    return HintingPathSource(cast(Realiser, own), StoreDir(), tmp_path / "s", nursery)


@pytest.fixture
async def worker(tmp_path: Path, nursery: trio.Nursery) -> Worker:
    worker = Worker()
    calls = {"fetch": worker.hear}
    serve = partial(control.serve, patient={"realise": worker.hear})
    await nursery.start(serve, tmp_path / "s", calls)
    return worker


async def test_the_worker_fetches(source: HintingPathSource, own: Own, worker: Worker) -> None:
    await source.realise(PATH)
    assert worker.asked == [("realise", str(StoreDir().format(PATH)), None)]
    assert own.realised == []


async def test_what_the_worker_cannot_have_is_told_as_it_is(
    source: HintingPathSource, own: Own, worker: Worker
) -> None:
    worker.answer = {"failed": encode_error(PathNotFound("http://cache: not found")).decode()}
    with pytest.raises(PathNotFound, match="http://cache: not found"):
        await source.realise(PATH)
    assert own.realised == []


async def test_without_a_worker_it_is_fetched_here(source: HintingPathSource, own: Own) -> None:
    await source.realise(PATH)
    assert own.realised == [PATH]


async def test_a_worker_that_dies_meanwhile_is_not_waited_for(
    source: HintingPathSource, own: Own, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as dying:
        dying.bind(str(tmp_path / "s"))
        dying.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.realise, PATH)
            connection, _ = await trio.to_thread.run_sync(dying.accept)
            connection.close()
    assert own.realised == [PATH]


@pytest.mark.parametrize(("hint", "priority"), [("prefetch", "REST"), ("complete", "COMPLETION")])
async def test_a_hint_says_how_urgent_it_is(
    hint: str, priority: str, source: HintingPathSource, worker: Worker
) -> None:
    getattr(source, hint)([PATH])
    await worker.heard.wait()
    assert worker.asked == [("fetch", [StoreDir().format(PATH)], priority)]
