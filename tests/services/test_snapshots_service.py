"""Every call of the Snapshots service, through a real server and a real client."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trio

from fusesnap import errors
from fusesnap.services.api import snapshots_pb2 as pb
from fusesnap.snapshots.interface import Info, Kind

if TYPE_CHECKING:
    from tests.services.conftest import Client, MemorySnapshots

CREATED_AT = (1_700_000_000, 123_456_789)
LABELS = {"containerd.io/gc.root": "now", "ü": "ä"}


async def ask(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return await trio.to_thread.run_sync(partial(call, *arguments, **options))


async def test_prepare_and_view(client: Client, snapshotter: MemorySnapshots) -> None:
    request = pb.PrepareSnapshotRequest(key="k", parent="p", labels=LABELS)
    (mount,) = (await ask(client.stub.Prepare, request)).mounts
    assert (mount.type, mount.source, mount.target) == ("bind", "/fs", "")
    assert list(mount.options) == ["rw", "rbind"]
    view = pb.ViewSnapshotRequest(key="v", parent="p", labels=LABELS)
    (mount,) = (await ask(client.stub.View, view)).mounts
    assert list(mount.options) == ["ro", "rbind"]
    assert snapshotter.asked == [("prepare", "k", "p", LABELS), ("view", "v", "p", LABELS)]


async def test_mounts(client: Client, snapshotter: MemorySnapshots) -> None:
    (mount,) = (await ask(client.stub.Mounts, pb.MountsRequest(key="k"))).mounts
    assert (mount.type, mount.source) == ("overlay", "overlay")
    assert list(mount.options) == ["lowerdir=/a:/b", "index=off"]
    assert snapshotter.asked == [("mounts", "k")]


async def test_commit_stat_and_remove(client: Client, snapshotter: MemorySnapshots) -> None:
    await ask(client.stub.Prepare, pb.PrepareSnapshotRequest(key="k"))
    await ask(
        client.stub.Commit, pb.CommitSnapshotRequest(name="n", key="k", labels=LABELS, parent="p")
    )
    assert snapshotter.asked[-1] == ("commit", "n", "k", LABELS, "p")
    info = (await ask(client.stub.Stat, pb.StatSnapshotRequest(key="n"))).info
    assert (info.name, info.parent, info.kind) == ("n", "p", pb.COMMITTED)
    assert dict(info.labels) == LABELS
    assert (info.created_at.seconds, info.created_at.nanos) == (CREATED_AT[0], CREATED_AT[1] + 1)
    assert info.updated_at == info.created_at
    await ask(client.stub.Remove, pb.RemoveSnapshotRequest(key="n"))
    assert not snapshotter.infos


async def test_kinds(client: Client) -> None:
    await ask(client.stub.Prepare, pb.PrepareSnapshotRequest(key="a"))
    await ask(client.stub.View, pb.ViewSnapshotRequest(key="v"))
    for key, kind in (("a", pb.ACTIVE), ("v", pb.VIEW)):
        info = (await ask(client.stub.Stat, pb.StatSnapshotRequest(key=key))).info
        assert info.kind == kind


async def test_update(client: Client, snapshotter: MemorySnapshots) -> None:
    await ask(client.stub.Prepare, pb.PrepareSnapshotRequest(key="k"))
    request = pb.UpdateSnapshotRequest(info=pb.Info(name="k", parent="other", labels=LABELS))
    request.update_mask.paths.extend(["labels.a", "labels"])
    info = (await ask(client.stub.Update, request)).info
    assert dict(info.labels) == LABELS
    assert info.parent == ""
    assert snapshotter.asked[-1] == ("update", "k", LABELS, ("labels.a", "labels"))


async def test_usage_and_cleanup(client: Client, snapshotter: MemorySnapshots) -> None:
    usage = await ask(client.stub.Usage, pb.UsageRequest(key="k"))
    assert (usage.size, usage.inodes) == (2**40, 3)
    await ask(client.stub.Cleanup, pb.CleanupRequest())
    assert snapshotter.asked == [("usage", "k"), ("cleanup",)]


async def names(client: Client, *filters: str) -> list[str]:
    blocks = await ask(lambda: list(client.stub.List(pb.ListSnapshotsRequest(filters=filters))))
    return [info.name for block in blocks for info in block.info]


async def test_list(client: Client, snapshotter: MemorySnapshots) -> None:
    """The cases of containerd's suite, and the question that its unpacker asks."""
    assert await names(client) == []
    root = {"containerd.io/gc.root": "check-walk"}
    made = [
        ("a-np", "", Kind.ACTIVE, {}),
        ("p", "", Kind.COMMITTED, {}),
        ("a", "p", Kind.ACTIVE, {}),
        ("v", "p", Kind.VIEW, {}),
        ("p-wl", "", Kind.COMMITTED, {"l": "1"}),
        ("a-wl", "p-wl", Kind.ACTIVE, {"l": "2"}),
        ("v-wl", "p-wl", Kind.VIEW, {"l": "3"}),
        ("a-np-wl", "", Kind.ACTIVE, {"l": "2", "containerd.io/snapshot.ref": "sha256:abc"}),
    ]
    for name, parent, kind, labels in made:
        snapshotter.infos[name] = Info(name, parent, kind, 0, 0, root | labels)
    walk = 'labels."containerd.io/gc.root"==check-walk'
    assert await names(client) == await names(client, walk) == [name for name, *_ in made]
    assert await names(client, f"kind==active,{walk}") == ["a-np", "a", "a-wl", "a-np-wl"]
    assert await names(client, f"kind==view,{walk}") == ["v", "v-wl"]
    assert await names(client, f"kind==committed,{walk}") == ["p", "p-wl"]
    assert await names(client, "name==p", "name==a-np-wl") == ["p", "a-np-wl"]
    assert await names(client, "name==a-wl,labels.l") == ["a-wl"]
    assert await names(client, "parent==p") == ["a", "v"]
    assert await names(client, f'parent!="",{walk}') == ["a", "v", "a-wl", "v-wl"]
    assert await names(client, "labels.l") == ["p-wl", "a-wl", "v-wl", "a-np-wl"]
    assert await names(client, "labels.l==2") == ["a-wl", "a-np-wl"]
    reference = 'labels."containerd.io/snapshot.ref"==sha256:abc,parent==""'
    assert await names(client, reference) == ["a-np-wl"]
    assert await names(client, "unknown") == []


