"""A gRPC server on a unix socket, over a snapshotter in memory that tests can make wait and fail."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

import grpc
import pytest
import trio
from hypothesis import settings

from fusesnap.errors import NotFound
from fusesnap.services.api import snapshots_pb2_grpc
from fusesnap.services.server import serve
from fusesnap.snapshots.interface import Info, Kind, Mount, Snapshots, Usage

settings.register_profile("deterministic", deadline=None, derandomize=True, database=None)
settings.load_profile("deterministic")

CREATED = 1_700_000_000_123_456_789


class MemorySnapshots(Snapshots):
    """Remembers what it was asked. ``error`` is raised by every call; while ``gate`` is set, calls wait for it."""

    def __init__(self) -> None:
        self.infos: dict[str, Info] = {}
        self.asked: list[tuple[object, ...]] = []
        self.error: Exception | None = None
        self.gate: trio.Event | None = None
        self.waiting = trio.Event()
        self.cancelled = trio.Event()
        self._clock = itertools.count(CREATED)

    async def stat(self, key: str) -> Info:
        await self._enter("stat", key)
        return self._find(key)

    async def update(self, info: Info, fields: Sequence[str] = ()) -> Info:
        await self._enter("update", info.name, dict(info.labels), tuple(fields))
        self.infos[info.name] = self._find(info.name).with_labels(info.labels)
        return self.infos[info.name]

    async def usage(self, key: str) -> Usage:
        await self._enter("usage", key)
        return Usage(2**40, 3)

    async def mounts(self, key: str) -> Sequence[Mount]:
        await self._enter("mounts", key)
        return (Mount("overlay", "overlay", ("lowerdir=/a:/b", "index=off")),)

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount]:
        await self._enter("prepare", key, parent, dict(labels))
        self._add(key, parent, Kind.ACTIVE, labels)
        return (Mount("bind", "/fs", ("rw", "rbind")),)

    async def view(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount]:
        await self._enter("view", key, parent, dict(labels))
        self._add(key, parent, Kind.VIEW, labels)
        return (Mount("bind", "/fs", ("ro", "rbind")),)

    async def commit(
        self, name: str, key: str, labels: Mapping[str, str], parent: str = ""
    ) -> None:
        await self._enter("commit", name, key, dict(labels), parent)
        self._add(name, self._find(key).parent or parent, Kind.COMMITTED, labels)
        del self.infos[key]

    async def remove(self, key: str) -> None:
        await self._enter("remove", key)
        del self.infos[self._find(key).name]

    async def walk(self, matches: Callable[[Info], bool] | None = None) -> Sequence[Info]:
        await self._enter("walk")
        return [info for info in self.infos.values() if matches is None or matches(info)]

    async def cleanup(self) -> None:
        await self._enter("cleanup")

    async def _enter(self, *call: object) -> None:
        self.asked.append(call)
        if self.gate is not None:
            self.waiting.set()
            try:
                await self.gate.wait()
            except trio.Cancelled:
                self.cancelled.set()
                raise
        if self.error is not None:
            raise self.error

    def _find(self, key: str) -> Info:
        if key not in self.infos:
            raise NotFound(f"snapshot {key!r} does not exist")
        return self.infos[key]

    def _add(self, key: str, parent: str, kind: Kind, labels: Mapping[str, str]) -> None:
        now = next(self._clock)
        self.infos[key] = Info(key, parent, kind, now, now, dict(labels))


class Client:
    """A client of the service. Its calls block a thread, as containerd's do a goroutine."""

    def __init__(self, address: Path) -> None:
        self.channel = grpc.insecure_channel(f"unix:{address}")
        self.stub = snapshots_pb2_grpc.SnapshotsStub(self.channel)

    async def fail(self, call: Callable[[], object]) -> grpc.RpcError:
        """The error that a call ends with."""

        def run() -> grpc.RpcError:
            with pytest.raises(grpc.RpcError) as caught:
                call()
            return caught.value

        return await trio.to_thread.run_sync(run)


@pytest.fixture
def snapshotter() -> MemorySnapshots:
    return MemorySnapshots()


@pytest.fixture
async def address(
    tmp_path: Path, nursery: trio.Nursery, snapshotter: MemorySnapshots
) -> AsyncIterator[Path]:
    path = tmp_path / "socket"
    scope = trio.CancelScope()
    stopped = trio.Event()

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        with scope:
            await serve(snapshotter, path, grace=0, task_status=task_status)
        stopped.set()

    await nursery.start(run)
    yield path
    scope.cancel()
    await stopped.wait()


@pytest.fixture
def client(address: Path) -> Client:
    return Client(address)
