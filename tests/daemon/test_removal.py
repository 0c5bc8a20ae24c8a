"""Remove ends what waits in the snapshot, and does not wait itself for a worker that is no help."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

from fusesnap.daemon import control, waits
from fusesnap.daemon.waits import WorkersWaits


@pytest.fixture
def asked() -> list[Mapping[str, Any]]:
    return []


def calls(asked: list[Mapping[str, Any]], *pids: int) -> Mapping[str, control.Answer]:
    async def status(question: Mapping[str, Any]) -> dict[str, Any]:
        return {"waiting": [{"probable_readers": [{"pid": pid}]} for pid in pids]}

    async def release(question: Mapping[str, Any]) -> dict[str, Any]:
        asked.append(question)
        return {"released": len(question["pids"])}

    return {"status": status, "release": release}


def with_roots(monkeypatch: pytest.MonkeyPatch, roots: Mapping[int, str]) -> None:
    def snapshots_of(pids: set[int], uppers: Mapping[str, str]) -> dict[int, str]:
        return {pid: uppers[roots[pid]] for pid in pids if roots.get(pid) in uppers}

    monkeypatch.setattr(waits, "snapshots_of", snapshots_of)


async def test_only_its_own_readers_are_released(
    tmp_path: Path,
    nursery: trio.Nursery,
    asked: list[Mapping[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_roots(monkeypatch, {7: "/s/1/fs", 8: "/s/2/fs", 9: "/s/1/fs"})
    await nursery.start(control.serve, tmp_path / "s", calls(asked, 7, 8, 9, os.getpid()))
    await WorkersWaits(tmp_path / "s").release_for_removal("/s/1/fs")
    assert [question["pids"] for question in asked] == [[7, 9]]
    assert asked[0]["why"] == "its snapshot was removed"


async def test_where_nobody_waits_in_it_nothing_is_released(
    tmp_path: Path, nursery: trio.Nursery, asked: list[Mapping[str, Any]]
) -> None:
    await nursery.start(control.serve, tmp_path / "s", calls(asked, os.getpid()))
    await WorkersWaits(tmp_path / "s").release_for_removal("/s/1/fs")
    assert asked == []


async def test_a_dead_worker_holds_nothing_up(tmp_path: Path) -> None:
    await WorkersWaits(tmp_path / "s").release_for_removal("/s/1/fs")


async def test_a_silent_worker_is_not_waited_for_for_long(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    async def never(question: Mapping[str, Any]) -> dict[str, Any]:
        await trio.sleep_forever()
        raise AssertionError("unreachable")

    await nursery.start(control.serve, tmp_path / "s", {"status": never})
    await WorkersWaits(tmp_path / "s").release_for_removal("/s/1/fs")
    nursery.cancel_scope.cancel()
