"""A place between the clients of a gRPC server on a unix socket and the server: every call passes through as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc

THREADS = 32
# Of the metadata of a call, what gRPC writes itself.
OWN_METADATA = ("user-agent", "grpc-")
# What a call carries at most; gRPC's own limit is smaller than containerd's.
MESSAGE_BYTES = 16 << 20


class Between(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic for mypy alone
    """Passes calls on to ``channel``. On the wire one message is a stream of one, so this does for all calls."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def called(self, method: str, context: grpc.ServicerContext) -> None:
        """A call of ``method`` (``/package.Service/Method``) has come, and goes on when this returns."""

    def answered(self, method: str, request: bytes, response: bytes) -> None:
        """A message of an answer has come, and goes on when this returns. ``request`` is the call's first message."""

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler[bytes, bytes]:
        """See grpc."""
        method: str = handler_call_details.method
        return grpc.stream_stream_rpc_method_handler(self._forward(method))

    def _forward(self, method: str) -> Callable[..., Iterator[bytes]]:
        def serve(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            self.called(method, context)
            given = context.invocation_metadata()
            metadata = tuple(item for item in given if not item[0].startswith(OWN_METADATA))
            first: list[bytes] = []
            call = self._channel.stream_stream(method, None, None)
            responses = call(_as_long_as_they_come(requests, first), metadata=metadata)
            context.add_callback(responses.cancel)  # also when the caller's deadline has passed
            try:
                for response in responses:
                    self.answered(method, b"".join(first), response)
                    yield response
            except grpc.RpcError as error:
                context.abort(error.code(), error.details() or "")

        return serve


B = TypeVar("B", bound=Between)


@contextlib.contextmanager
def placed(kind: Callable[[grpc.Channel], B], address: Path, target: Path) -> Iterator[B]:
    """Pass the calls that come to the socket ``address`` on to ``target`` for the time of the context."""
    limits = [("grpc.max_receive_message_length", MESSAGE_BYTES)]
    with (
        grpc.insecure_channel(f"unix:{target}", limits) as channel,
        ThreadPoolExecutor(THREADS) as threads,
    ):
        between = kind(channel)
        server = grpc.server(threads, handlers=[between], options=limits)
        server.add_insecure_port(f"unix:{address}")
        server.start()
        try:
            yield between
        finally:
            server.stop(None).wait()


def _as_long_as_they_come(requests: Iterator[bytes], first: list[bytes]) -> Iterator[bytes]:
    """The requests of a call, until there are no more or the call has ended; the first is noted."""
    with contextlib.suppress(grpc.RpcError, StopIteration):
        for request in requests:
            if not first:
                first.append(request)
            yield request
