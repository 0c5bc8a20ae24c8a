"""The server's socket: taken over, given up, and drained."""

from __future__ import annotations

import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trio

from fusesnap.errors import InvalidArgument, InvalidConfiguration, StorageFailure
from fusesnap.services.api import snapshots_pb2 as pb
from fusesnap.services.api import snapshots_pb2_grpc
from fusesnap.services.calls import Calls
from fusesnap.services.server import serve

if TYPE_CHECKING:
    from tests.services.conftest import Client, MemorySnapshots


class Running:
    """A server that can be stopped, and waited for."""

    def __init__(self, snapshotter: MemorySnapshots, address: Path, grace: float = 0) -> None:
        self._arguments = (snapshotter, address)
        self._grace = grace
        self.scope = trio.CancelScope()
        self.ended = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        with self.scope:
            await serve(*self._arguments, grace=self._grace, task_status=task_status)
        self.ended.set()

    async def stop(self) -> None:
        self.scope.cancel()
        await self.ended.wait()


def entries(directory: Path) -> list[Path]:
    return list(directory.iterdir())


async def cleanup(address: Path) -> None:
    """One call, on a connection of its own."""

    def call() -> None:
        # gRPC shares connections to the same address within a process unless told not to.
        own = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"unix:{address}", own) as channel:
            snapshots_pb2_grpc.SnapshotsStub(channel).Cleanup(pb.CleanupRequest())

    await trio.to_thread.run_sync(call)


async def test_the_socket_is_private_and_goes_with_the_server(
    tmp_path: Path, snapshotter: MemorySnapshots, nursery: trio.Nursery
) -> None:
    address = tmp_path / "socket"
    server = Running(snapshotter, address)
    await nursery.start(server.run)
    assert stat.S_IMODE(address.stat().st_mode) == 0o600
    assert entries(tmp_path) == [address]
    await cleanup(address)
    await server.stop()
    assert not entries(tmp_path)


async def test_a_dead_socket_is_taken_over(
    tmp_path: Path, snapshotter: MemorySnapshots, nursery: trio.Nursery
) -> None:
    address = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(address))
    server = Running(snapshotter, address)
    await nursery.start(server.run)
    await cleanup(address)
    await server.stop()


async def test_a_live_socket_is_taken_over_while_the_old_server_drains(
    tmp_path: Path,
    snapshotter: MemorySnapshots,
    nursery: trio.Nursery,
    client: Client,
    address: Path,
) -> None:
    """``client`` is connected to the server of the fixtures."""
    snapshotter.gate = trio.Event()
    under_way = client.stub.Prepare.future(pb.PrepareSnapshotRequest(key="k"))
    await snapshotter.waiting.wait()
    other = type(snapshotter)()
    server = Running(other, address)
    await nursery.start(server.run)
    await cleanup(address)
    assert other.asked == [("cleanup",)]
    snapshotter.gate.set()
    await trio.to_thread.run_sync(under_way.result)
    assert list(snapshotter.infos) == ["k"]
    await server.stop()


async def test_an_old_server_leaves_the_new_ones_socket(
    tmp_path: Path, snapshotter: MemorySnapshots, nursery: trio.Nursery
) -> None:
    address = tmp_path / "socket"
    old, new = Running(snapshotter, address), Running(snapshotter, address)
    await nursery.start(old.run)
    await nursery.start(new.run)
    await old.stop()
    await cleanup(address)
    await new.stop()
    assert not entries(tmp_path)


async def test_calls_under_way_may_end(
    tmp_path: Path, snapshotter: MemorySnapshots, nursery: trio.Nursery, client: Client
) -> None:
    address = tmp_path / "draining"
    server = Running(snapshotter, address, grace=60)
    await nursery.start(server.run)
    snapshotter.gate = trio.Event()
    other: Any = type(client)(address)
    under_way = other.stub.Prepare.future(pb.PrepareSnapshotRequest(key="k"))
    await snapshotter.waiting.wait()
    server.scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert not snapshotter.cancelled.is_set()
    snapshotter.gate.set()
    await trio.to_thread.run_sync(under_way.result)
    await server.ended.wait()


async def test_calls_that_do_not_end_are_cancelled(
    tmp_path: Path, snapshotter: MemorySnapshots, nursery: trio.Nursery, client: Client
) -> None:
    address = tmp_path / "draining"
    server = Running(snapshotter, address, grace=0)
    await nursery.start(server.run)
    snapshotter.gate = trio.Event()
    other: Any = type(client)(address)
    under_way = other.stub.Prepare.future(pb.PrepareSnapshotRequest(key="k"))
    await snapshotter.waiting.wait()
    await server.stop()
    assert snapshotter.cancelled.is_set()
    error: Any = await trio.to_thread.run_sync(under_way.exception)
    assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


async def test_other_services_share_the_socket(
    tmp_path: Path, snapshotter: MemorySnapshots, nursery: trio.Nursery
) -> None:
    async def echo(request: bytes) -> bytes:
        if request == b"nothing":
            raise InvalidArgument("nothing to echo")
        return request

    def register(server: grpc.Server, calls: Calls) -> None:
        method = grpc.unary_unary_rpc_method_handler(
            lambda request, context: calls.run(lambda: echo(request), context)
        )
        handler = grpc.method_handlers_generic_handler("test.Other", {"Echo": method})
        server.add_generic_rpc_handlers((handler,))

    address = tmp_path / "socket"
    scope = trio.CancelScope()

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        with scope:
            await serve(snapshotter, address, also=[register], grace=0, task_status=task_status)

    await nursery.start(run)

    def ask(request: bytes) -> bytes:
        with grpc.insecure_channel(f"unix:{address}") as channel:
            return bytes(channel.unary_unary("/test.Other/Echo", bytes, bytes)(request))

    assert await trio.to_thread.run_sync(ask, b"hello") == b"hello"
    with pytest.raises(grpc.RpcError, match="nothing to echo"):
        await trio.to_thread.run_sync(ask, b"nothing")
    await cleanup(address)
    scope.cancel()


async def test_addresses_that_cannot_be_used(tmp_path: Path, snapshotter: MemorySnapshots) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(InvalidConfiguration, match="expected a socket or nothing"):
        await serve(snapshotter, file)
    assert file.read_text() == "precious"
    with pytest.raises(InvalidConfiguration, match="at most 107 bytes, got"):
        await serve(snapshotter, tmp_path / ("x" * 100))
    with pytest.raises(InvalidConfiguration, match="absolute"):
        await serve(snapshotter, Path("relative"))
    with pytest.raises(StorageFailure, match="No such file"):
        await serve(snapshotter, tmp_path / "nowhere" / "socket")
