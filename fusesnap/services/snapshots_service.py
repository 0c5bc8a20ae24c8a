# ruff: noqa: N802  # the names of methods are the protocol's
"""containerd's Snapshots service (``proto/``), on a snapshotter. What the calls mean is in ``snapshots.interface``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from fusesnap.errors import FusesnapError
from fusesnap.services.api import mount_pb2, snapshots_pb2, snapshots_pb2_grpc
from fusesnap.services.calls import Calls
from fusesnap.services.filters import FieldPath, Fields, any_matches, parse_filter
from fusesnap.snapshots.interface import Info, Kind, Mount, PromptSnapshots, Snapshots

T = TypeVar("T")
Context = grpc.ServicerContext

# containerd's own service sends a hundred at a time. With thousands of labels each, that is more than the 16 MiB that
# its client takes; a block of 1 MiB never is, because one snapshot's labels came in one request.
BLOCK_INFOS: Final = 100
BLOCK_BYTES: Final = 1 << 20

_KINDS: Final = {
    Kind.VIEW: snapshots_pb2.VIEW,
    Kind.ACTIVE: snapshots_pb2.ACTIVE,
    Kind.COMMITTED: snapshots_pb2.COMMITTED,
}
_LABELS: Final = "labels"


class SnapshotsService(snapshots_pb2_grpc.SnapshotsServicer):
    """Each method is one call, on a thread of grpcio's. ``prompt``, if there is one, is asked first."""

    def __init__(
        self, snapshotter: Snapshots, calls: Calls, prompt: PromptSnapshots | None = None
    ) -> None:
        self._snapshotter = snapshotter
        self._calls = calls
        self._prompt = prompt

    def Prepare(
        self, request: snapshots_pb2.PrepareSnapshotRequest, context: Context
    ) -> snapshots_pb2.PrepareSnapshotResponse:
        given = request.key, request.parent, dict(request.labels)
        mounts = self._promptly(lambda prompt: prompt.prepare(*given))
        if mounts is None:
            mounts = self._run(lambda: self._snapshotter.prepare(*given), context)
        return snapshots_pb2.PrepareSnapshotResponse(mounts=map(_mount, mounts))

    def View(
        self, request: snapshots_pb2.ViewSnapshotRequest, context: Context
    ) -> snapshots_pb2.ViewSnapshotResponse:
        mounts = self._run(
            lambda: self._snapshotter.view(request.key, request.parent, dict(request.labels)),
            context,
        )
        return snapshots_pb2.ViewSnapshotResponse(mounts=map(_mount, mounts))

    def Mounts(
        self, request: snapshots_pb2.MountsRequest, context: Context
    ) -> snapshots_pb2.MountsResponse:
        mounts = self._promptly(lambda prompt: prompt.mounts(request.key))
        if mounts is None:
            mounts = self._run(lambda: self._snapshotter.mounts(request.key), context)
        return snapshots_pb2.MountsResponse(mounts=map(_mount, mounts))

    def Commit(self, request: snapshots_pb2.CommitSnapshotRequest, context: Context) -> Empty:
        self._run(
            lambda: self._snapshotter.commit(
                request.name, request.key, dict(request.labels), request.parent
            ),
            context,
        )
        return Empty()

    def Remove(self, request: snapshots_pb2.RemoveSnapshotRequest, context: Context) -> Empty:
        self._run(lambda: self._snapshotter.remove(request.key), context)
        return Empty()

    def Stat(
        self, request: snapshots_pb2.StatSnapshotRequest, context: Context
    ) -> snapshots_pb2.StatSnapshotResponse:
        info = self._promptly(lambda prompt: prompt.stat(request.key))
        if info is None:
            info = self._run(lambda: self._snapshotter.stat(request.key), context)
        return snapshots_pb2.StatSnapshotResponse(info=_info(info))

    def Update(
        self, request: snapshots_pb2.UpdateSnapshotRequest, context: Context
    ) -> snapshots_pb2.UpdateSnapshotResponse:
        given = request.info
        # What cannot change is not looked at, as in containerd; only a field mask that names it is an error.
        info = Info(given.name, given.parent, Kind.ACTIVE, 0, 0, dict(given.labels))
        fields = list(request.update_mask.paths)
        updated = self._run(lambda: self._snapshotter.update(info, fields), context)
        return snapshots_pb2.UpdateSnapshotResponse(info=_info(updated))

    def List(
        self, request: snapshots_pb2.ListSnapshotsRequest, context: Context
    ) -> Iterator[snapshots_pb2.ListSnapshotsResponse]:
        infos = self._run(lambda: self._walk(list(request.filters)), context)
        for block in _blocks(map(_info, infos)):
            yield snapshots_pb2.ListSnapshotsResponse(info=block)

    def Usage(
        self, request: snapshots_pb2.UsageRequest, context: Context
    ) -> snapshots_pb2.UsageResponse:
        usage = self._run(lambda: self._snapshotter.usage(request.key), context)
        return snapshots_pb2.UsageResponse(size=usage.size, inodes=usage.inodes)

    def Cleanup(
        self,
        request: snapshots_pb2.CleanupRequest,
        context: Context,
    ) -> Empty:
        self._run(self._snapshotter.cleanup, context)
        return Empty()

    def _promptly(self, ask: Callable[[PromptSnapshots], T | None]) -> T | None:
        if self._prompt is None:
            return None
        try:
            return ask(self._prompt)
        except (
            FusesnapError
        ):  # the whole way meets it again, and tells it, or makes room on a full disk
            return None

    def _run(self, function: Callable[[], Awaitable[T]], context: Context) -> T:
        return self._calls.run(function, context)

    async def _walk(self, texts: Sequence[str]) -> Sequence[Info]:
        filters = [parse_filter(text) for text in texts]
        return await self._snapshotter.walk(lambda info: any_matches(filters, _fields(info)))


def _mount(mount: Mount) -> mount_pb2.Mount:
    return mount_pb2.Mount(type=mount.type, source=mount.source, options=mount.options)


def _info(info: Info) -> snapshots_pb2.Info:
    return snapshots_pb2.Info(
        name=info.name,
        parent=info.parent,
        kind=_KINDS[info.kind],
        created_at=_timestamp(info.created),
        updated_at=_timestamp(info.updated),
        labels=info.labels,
    )


def _timestamp(nanoseconds: int) -> Timestamp:
    seconds, nanos = divmod(nanoseconds, 10**9)
    return Timestamp(seconds=seconds, nanos=nanos)


def _fields(info: Info) -> Fields:
    """What filters see of a snapshot, as containerd's ``core/snapshots/storage/bolt.go`` shows it to them."""

    def field(path: FieldPath) -> str | None:
        match path:
            case ("name", *_):
                return info.name
            case ("parent", *_):
                return info.parent
            case ("kind", *_):
                return info.kind.value
            case ("labels", *key):
                return info.labels.get(".".join(key))
        return None

    return field


def _blocks(infos: Iterable[snapshots_pb2.Info]) -> Iterator[list[snapshots_pb2.Info]]:
    block: list[snapshots_pb2.Info] = []
    size = 0
    for info in infos:
        if block and (len(block) >= BLOCK_INFOS or size + info.ByteSize() > BLOCK_BYTES):
            yield block
            block, size = [], 0
        block.append(info)
        size += info.ByteSize()
    if block:
        yield block
