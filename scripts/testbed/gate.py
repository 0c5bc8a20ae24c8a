"""A gate before a gRPC server on a unix socket: every call passes through as it is, but for those that a test stops."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

THREADS = 32
# Of the metadata of a call, what gRPC writes itself.
OWN_METADATA = ("user-agent", "grpc-")
PATIENCE = 60.0  # seconds that a call is held, should nobody let it go
# What a call carries at most; gRPC's own limit is smaller than containerd's.
MESSAGE_BYTES = 16 << 20


class Hold:
    """A call that is held: ``reached`` is set when it has come, and it goes on when ``released`` is set."""

    def __init__(self, method: str, *, after: bool) -> None:
        self.method = method
        self.after = after
        self.reached = threading.Event()
        self.released = threading.Event()

    def wait(self) -> None:
        """Say that the call has come, and wait until it may go on."""
        self.reached.set()
        self.released.wait(PATIENCE)


class Gate(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic for mypy alone
    """Passes calls on to ``channel``. Methods are named as ``Leases/Create``, without their package."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._holds: list[Hold] = []
        self._refused: list[str] = []

    @contextlib.contextmanager
    def holding(self, method: str, *, after: bool = False) -> Iterator[Hold]:
        """Hold calls of ``method`` for the time of the context; ``after``: only their answers, of what is done then."""
        hold = Hold(method, after=after)
        self._holds.append(hold)
        try:
            yield hold
        finally:
            self._holds.remove(hold)
            hold.released.set()

    @contextlib.contextmanager
    def refusing(self, method: str) -> Iterator[None]:
        """Refuse calls of ``method`` for the time of the context."""
        self._refused.append(method)
        try:
            yield
        finally:
            self._refused.remove(method)

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler[bytes, bytes]:
        """See grpc."""
        method: str = handler_call_details.method
        return grpc.stream_stream_rpc_method_handler(self._forward(method))

    def _forward(self, method: str) -> Callable[..., Iterator[bytes]]:
        package, _, name = method.rpartition("/")
        short = f"{package.rpartition('.')[2]}/{name}"

        def serve(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            if short in self._refused:
                context.abort(grpc.StatusCode.UNAVAILABLE, f"{short} is refused")
            self._wait(short, after=False)
            given = context.invocation_metadata()
            metadata = tuple(item for item in given if not item[0].startswith(OWN_METADATA))
            call = self._channel.stream_stream(method, None, None)
            responses = call(_as_long_as_they_come(requests), metadata=metadata)
            context.add_callback(responses.cancel)
            try:
                for response in responses:
                    self._wait(short, after=True)
                    yield response
            except grpc.RpcError as error:
                context.abort(error.code(), error.details() or "")

        return serve

    def _wait(self, method: str, *, after: bool) -> None:
        for hold in list(self._holds):
            if (hold.method, hold.after) == (method, after):
                hold.wait()


@contextlib.contextmanager
def gate(address: Path, target: Path) -> Iterator[Gate]:
    """Pass the calls that come to the socket ``address`` on to ``target`` for the time of the context."""
    limits = [("grpc.max_receive_message_length", MESSAGE_BYTES)]
    with (
        grpc.insecure_channel(f"unix:{target}", limits) as channel,
        ThreadPoolExecutor(THREADS) as threads,
    ):
        between = Gate(channel)
        server = grpc.server(threads, handlers=[between], options=limits)
        server.add_insecure_port(f"unix:{address}")
        server.start()
        try:
            yield between
        finally:
            server.stop(None).wait()


def _as_long_as_they_come(requests: Iterator[bytes]) -> Iterator[bytes]:
    """The requests of a call, until there are no more or the call has ended."""
    with contextlib.suppress(grpc.RpcError, StopIteration):
        yield from requests
