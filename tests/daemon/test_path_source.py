"""One process of a node fetches; the others ask it, and help themselves while it is away."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from fusesnap.daemon import control
from fusesnap.daemon.path_source import HintingPathSource
from fusesnap.errors import PathNotFound
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.realiser import Realiser
from fusesnap.fetch.unpack_frames import encode_error
from fusesnap.nix.store_path import HashPart, StoreDir, StorePath
from fusesnap.store.local_store import Pin

from ..store.conftest import make_path

PATH = StorePath("a" * 32, "path")
OTHER = StorePath("b" * 32, "other")
BELOW = StorePath("c" * 32, "below")


def pin_of(path: StorePath) -> Pin:
    return Pin(1, replace(make_path(path.name)[0], store_path=path, nar_size=7))


class Own:
    """A realiser of this process that notes what it had to do."""

    def __init__(self) -> None:
        self.realised: list[StorePath] = []
        self.looked_up: list[StorePath] = []

    async def realise(self, path: StorePath, priority: Priority) -> None:
        self.realised.append(path)

    async def introduce(self) -> None:
        await trio.lowlevel.checkpoint()

    async def admit(self, paths: Iterable[StorePath]) -> list[Pin]:
        self.looked_up.extend(paths)
        return [pin_of(path) for path in paths]


class Worker:
    """What the worker answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any, Any]] = []
        self.roots: list[str] = []
        self.heard = trio.Event()
        self.answer: dict[str, Any] = {}

    async def hear(self, question: Mapping[str, Any]) -> dict[str, Any]:
        paths = question.get("path", question.get("paths"))
        self.asked.append((question["call"], paths, question.get("priority")))
        self.roots += [question["root"]] if "root" in question else []
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
    patient = dict.fromkeys(("realise", "bundle", "bundle_of"), worker.hear)
    serve = partial(control.serve, patient=patient)
    await nursery.start(serve, tmp_path / "s", calls)
    return worker


async def test_the_worker_fetches(source: HintingPathSource, own: Own, worker: Worker) -> None:
    await source.realise(PATH)
    assert worker.asked == [("realise", str(StoreDir().format(PATH)), "READER")]
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


async def test_what_a_bundle_says_of_paths_is_not_asked_for(
    source: HintingPathSource, own: Own, worker: Worker
) -> None:
    worker.answer = {"told": {StoreDir().format(PATH): 5}}
    assert await source.admit([PATH, OTHER], [PATH, OTHER, BELOW]) == {PATH: 5, OTHER: 7}
    assert own.looked_up == [OTHER]
    (asked,) = worker.asked
    assert asked[0] == "bundle"
    assert set(asked[1]) == {StoreDir().format(path) for path in (PATH, OTHER, BELOW)}


async def test_without_a_worker_all_is_asked_for(source: HintingPathSource, own: Own) -> None:
    assert await source.admit([PATH], [PATH]) == {PATH: 7}
    assert own.looked_up == [PATH]


async def test_what_a_root_references_is_expected_by_the_worker(
    source: HintingPathSource, worker: Worker
) -> None:
    await source.expect(HashPart(PATH.hash_part))
    await source.expect(PATH)
    assert worker.roots == [PATH.hash_part] * 2
