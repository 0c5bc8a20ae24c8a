"""What a snapshotter answers to containerd, noted down in between; every call passes through as it is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc

THREADS = 32
# Of the metadata of a call, what gRPC writes itself.
OWN_METADATA = ("user-agent", "grpc-")


@dataclass(frozen=True, slots=True)
class Answer:
    """One message of an answer: the method (``Prepare``), and the serialised request and response."""

    method: str
    request: bytes
    response: bytes


class Recorder(grpc.GenericRpcHandler):
    """Serves every call of one request by sending it to another server."""

    def __init__(self, address: Path, channel: grpc.Channel) -> None:
        self._answers: list[Answer] = []
        self._channel = channel
        self._lock = threading.Lock()
        self.address = address

    def answers(self) -> list[Answer]:
        """All answers so far, in order."""
        with self._lock:
            return list(self._answers)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Forward a call. On the wire a single response is a stream of one, so this serves both kinds."""
        method = handler_call_details.method
        metadata = [
            (key, value)
            for key, value in handler_call_details.invocation_metadata
            if not key.startswith(OWN_METADATA)
        ]
        call = self._channel.unary_stream(method, None, None)

        def forward(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            responses = call(request, metadata=metadata)
            context.add_callback(responses.cancel)  # also when the caller's deadline has passed
            try:
                for response in responses:
                    with self._lock:
                        self._answers.append(Answer(method.rpartition("/")[2], request, response))
                    yield response
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())

        return grpc.unary_stream_rpc_method_handler(forward)


@contextlib.contextmanager
def recorder(address: Path, target: Path) -> Iterator[Recorder]:
    """Pass the calls that come to the socket ``address`` on to ``target`` for the time of the context."""
    with grpc.insecure_channel(f"unix:{target}") as channel:
        handler = Recorder(address, channel)
        server = grpc.server(ThreadPoolExecutor(THREADS), handlers=[handler])
        server.add_insecure_port(f"unix:{address}")
        server.start()
        try:
            yield handler
        finally:
            server.stop(None).wait()
