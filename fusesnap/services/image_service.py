"""Kubernetes' image service (CRI v1, ``proto/``) for images of Nix packages, in front of containerd's own.

A kubelet has one endpoint for images and one for pods: we are the first, containerd is the second. What is not ours
is handed on as it came, and answered as it is answered: bytes, metadata, deadline, cancellation, status. Every call
of this service has one request, and one answer or a stream of them; on the wire both are the same, so calls that
nobody knows yet are handed on too.

containerd knows an image by what it makes of a reference (``nix:0/nix/store/…:latest``). So a reference that may be
spelled otherwise for us is handed on as that.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError

from fusesnap.errors import FusesnapError
from fusesnap.services.api.cri_images_pb2 import (
    ImageStatusRequest,
    PullImageRequest,
    PullImageResponse,
    RemoveImageRequest,
)
from fusesnap.services.calls import Calls
from fusesnap.services.containerd_client import HINT
from fusesnap.services.status import status_of

SERVICE: Final = "runtime.v1.ImageService"
OLD_SERVICE: Final = "runtime.v1alpha2.ImageService"
# Each call waits on a thread of the server, and what it waits for may need the snapshotter, whose calls need threads of
# the same server. A kubelet makes a few at a time.
CONCURRENT_CALLS: Final = 32
# What gRPC says where nobody listens (``pick_first.cc`` of its core).
_NOBODY: Final = "failed to connect to all addresses"
_LONGEST: Final = float(1 << 30)  # seconds
# What each hop says for itself.
_OF_THE_HOP: Final = ("user-agent",)

Metadata = tuple[tuple[str, str | bytes], ...]
_Named = TypeVar("_Named", PullImageRequest, ImageStatusRequest, RemoveImageRequest)


class NixImages(Protocol):
    """Images that are in no registry."""

    def name(self, reference: str) -> str | None:
        """What containerd calls the image of a reference; ``None`` where the reference is not for us.

        Raises ``InvalidData`` for one that can be for nobody else, and is wrong.
        """
        ...

    async def pull(self, reference: str) -> str:
        """Have the image in containerd, unpacked; returns its id. Raises the reason why it cannot be had."""
        ...


class _Upstream(Protocol):
    """A call to containerd; grpc's type knows less of it."""

    def __iter__(self) -> Iterator[bytes]: ...
    def cancel(self) -> None: ...
    def initial_metadata(self) -> Metadata: ...
    def trailing_metadata(self) -> Metadata: ...
    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str: ...


# Told before containerd is asked to pull an image. It does not wait, and does not fail.
PullBegins = Callable[[], Awaitable[object]]


class ImageService:
    """Answers the calls of the service, each on a thread of grpcio's. ``containerd`` is a channel to its socket."""

    def __init__(
        self,
        images: NixImages,
        containerd: grpc.Channel,
        calls: Calls,
        pull_begins: PullBegins,
    ) -> None:
        self._images = images
        self._containerd = containerd
        self._calls = calls
        self._pull_begins = pull_begins
        self._room = threading.Semaphore(CONCURRENT_CALLS)

    def answer(self, method: str, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """The answers to a call of ``method``, a full name as ``/runtime.v1.ImageService/PullImage``."""
        with self._admitted(context):
            match method.rpartition("/")[2]:
                case "PullImage":
                    yield from self._pull(method, request, context)
                case "ImageStatus":
                    renamed = self._renamed(ImageStatusRequest, request, context)
                    yield from self._hand_on(method, renamed, context)
                case "RemoveImage":
                    renamed = self._renamed(RemoveImageRequest, request, context)
                    yield from self._hand_on(method, renamed, context)
                case _:
                    yield from self._hand_on(method, request, context)

    def _pull(self, method: str, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        asked = _parsed(PullImageRequest, request)
        if asked is None or self._name(asked.image.image, context) is None:
            self._calls.run(self._pull_begins, context)
            yield from self._hand_on(method, request, context)
            return
        reference = asked.image.image
        image = self._calls.run(lambda: self._images.pull(reference), context)
        yield PullImageResponse(image_ref=image).SerializeToString()

    def _renamed(self, kind: type[_Named], request: bytes, context: grpc.ServicerContext) -> bytes:
        """The request with the name that containerd has for the image; what we do not know of it stays in it."""
        asked = _parsed(kind, request)
        name = self._name(asked.image.image, context) if asked is not None else None
        if asked is None or name is None or name == asked.image.image:
            return request
        asked.image.image = name
        return asked.SerializeToString()

    def _name(self, reference: str, context: grpc.ServicerContext) -> str | None:
        try:
            return self._images.name(reference)
        except FusesnapError as error:
            context.abort(*status_of(error))

    def _hand_on(
        self, method: str, request: bytes, context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        call = cast(
            "_Upstream",
            self._containerd.unary_stream(method, None, None)(
                request,
                timeout=_remaining(context),
                metadata=_handed_on(context.invocation_metadata()),
            ),
        )
        if not context.add_callback(call.cancel):
            call.cancel()
        try:
            context.send_initial_metadata(call.initial_metadata())
            yield from call
        except grpc.RpcError as error:
            if error is not cast("object", call):
                raise
        context.set_trailing_metadata(call.trailing_metadata())
        context.set_code(call.code())
        context.set_details(_with_hint(call.details()))

    @contextmanager
    def _admitted(self, context: grpc.ServicerContext) -> Iterator[None]:
        if not self._room.acquire(blocking=False):
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"fusesnap: {CONCURRENT_CALLS} calls of the image service are under way; try again",
            )
        try:
            yield
        finally:
            self._room.release()


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic for mypy alone
    """Finds who answers a call, by the name of its service alone."""

    def __init__(self, service: ImageService) -> None:
        self._service = service

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        """See grpc."""
        method = handler_call_details.method
        service = method.lstrip("/").rpartition("/")[0]
        if service == OLD_SERVICE:
            return grpc.unary_stream_rpc_method_handler(_too_old)
        if service != SERVICE:
            return None
        return grpc.unary_stream_rpc_method_handler(
            lambda request, context: self._service.answer(method, request, context)
        )


def image_service(
    images: NixImages, containerd: grpc.Channel, pull_begins: PullBegins
) -> Callable[[grpc.Server, Calls], None]:
    """The service, to be registered beside others."""

    def register(server: grpc.Server, calls: Calls) -> None:
        handlers = _Handlers(ImageService(images, containerd, calls, pull_begins))
        server.add_generic_rpc_handlers((handlers,))

    return register


def _too_old(_: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    context.abort(
        grpc.StatusCode.UNIMPLEMENTED,
        f"fusesnap serves {SERVICE}; {OLD_SERVICE} is of Kubernetes before 1.23: upgrade the client",
    )


def _with_hint(details: str) -> str:
    """What is said where nobody is at containerd's address, with what to do; all else as containerd says it."""
    return f"{details}: {HINT}" if details.startswith(_NOBODY) else details


def _parsed(kind: type[_Named], request: bytes) -> _Named | None:
    """The request; ``None`` for one that containerd shall complain of."""
    try:
        return kind.FromString(request)
    except DecodeError:
        return None


def _remaining(context: grpc.ServicerContext) -> float | None:
    """Seconds until the client's deadline; grpcio has centuries for none, and cannot take them back."""
    remaining = context.time_remaining()
    return remaining if remaining is not None and remaining < _LONGEST else None


def _handed_on(metadata: object) -> Metadata:
    pairs = cast("Iterator[tuple[str, str | bytes]]", metadata)
    return tuple((key, value) for key, value in pairs if key not in _OF_THE_HOP)
