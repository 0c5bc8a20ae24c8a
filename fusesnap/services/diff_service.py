# ruff: noqa: N802  # the names of methods are the protocol's
"""containerd's Diff service (``proto/``) for our snapshots; what is not ours goes back to containerd.

containerd (1.7 and later) asks the differs of ``default`` in its ``diff-service`` one after another, until one does not
answer UNIMPLEMENTED. So a comparison of other mounts needs no more than that answer. Unpacking a layer is never ours,
but containerd's transfer service may have been given us for it, and asks nobody else: so it is handed to containerd's
Diff service, and when that asks us the same in turn, it is told to ask the next one. So much only for our own
snapshots: what other snapshotters unpack must not depend on us for as long as that takes.

containerd 1.7 does not tell a differ which of its namespaces it asks for; our snapshots' keys do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import grpc
import trio

from fusesnap.errors import NotOurs, Unavailable
from fusesnap.services.api import descriptor_pb2, diff_pb2, diff_pb2_grpc, mount_pb2
from fusesnap.services.calls import Calls
from fusesnap.services.containerd_calls import NAMESPACE_HEADER
from fusesnap.services.content import (
    LEASE_HEADER,
    Compression,
    ContentStore,
    Metadata,
    Wanted,
    translated,
)
from fusesnap.snapshots.comparison import Comparer
from fusesnap.snapshots.interface import Mount

T = TypeVar("T")

log = logging.getLogger(__name__)

# A request to unpack, by the layer and the place that it is to go to.
_Unpacking = tuple[str, tuple[tuple[str, str, tuple[str, ...]], ...]]


class Differ:
    """Answers the Diff service's calls. ``containerd`` is containerd's own socket; ``clock`` gives seconds."""

    def __init__(self, comparer: Comparer, containerd: Path, clock: Callable[[], float]) -> None:
        self._comparer = comparer
        self._containerd = containerd
        self._clock = clock
        self._handed_on: set[_Unpacking] = set()

    async def diff(
        self, request: diff_pb2.DiffRequest, metadata: Metadata
    ) -> diff_pb2.DiffResponse:
        """Store what differs as a layer.

        Raises ``NotOurs`` for other mounts than a snapshot's and its parent's, and for media types that are not OCI's;
        ``StorageFailure``; ``FailedPrecondition`` where a file changes meanwhile; what containerd's content store says.
        """
        wanted = Wanted(_compression(request.media_type), request.ref, dict(request.labels))
        latest = None
        if request.HasField("source_date_epoch"):
            latest = request.source_date_epoch.ToNanoseconds()
        comparison = self._comparer.comparison(_mounts(request.left), _mounts(request.right))

        def store(channel: grpc.Channel) -> descriptor_pb2.Descriptor:
            named = metadata
            if NAMESPACE_HEADER not in dict(metadata):
                named = (*metadata, (NAMESPACE_HEADER, self._comparer.namespace(comparison)))
            content = ContentStore(channel, named).lease(self._clock())
            return content.write(self._comparer.layer_tar(comparison, latest), wanted)

        stored = await self._ask(store)
        log.info("wrote layer %s: what %s changes", stored.digest, comparison.layer)
        return diff_pb2.DiffResponse(diff=stored)

    async def apply(
        self, request: diff_pb2.ApplyRequest, metadata: Metadata
    ) -> diff_pb2.ApplyResponse:
        """Have containerd unpack a layer.

        Raises ``NotOurs`` where there is a next differ to ask, and what containerd answers.
        """
        self._comparer.check_is_ours(_mounts(request.mounts))
        unpacking = _unpacking(request)
        if unpacking in self._handed_on or NAMESPACE_HEADER not in dict(metadata):
            raise NotOurs("unpacking is for the next differ")
        self._handed_on.add(unpacking)
        try:
            return await self._ask(
                lambda channel: diff_pb2_grpc.DiffStub(channel).Apply(request, metadata=metadata)
            )
        finally:
            self._handed_on.discard(unpacking)

    async def _ask(self, question: Callable[[grpc.Channel], T]) -> T:
        """Ask containerd, in a thread. Cancelled, this closes the channel, which ends the thread's call.

        Whoever asks us is containerd. So if it is not there, it is elsewhere, and may know another differ itself.
        """

        def ask() -> T:
            with translated():
                return question(channel)

        with grpc.insecure_channel(f"unix:{self._containerd}") as channel:
            try:
                return await trio.to_thread.run_sync(ask, abandon_on_cancel=True)
            except Unavailable as error:
                log.warning("%s: is %s its socket? See containerd-address", error, self._containerd)
                raise NotOurs(str(error)) from error


class DiffService(diff_pb2_grpc.DiffServicer):
    """Each method is one call, on a thread of grpcio's."""

    def __init__(self, differ: Differ, calls: Calls) -> None:
        self._differ = differ
        self._calls = calls

    def Diff(
        self, request: diff_pb2.DiffRequest, context: grpc.ServicerContext
    ) -> diff_pb2.DiffResponse:
        metadata = _handed_down(context)
        return self._calls.run(lambda: self._differ.diff(request, metadata), context)

    def Apply(
        self, request: diff_pb2.ApplyRequest, context: grpc.ServicerContext
    ) -> diff_pb2.ApplyResponse:
        metadata = _handed_down(context)
        return self._calls.run(lambda: self._differ.apply(request, metadata), context)


def diff_service(differ: Differ) -> Callable[[grpc.Server, Calls], None]:
    """The service, to be registered beside others."""

    def register(server: grpc.Server, calls: Calls) -> None:
        diff_pb2_grpc.add_DiffServicer_to_server(DiffService(differ, calls), server)

    return register


def _compression(media_type: str) -> Compression:
    try:
        return Compression(media_type) if media_type else Compression.GZIP
    except ValueError as error:
        raise NotOurs(f"media type {media_type!r}: expected one of OCI's layers") from error


def _mounts(mounts: Sequence[mount_pb2.Mount]) -> list[Mount]:
    return [Mount(mount.type, mount.source, tuple(mount.options)) for mount in mounts]


def _unpacking(request: diff_pb2.ApplyRequest) -> _Unpacking:
    places = ((mount.type, mount.source, tuple(mount.options)) for mount in request.mounts)
    return request.diff.digest, tuple(places)


def _handed_down(context: grpc.ServicerContext) -> Metadata:
    """The part of a call's metadata that is to go with calls made for its sake."""
    wanted = (NAMESPACE_HEADER, LEASE_HEADER)
    return tuple((key, str(value)) for key, value in context.invocation_metadata() if key in wanted)
