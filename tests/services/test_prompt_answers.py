"""Who can answer without waiting is asked first, in the thread of the call; for all else the whole way is gone."""

from __future__ import annotations

import errno
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trio

from fusesnap.errors import FusesnapError, NotFound, StorageFailure
from fusesnap.services.api import snapshots_pb2 as pb
from fusesnap.services.api import snapshots_pb2_grpc
from fusesnap.services.server import serve
from fusesnap.snapshots.interface import Info, Kind, Mount, PromptSnapshots

if TYPE_CHECKING:
    from tests.services.conftest import MemorySnapshots

PROMPT = (Mount("overlay", "prompt", ("index=off",)),)


class Prompt(PromptSnapshots):
    """Answers, or has no answer, or fails."""

    def __init__(self) -> None:
        self.answers = True
        self.error: FusesnapError | None = None
        self.threads: set[int] = set()

    def stat(self, key: str) -> Info | None:
        return Info(key, "prompt", Kind.ACTIVE, 1, 1, {}) if self._can() else None

    def mounts(self, key: str) -> Sequence[Mount] | None:
        return PROMPT if self._can() else None

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount] | None:
        return PROMPT if self._can() else None

    def _can(self) -> bool:
        self.threads.add(threading.get_ident())
        if self.error is not None:
            raise self.error
        return self.answers


@pytest.fixture
def prompt() -> Prompt:
    return Prompt()


@pytest.fixture
async def stub(
    tmp_path: Path, nursery: trio.Nursery, snapshotter: MemorySnapshots, prompt: Prompt
) -> AsyncIterator[Any]:
    path, scope, stopped = tmp_path / "prompt", trio.CancelScope(), trio.Event()

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        with scope:
            await serve(snapshotter, path, prompt=prompt, grace=0, task_status=task_status)
        stopped.set()

    await nursery.start(run)
    with grpc.insecure_channel(f"unix:{path}") as channel:
        yield snapshots_pb2_grpc.SnapshotsStub(channel)
    scope.cancel()
    await stopped.wait()


async def ask(stub: Any) -> tuple[str, str, str]:
    """What says who answered Prepare, Mounts and Stat."""

    def run() -> tuple[str, str, str]:
        prepared = stub.Prepare(pb.PrepareSnapshotRequest(key="k", parent="p"))
        mounts = stub.Mounts(pb.MountsRequest(key="k"))
        info = stub.Stat(pb.StatSnapshotRequest(key="k")).info
        return prepared.mounts[0].source, mounts.mounts[0].source, info.parent

    return await trio.to_thread.run_sync(run)


WHOLE_WAY = ("/fs", "overlay", "p")


async def test_a_prompt_answer_is_the_answer(
    stub: Any, prompt: Prompt, snapshotter: MemorySnapshots
) -> None:
    assert await ask(stub) == ("prompt", "prompt", "prompt")
    assert snapshotter.asked == []
    assert threading.get_ident() not in prompt.threads


async def test_without_one_the_whole_way_is_gone(stub: Any, prompt: Prompt) -> None:
    prompt.answers = False
    assert await ask(stub) == WHOLE_WAY


async def test_an_error_is_met_again_on_the_whole_way(
    stub: Any, prompt: Prompt, snapshotter: MemorySnapshots
) -> None:
    prompt.error = StorageFailure("the disk is full", errno.ENOSPC)
    assert await ask(stub) == WHOLE_WAY  # which has made room
    snapshotter.error = NotFound("told by the whole way")
    call = partial(stub.Stat, pb.StatSnapshotRequest(key="k"))
    with pytest.raises(grpc.RpcError, match="told by the whole way"):
        await trio.to_thread.run_sync(call)
