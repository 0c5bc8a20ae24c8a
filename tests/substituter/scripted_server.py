"""An HTTP/1.1 server that does what it is told, on streams in memory.

Everything between :class:`HttpSubstituter` and the socket is the real thing: httpx, httpcore, h11.
Only the network is not, so that a virtual clock stands still until everybody waits.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import httpcore
import httpx
import trio
from trio.testing import lockstep_stream_pair


@dataclass(frozen=True)
class Request:
    """A request as it came; names of headers are in lower case."""

    target: str
    headers: dict[str, str]


@dataclass(frozen=True)
class Reply:
    """How to answer one request.

    ``Content-Length`` is that of ``body`` unless ``headers`` or ``chunked`` say otherwise. After
    ``stop_at`` bytes of the body the connection is closed, or with ``stall`` nothing more comes.
    ``endless`` repeats the body until the client has enough. ``silent`` does not answer at all.
    """

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    stop_at: int | None = None
    stall: bool = False
    chunked: bool = False
    endless: bool = False
    silent: bool = False

    def head(self) -> bytes:
        fields = {"Content-Length": str(len(self.body)), **self.headers}
        if self.chunked or self.endless:
            fields["Transfer-Encoding"] = "chunked"
            del fields["Content-Length"]
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        return "\r\n".join([*lines, "", ""]).encode()


class ScriptedServer:
    """Answers each target with its replies in turn, the last of them for ever; else with 404."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self.sent = 0  # bytes of bodies
        self._replies: dict[str, deque[Reply]] = {}

    def on(self, target: str, *replies: Reply) -> None:
        self._replies[target] = deque(replies)

    def targets(self) -> list[str]:
        return [request.target for request in self.requests]

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Serve one connection until either side closes it."""
        self.connections += 1
        with suppress(trio.BrokenResourceError):  # the client went away
            async with stream:
                await self.converse(stream)

    async def converse(self, stream: trio.abc.Stream) -> None:
        while request := await _receive_request(stream):
            self.requests.append(request)
            if not await self._answer(stream, self._reply(request.target)):
                return

    def _reply(self, target: str) -> Reply:
        replies = self._replies.get(target)
        if replies is None:
            return Reply(404, b"<html>there is nothing here</html>")
        return replies[0] if len(replies) == 1 else replies.popleft()

    async def _answer(self, stream: trio.abc.Stream, reply: Reply) -> bool:
        """Send the reply; returns whether the connection goes on."""
        if reply.silent:
            await trio.sleep_forever()
        await stream.send_all(reply.head())
        body = reply.body if reply.stop_at is None else reply.body[: reply.stop_at]
        while True:
            await self._send_body(stream, reply, body)
            if not reply.endless:
                break
        if reply.stall:
            await trio.sleep_forever()
        if reply.stop_at is not None:
            return False
        if reply.chunked:
            await stream.send_all(b"0\r\n\r\n")
        return True

    async def _send_body(self, stream: trio.abc.Stream, reply: Reply, body: bytes) -> None:
        chunked = reply.chunked or reply.endless
        await stream.send_all(b"%x\r\n%b\r\n" % (len(body), body) if chunked else body)
        self.sent += len(body)


class MemoryNetwork(httpcore.AsyncNetworkBackend):
    """A network on which only the hosts in ``servers`` exist."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.servers: dict[str, ScriptedServer] = {}
        self.refusing: set[str] = set()
        self.attempts = 0  # to connect
        self._connections: dict[str, list[trio.CancelScope]] = {}

    def server(self, host: str) -> ScriptedServer:
        """A new server for ``host``."""
        self.servers[host] = ScriptedServer()
        return self.servers[host]

    def attach(self, client: httpx.AsyncClient) -> httpx.AsyncClient:
        """Let a client use this network and no other."""
        client._transport._pool._network_backend = self  # type: ignore[attr-defined]
        for transport in client._mounts.values():
            transport.network = self  # type: ignore[union-attr]
        return client

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 -- httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        self.attempts += 1
        try:
            if host in self.refusing:
                raise ConnectionRefusedError(111, "Connection refused")
            if host not in self.servers:
                raise socket.gaierror(-2, "Name or service not known")
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        # Without any buffer: nothing is sent that the client does not receive.
        ours, theirs = lockstep_stream_pair()
        self._nursery.start_soon(self._serve, host, theirs)
        return _MemoryStream(ours)

    def take_down(self, host: str) -> None:
        """Break the connections to ``host``, and refuse others until it is taken out of ``refusing``."""
        self.refusing.add(host)
        for scope in self._connections.pop(host, []):
            scope.cancel()

    async def _serve(self, host: str, stream: trio.abc.Stream) -> None:
        with trio.CancelScope() as scope:
            self._connections.setdefault(host, []).append(scope)
            await self.servers[host].serve(stream)

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109 -- httpcore's signature
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise httpcore.ConnectError("no unix sockets here")

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


class _MemoryStream(httpcore.AsyncNetworkStream):
    """What httpcore's own backend for trio makes of a socket, for a stream in memory."""

    def __init__(self, stream: trio.StapledStream[Any, Any]) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        try:
            with trio.fail_after(float("inf") if timeout is None else timeout):
                return bytes(await self._stream.receive_some(max_bytes))
        except trio.TooSlowError as error:
            raise httpcore.ReadTimeout(str(error)) from error
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise httpcore.ReadError(str(error)) from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        if not buffer:
            return
        try:
            with trio.fail_after(float("inf") if timeout is None else timeout):
                await self._stream.send_all(buffer)
        except trio.TooSlowError as error:
            raise httpcore.WriteTimeout(str(error)) from error
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise httpcore.WriteError(str(error)) from error

    async def aclose(self) -> None:
        await self._stream.aclose()

    def get_extra_info(self, info: str) -> Any:
        return False if info == "is_readable" else None


async def _receive_request(stream: trio.abc.Stream) -> Request | None:
    received = bytearray()
    while not received.endswith(b"\r\n\r\n"):
        data = await stream.receive_some(65536)
        if not data:
            return None
        received += data
    first, *lines = received.decode("latin-1").split("\r\n")
    pairs = (line.split(": ", 1) for line in lines if line)
    return Request(first.split(" ")[1], {name.lower(): value for name, value in pairs})
