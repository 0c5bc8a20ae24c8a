"""HTTP/1.1 to the server itself, without encryption: what httpx's own transport does, for less.

A cache nearby answers a small request in less time than httpcore takes for it: its pool walks through all connections
at every change. Here a connection is one of those that are idle, and else a new one. The streams are httpcore's, and
its errors and h11's are httpx's under the same names.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import h11
import httpcore
import httpx
import trio

from fusesnap.substituter.plain_connection import PlainConnection

_ERRORS: Final[Mapping[type[Exception], type[httpx.TransportError]]] = {
    httpcore.ConnectError: httpx.ConnectError,
    httpcore.ConnectTimeout: httpx.ConnectTimeout,
    httpcore.ReadError: httpx.ReadError,
    httpcore.ReadTimeout: httpx.ReadTimeout,
    httpcore.WriteError: httpx.WriteError,
    httpcore.WriteTimeout: httpx.WriteTimeout,
    h11.LocalProtocolError: httpx.LocalProtocolError,
    h11.RemoteProtocolError: httpx.RemoteProtocolError,
}


@contextmanager
def _translated(request: httpx.Request) -> Iterator[None]:
    try:
        yield
    except tuple(_ERRORS) as error:
        raise _ERRORS[type(error)](str(error), request=request) from error


class PlainTransport(httpx.AsyncBaseTransport):
    """Up to ``connections`` at once, to all servers together; who comes when all are in use waits for a turn.

    One that has been ``idle`` for so many seconds is closed. ``network`` connects.
    """

    def __init__(
        self, connections: int, idle: float, network: httpcore.AsyncNetworkBackend | None = None
    ) -> None:
        self.network = network or httpcore.TrioBackend()
        self._connections = connections
        self._idle_for = idle
        self._turns = trio.Semaphore(connections)
        self._idle: deque[PlainConnection] = deque()  # the one that was used last at the end

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send ``request``; the body of the response is read from its stream."""
        timeouts = request.extensions.get("timeout", {})
        await self._turn(request, timeouts.get("pool"))
        connection = None
        try:
            with _translated(request):
                connection = await self._connection(request, timeouts.get("connect"))
                head = await connection.ask(request, timeouts.get("write"), timeouts.get("read"))
        except BaseException:
            await self.leave(connection)
            raise
        return httpx.Response(
            head.status_code,
            headers=head.headers.raw_items(),
            stream=_Body(self, connection, request, timeouts.get("read")),
            extensions={
                "http_version": b"HTTP/" + head.http_version,
                "reason_phrase": bytes(head.reason),
            },
        )

    async def aclose(self) -> None:
        """Close what is idle."""
        while self._idle:
            await self._idle.pop().aclose()

    async def _turn(self, request: httpx.Request, seconds: float | None) -> None:
        if seconds is None:
            await self._turns.acquire()
            return
        try:
            with trio.fail_after(seconds):
                await self._turns.acquire()
        except trio.TooSlowError as error:
            raise httpx.PoolTimeout(f"no turn within {seconds:g} s", request=request) from error

    async def _connection(self, request: httpx.Request, connect: float | None) -> PlainConnection:
        origin = request.url.raw_host.decode("ascii"), request.url.port or 80
        await self._close_the_old()
        while (connection := self._take_idle(origin)) is not None:
            if not connection.has_ended:
                return connection
            await connection.aclose()
        while len(self._idle) > self._turns.value:  # all that may be are there: to other servers
            await self._idle.popleft().aclose()
        return PlainConnection(origin, await self.network.connect_tcp(*origin, connect))

    def _take_idle(self, origin: tuple[str, int]) -> PlainConnection | None:
        for connection in reversed(self._idle):
            if connection.origin == origin:
                self._idle.remove(connection)
                return connection
        return None

    async def leave(self, connection: PlainConnection | None) -> None:
        """An exchange over ``connection`` is over, or given up; ``None``: there was none."""
        self._turns.release()
        if connection is not None and connection.is_reusable:
            connection.idle_since = trio.current_time()
            self._idle.append(connection)
        elif connection is not None:
            await connection.aclose()

    async def _close_the_old(self) -> None:
        """Whatever is between us and a server may have forgotten them, and would not say so."""
        while self._idle and trio.current_time() - self._idle[0].idle_since > self._idle_for:
            await self._idle.popleft().aclose()


class _Body(httpx.AsyncByteStream):
    """The body of a response, once."""

    def __init__(
        self,
        transport: PlainTransport,
        connection: PlainConnection,
        request: httpx.Request,
        read: float | None,
    ) -> None:
        self._transport = transport
        self._connection: PlainConnection | None = connection
        self._request = request
        self._read = read

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._connection is None:
            raise StopAsyncIteration
        with _translated(self._request):
            piece = await self._connection.receive(self._read)
        if not piece:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await self._transport.leave(connection)
