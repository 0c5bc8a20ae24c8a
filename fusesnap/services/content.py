"""Writes layers into containerd's content store, over containerd's own API (``proto/``)."""

from __future__ import annotations

import hashlib
import secrets
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from queue import SimpleQueue
from typing import Final, Protocol, cast

import grpc
import zstandard
from google.protobuf.field_mask_pb2 import FieldMask

from fusesnap import errors
from fusesnap.services.api import (
    content_pb2,
    content_pb2_grpc,
    descriptor_pb2,
    leases_pb2,
    leases_pb2_grpc,
)

UNCOMPRESSED_LABEL: Final = "containerd.io/uncompressed"
EXPIRE_LABEL: Final = "containerd.io/gc.expire"
LEASE_HEADER: Final = "containerd-lease"
# Whoever has asked for the content refers to it as soon as it knows of it.
LEASE_LIFETIME: Final = timedelta(hours=1)
BLOCK: Final = 1 << 20  # bytes in a message; containerd takes 16 MiB

# What a call says beside its request: containerd's namespace, and perhaps a lease.
Metadata = tuple[tuple[str, str], ...]

_CODES: Final = {
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: errors.FailedPrecondition,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidArgument,
    grpc.StatusCode.UNIMPLEMENTED: errors.NotOurs,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
}


class Compression(Enum):
    """How a layer is stored, by its media type."""

    NONE = "application/vnd.oci.image.layer.v1.tar"
    GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
    ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to become of a layer. ``reference`` names its upload; where it is empty, the upload is ours."""

    compression: Compression
    reference: str
    labels: Mapping[str, str]


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


class _Answers(Protocol):
    """A stream of answers; grpc's type knows less of it."""

    def __next__(self) -> content_pb2.WriteContentResponse: ...

    def cancel(self) -> bool: ...


@contextmanager
def translated() -> Iterator[None]:
    """The one place where containerd's statuses become errors of ours."""
    try:
        yield
    except grpc.RpcError as error:
        kind = _CODES.get(error.code(), errors.FusesnapError)
        raise kind(f"containerd: {error.details()}") from error


class ContentStore:
    """containerd's content store, on one channel, for calls with the same metadata. It blocks: it is for threads."""

    def __init__(self, channel: grpc.Channel, metadata: Metadata) -> None:
        self._channel = channel
        self._content = content_pb2_grpc.ContentStub(channel)
        self._metadata = metadata

    def lease(self, now: float) -> ContentStore:
        """The same, with what is written kept for a while. containerd does not hand its client's lease on to differs.

        ``now`` is in seconds since the epoch.
        """
        if any(key == LEASE_HEADER for key, _ in self._metadata):
            return self
        expiry = datetime.fromtimestamp(int(now), UTC) + LEASE_LIFETIME
        request = leases_pb2.CreateRequest(
            id=f"fusesnap-diff-{secrets.token_hex(8)}", labels={EXPIRE_LABEL: expiry.isoformat()}
        )
        with translated():
            leases_pb2_grpc.LeasesStub(self._channel).Create(request, metadata=self._metadata)
        return ContentStore(self._channel, (*self._metadata, (LEASE_HEADER, request.id)))

    def write(self, layer: Iterable[bytes], wanted: Wanted) -> descriptor_pb2.Descriptor:
        """Store a layer. What is there already is as good. Raises the tree's error for what containerd says."""
        reference = wanted.reference or f"fusesnap-diff-{secrets.token_hex(8)}"
        try:
            with translated(), Upload(self._content, reference, self._metadata) as upload:
                upload.begin()
                return self._stored(upload, layer, wanted)
        except BaseException:
            if not wanted.reference:
                with suppress(grpc.RpcError, ValueError):  # ValueError: the channel was closed
                    request = content_pb2.AbortRequest(ref=reference)
                    self._content.Abort(request, metadata=self._metadata)
            raise

    def _stored(
        self, upload: Upload, layer: Iterable[bytes], wanted: Wanted
    ) -> descriptor_pb2.Descriptor:
        plain, stored = hashlib.sha256(), hashlib.sha256()
        for block in in_blocks(_compressed(_hashed(layer, plain), wanted.compression)):
            stored.update(block)
            upload.write(block)
        labels = dict(wanted.labels)
        if wanted.compression is not Compression.NONE:
            labels[UNCOMPRESSED_LABEL] = f"sha256:{plain.hexdigest()}"
        upload.commit(labels)
        digest = f"sha256:{stored.hexdigest()}"
        size = self._check(digest, labels.get(UNCOMPRESSED_LABEL, ""))
        return descriptor_pb2.Descriptor(
            media_type=wanted.compression.value, digest=digest, size=size
        )

    def _check(self, digest: str, uncompressed: str) -> int:
        """The size of content that is there, labelled with what it is a compression of."""
        request = content_pb2.InfoRequest(digest=digest)
        info = self._content.Info(request, metadata=self._metadata).info
        if uncompressed and UNCOMPRESSED_LABEL not in info.labels:
            info.labels[UNCOMPRESSED_LABEL] = uncompressed
            update = content_pb2.UpdateRequest(
                info=info, update_mask=FieldMask(paths=[f"labels.{UNCOMPRESSED_LABEL}"])
            )
            self._content.Update(update, metadata=self._metadata)
        return info.size