async def test_list_with_a_bad_filter(client: Client) -> None:
    request = pb.ListSnapshotsRequest(filters=["name==a", "name="])
    error: Any = await client.fail(lambda: list(client.stub.List(request)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "filter 'name=': expected an operator" in error.details()


async def test_long_lists_come_in_blocks(client: Client, snapshotter: MemorySnapshots) -> None:
    labels = {f"containerd.io/snapshot/nix-store-path.{n}": "x" * 200 for n in range(2_000)}
    for number in range(250):
        own = labels if number < 5 else {}
        snapshotter.infos[str(number)] = Info(str(number), "", Kind.ACTIVE, 0, 0, own)
    blocks = await ask(lambda: list(client.stub.List(pb.ListSnapshotsRequest())))
    assert [info.name for block in blocks for info in block.info] == [*map(str, range(250))]
    assert max(len(block.info) for block in blocks) == 100
    assert max(block.ByteSize() for block in blocks) <= 1 << 20


async def test_the_labels_of_a_large_closure(client: Client, snapshotter: MemorySnapshots) -> None:
    """More than gRPC's default limit of 4 MiB for a message."""
    labels = {f"containerd.io/snapshot/nix-store-path.{n}": "x" * 250 for n in range(20_000)}
    await ask(client.stub.Prepare, pb.PrepareSnapshotRequest(key="k", labels=labels))
    assert snapshotter.infos["k"].labels == labels


STATUSES = [
    (errors.AlreadyExists("x"), grpc.StatusCode.ALREADY_EXISTS),
    (errors.NotFound("x"), grpc.StatusCode.NOT_FOUND),
    (errors.FailedPrecondition("x"), grpc.StatusCode.FAILED_PRECONDITION),
    (errors.InvalidArgument("x"), grpc.StatusCode.INVALID_ARGUMENT),
    (errors.InvalidData("x"), grpc.StatusCode.INVALID_ARGUMENT),
    (errors.ContentMismatch("x"), grpc.StatusCode.DATA_LOSS),
    (errors.UntrustedPath("x"), grpc.StatusCode.FAILED_PRECONDITION),
    (errors.PathNotFound("x"), grpc.StatusCode.FAILED_PRECONDITION),
    (errors.Unavailable("x"), grpc.StatusCode.UNAVAILABLE),
    (errors.DeadlineExceeded("x"), grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.ReaderReleased("x", killed=True), grpc.StatusCode.UNAVAILABLE),
    (errors.ClosureUnavailable([errors.PathNotFound("x")]), grpc.StatusCode.FAILED_PRECONDITION),
    (
        errors.ClosureUnavailable([errors.PathNotFound("x"), errors.Unavailable("y")]),
        grpc.StatusCode.UNAVAILABLE,
    ),
    (errors.StorageFailure("x", errno.ENOSPC), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.StorageFailure("x", errno.EROFS), grpc.StatusCode.INTERNAL),
    (errors.Unsupported("x"), grpc.StatusCode.FAILED_PRECONDITION),
    (errors.NotOurs("x"), grpc.StatusCode.UNIMPLEMENTED),
    (errors.StateInUse("x"), grpc.StatusCode.FAILED_PRECONDITION),
    (errors.InvalidConfiguration("x"), grpc.StatusCode.FAILED_PRECONDITION),
    (errors.FusesnapError("x"), grpc.StatusCode.INTERNAL),
]


def told(module: ModuleType) -> set[type[errors.FusesnapError]]:
    """The errors of the tree; kinds that a room makes of them are told as what they are kinds of."""
    return {
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, errors.FusesnapError)
    }


def test_every_error_has_a_status() -> None:
    assert {type(error) for error, _ in STATUSES} == told(errors)


@pytest.mark.parametrize(("error", "status"), STATUSES, ids=lambda x: type(x).__name__)
async def test_statuses(
    client: Client, snapshotter: MemorySnapshots, error: Exception, status: grpc.StatusCode
) -> None:
    snapshotter.error = error
    request = pb.PrepareSnapshotRequest(key="k")
    caught: Any = await client.fail(lambda: client.stub.Prepare(request))
    assert (caught.code(), caught.details()) == (status, str(error))
    listed: Any = await client.fail(lambda: list(client.stub.List(pb.ListSnapshotsRequest())))
    assert listed.code() is status


async def test_unexpected_errors(
    client: Client, snapshotter: MemorySnapshots, caplog: pytest.LogCaptureFixture
) -> None:
    snapshotter.error = KeyError("surprise")
    with caplog.at_level(logging.ERROR):
        error: Any = await client.fail(lambda: client.stub.Cleanup(pb.CleanupRequest()))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "unexpected KeyError: 'surprise'" in error.details()
    assert "Traceback" in caplog.text
    # The server goes on.
    snapshotter.error = None
    await ask(client.stub.Cleanup, pb.CleanupRequest())


async def test_long_messages_are_cut(client: Client, snapshotter: MemorySnapshots) -> None:
    snapshotter.error = errors.Unavailable("ü" * 10_000)
    error: Any = await client.fail(lambda: client.stub.Cleanup(pb.CleanupRequest()))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details() == "ü" * 1200 + " ... (17600 more bytes)"


async def test_the_clients_deadline_cancels_the_work(
    client: Client, snapshotter: MemorySnapshots
) -> None:
    snapshotter.gate = trio.Event()
    request = pb.PrepareSnapshotRequest(key="k")
    seconds = 0.05
    while not snapshotter.asked:  # it may be over before there is a connection
        error: Any = await client.fail(partial(client.stub.Prepare, request, timeout=seconds))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        seconds *= 2
    await snapshotter.cancelled.wait()
    assert not snapshotter.infos


async def test_a_client_that_goes_away_cancels_the_work(
    client: Client, snapshotter: MemorySnapshots
) -> None:
    snapshotter.gate = trio.Event()
    call = client.stub.Prepare.future(pb.PrepareSnapshotRequest(key="k"))
    await snapshotter.waiting.wait()
    call.cancel()  # type: ignore[no-untyped-call]
    await snapshotter.cancelled.wait()
    assert not snapshotter.infos


async def test_calls_do_not_wait_for_each_other(
    client: Client, snapshotter: MemorySnapshots
) -> None:
    snapshotter.gate = trio.Event()
    call = client.stub.Prepare.future(pb.PrepareSnapshotRequest(key="k"))
    await snapshotter.waiting.wait()
    gate, snapshotter.gate = snapshotter.gate, None
    await ask(client.stub.Cleanup, pb.CleanupRequest())
    assert not call.done()
    gate.set()
    await ask(call.result)
    assert list(snapshotter.infos) == ["k"]
