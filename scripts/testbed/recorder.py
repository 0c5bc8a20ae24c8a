"""What a snapshotter answers to containerd, noted down in between; every call passes through as it is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc

SERVICE = "containerd.services.snapshots.v1.Snapshots"
METHODS = (
    "Prepare",
    "View",
    "Mounts",
    "Commit",
    "Remove",
    "Stat",
    "Update",
    "List",
    "Usage",
    "Cleanup",
)
THREADS = 32
# Of the metadata of a call, what gRPC writes itself.
OWN_METADATA = ("user-agent", "grpc-")

Forward = Callable[[bytes, grpc.ServicerContext], Iterator[bytes]]


@dataclass(frozen=True, slots=True)
class Answer:
    """One message of an answer: the method, and the serialised request and response."""

    method: str
    request: bytes
    response: bytes


class Recorder:
    """Listens at ``address`` and answers with what a snapshotter says on ``channel``."""

    def __init__(self, address: Path, channel: grpc.Channel) -> None:
        self._answers: list[Answer] = []
        self._channel = channel
        self._lock = threading.Lock()
        self.address = address

    def answers(self) -> list[Answer]:
        """All answers so far, in order."""
        with self._lock:
            return list(self._answers)

    def forward(self, method: str) -> Forward:
        """What serves a method. On the wire a single response is a stream of one, so this does for all of them."""
        call = self._channel.unary_stream(f"/{SERVICE}/{method}", None, None)

        def serve(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            given = context.invocation_metadata()
            metadata = tuple(item for item in given if not item[0].startswith(OWN_METADATA))
            responses = call(request, metadata=metadata)
            context.add_callback(responses.cancel)  # also when the caller's deadline has passed
            try:
                for response in responses:
                    with self._lock:
                        self._answers.append(Answer(method, request, response))
                    yield response
            except grpc.RpcError as error:
                context.abort(error.code(), error.details() or "")

        return serve


@contextlib.contextmanager
def recorder(address: Path, target: Path) -> Iterator[Recorder]:
    """Pass the calls that come to the socket ``address`` on to ``target`` for the time of the context."""
    with grpc.insecure_channel(f"unix:{target}") as channel:
        between = Recorder(address, channel)
        methods = {
            method: grpc.unary_stream_rpc_method_handler(between.forward(method))
            for method in METHODS
        }
        handler = grpc.method_handlers_generic_handler(SERVICE, methods)
        server = grpc.server(ThreadPoolExecutor(THREADS), handlers=[handler])
        server.add_insecure_port(f"unix:{address}")
        server.start()
        try:
            yield between
        finally:
            server.stop(None).wait()