class Upload:
    """A stream to containerd, on which each request is answered before the next one is sent. To be used as a context.

    ``expected`` is the digest that the content must have, and ``size`` its bytes, where they are known. ``timeout`` is
    in seconds. Methods raise ``grpc.RpcError``; :meth:`cancel` is for any thread.
    """

    def __init__(
        self,
        content: content_pb2_grpc.ContentStub,
        reference: str,
        metadata: Metadata,
        *,
        expected: str = "",
        size: int = 0,
        timeout: float | None = None,
    ) -> None:
        self._requests: SimpleQueue[content_pb2.WriteContentRequest | None] = SimpleQueue()
        requests = iter(self._requests.get, None)
        write = content.Write(requests, metadata=metadata, timeout=timeout)
        self._answers = cast("_Answers", write)
        self._reference = reference
        self._expected = expected
        self._size = size
        self._offset = 0

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End it, whether it was begun or not; a call that is under way fails."""
        self._requests.put(None)  # gRPC's thread waits for it
        self._answers.cancel()

    def begin(self) -> bool:
        """Lock the upload's name. Says whether containerd has all that is expected, of another of its namespaces."""
        at = self._ask(content_pb2.STAT).offset
        if not self._expected or at != self._size:
            return False
        self._offset = at
        return True

    def write(self, data: bytes) -> None:
        """Append data; the first of it replaces what an earlier upload of that name has left."""
        self._ask(content_pb2.WRITE, data=data, offset=self._offset)
        self._offset += len(data)

    def commit(self, labels: Mapping[str, str]) -> bool:
        """Make it content, with these labels. Says whether it was not there before; then labels stay as they are."""
        try:
            self._ask(content_pb2.COMMIT, offset=self._offset, labels=labels)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                raise
            return False
        return True

    def _ask(
        self,
        action: content_pb2.WriteAction.ValueType,
        *,
        data: bytes = b"",
        offset: int = 0,
        labels: Mapping[str, str] | None = None,
    ) -> content_pb2.WriteContentResponse:
        self._requests.put(
            content_pb2.WriteContentRequest(
                action=action,
                ref=self._reference,
                total=self._size,
                expected=self._expected,
                offset=offset,
                data=data,
                labels=labels,
            )
        )
        return self._answers.__next__()


def _hashed(pieces: Iterable[bytes], digest: hashlib._Hash) -> Iterator[bytes]:
    for piece in pieces:
        digest.update(piece)
        yield piece


def _compressed(pieces: Iterable[bytes], compression: Compression) -> Iterator[bytes]:
    if compression is Compression.NONE:
        yield from pieces
        return
    compressor: _Compressor = (
        zlib.compressobj(wbits=16 + zlib.MAX_WBITS)
        if compression is Compression.GZIP
        else zstandard.ZstdCompressor().compressobj()
    )
    for piece in pieces:
        yield compressor.compress(piece)
    yield compressor.flush()


def in_blocks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in fewer messages; none is empty."""
    block = bytearray()
    for piece in pieces:
        block += piece
        if len(block) >= BLOCK:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)
