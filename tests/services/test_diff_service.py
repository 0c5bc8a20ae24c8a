"""The Diff service, as far as it goes without containerd; with it, in the end-to-end tests."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import trio

from fusesnap.services.api import (
    descriptor_pb2,
    diff_pb2,
    diff_pb2_grpc,
    leases_pb2,
    leases_pb2_grpc,
    mount_pb2,
)
from fusesnap.services.diff_service import Differ, diff_service
from fusesnap.services.server import serve
from fusesnap.snapshots.comparison import Comparer
from fusesnap.snapshots.interface import Snapshots
from fusesnap.snapshots.metastore import Metastore

NAMESPACE = (("containerd-namespace", "default"),)


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    """A layer of a snapshot, without a parent."""
    directory = tmp_path / "state/snapshots/1/fs"
    directory.mkdir(parents=True)
    (directory / "file").write_bytes(b"data")
    return directory


class SlowLeases(leases_pb2_grpc.LeasesServicer):
    """containerd's, of one that takes its time: it answers when nobody wants to know any more."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.left = threading.Event()

    def Create(  # noqa: N802  # the protocol's
        self, request: leases_pb2.CreateRequest, context: grpc.ServicerContext
    ) -> leases_pb2.CreateResponse:
        context.add_callback(self.left.set)
        self.asked.set()
        self.left.wait(60)
        return leases_pb2.CreateResponse(lease=leases_pb2.Lease(id=request.id))


@pytest.fixture
def slow_leases(tmp_path: Path) -> Iterator[SlowLeases]:
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        leases = SlowLeases()  # type: ignore[abstract]  # nobody asks for more
        leases_pb2_grpc.add_LeasesServicer_to_server(leases, server)
        server.add_insecure_port(f"unix:{tmp_path}/containerd.sock")
        server.start()
        yield leases
        server.stop(None).wait()


@pytest.fixture
async def stub(
    tmp_path: Path, nursery: trio.Nursery, snapshotter: Snapshots, layer: Path
) -> AsyncIterator[diff_pb2_grpc.DiffStub]:
    del layer
    metastore = Metastore(tmp_path / "state/snapshots.sqlite")
    comparer = Comparer(tmp_path / "state", metastore)
    differ = Differ(comparer, tmp_path / "containerd.sock", lambda: 1_700_000_000.0)
    scope = trio.CancelScope()
    stopped = trio.Event()

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        address = tmp_path / "socket"
        with scope:
            also = [diff_service(differ)]
            await serve(snapshotter, address, also=also, grace=0, task_status=task_status)
        stopped.set()

    await nursery.start(run)
    with grpc.insecure_channel(f"unix:{tmp_path}/socket") as channel:
        yield diff_pb2_grpc.DiffStub(channel)
    scope.cancel()
    await stopped.wait()
    metastore.close()


def mount(source: Path) -> mount_pb2.Mount:
    return mount_pb2.Mount(type="bind", source=str(source), options=["rw", "rbind"])


async def failure(call: Callable[[], object]) -> grpc.RpcError:
    def run() -> grpc.RpcError:
        with pytest.raises(grpc.RpcError) as caught:
            call()
        return caught.value

    return await trio.to_thread.run_sync(run)


async def test_what_is_not_ours_is_unimplemented_so_that_containerd_asks_the_next_differ(
    stub: diff_pb2_grpc.DiffStub, tmp_path: Path, layer: Path
) -> None:
    docker = "application/vnd.docker.image.rootfs.diff.tar.gzip"
    for request in (
        diff_pb2.DiffRequest(right=[mount(tmp_path)]),
        diff_pb2.DiffRequest(right=[mount(layer)], media_type=docker),
        diff_pb2.DiffRequest(left=[mount(tmp_path)], right=[mount(layer)]),
    ):
        error = await failure(lambda request=request: stub.Diff(request, metadata=NAMESPACE))  # type: ignore[misc]
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("call", ["Diff", "Apply"])
async def test_where_containerd_is_not_at_its_address_it_is_told_to_do_it_itself(
    stub: diff_pb2_grpc.DiffStub,
    layer: Path,
    caplog: pytest.LogCaptureFixture,
    call: str,
) -> None:
    diff = diff_pb2.DiffRequest(right=[mount(layer)])
    apply = diff_pb2.ApplyRequest(
        diff=descriptor_pb2.Descriptor(digest="sha256:x"), mounts=[mount(layer)]
    )
    ask = {
        "Diff": lambda: stub.Diff(diff, metadata=NAMESPACE),
        "Apply": lambda: stub.Apply(apply, metadata=NAMESPACE),
    }
    error = await failure(ask[call])
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "containerd-address" in caplog.text
    assert "containerd.sock" in caplog.text


async def test_unpacking_elsewhere_or_without_a_namespace_is_left_to_containerd(
    stub: diff_pb2_grpc.DiffStub, tmp_path: Path, layer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = diff_pb2.ApplyRequest(mounts=[mount(layer)])
    foreign = diff_pb2.ApplyRequest(mounts=[mount(tmp_path)])
    for call in (lambda: stub.Apply(ours), lambda: stub.Apply(foreign, metadata=NAMESPACE)):
        error = await failure(call)
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "containerd-address" not in caplog.text  # it was not asked


async def test_a_client_that_goes_away_ends_its_call_to_containerd(
    stub: diff_pb2_grpc.DiffStub, layer: Path, slow_leases: SlowLeases
) -> None:
    call = stub.Diff.future(diff_pb2.DiffRequest(right=[mount(layer)]), metadata=NAMESPACE)
    assert await trio.to_thread.run_sync(slow_leases.asked.wait, 60)
    call.cancel()  # type: ignore[no-untyped-call]
    assert await trio.to_thread.run_sync(slow_leases.left.wait, 60)
