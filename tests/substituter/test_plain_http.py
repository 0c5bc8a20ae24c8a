"""Connections of our own beneath httpx: what is used again, who waits, and where a body ends."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
import trio
from trio.testing import MockClock

from fusesnap.substituter.client import make_client
from fusesnap.substituter.plain_connection import READ
from fusesnap.substituter.plain_http import PlainTransport
from tests.substituter.scripted_server import MemoryNetwork, Reply, ScriptedServer

HELLO = Reply(body=b"hello")


@pytest.fixture
async def transport(network: MemoryNetwork) -> AsyncIterator[PlainTransport]:
    """Two connections, kept for a minute."""
    transport = PlainTransport(2, 60.0, network)
    yield transport
    await transport.aclose()


def request(url: str, **timeouts: float) -> httpx.Request:
    return httpx.Request("GET", url, extensions={"timeout": timeouts})


async def read(transport: PlainTransport, url: str) -> bytes:
    response = await transport.handle_async_request(request(url))
    return await response.aread()


@pytest.mark.parametrize(
    "reply",
    [
        HELLO,
        Reply(body=b"hello", chunked=True),
        Reply(body=b"", headers={"Content-Length": "0"}),
        Reply(body=b"h" * (3 * READ)),
        Reply(status=404, body=b"no"),
    ],
    ids=["short", "chunked", "empty", "long", "missing"],
)
async def test_a_connection_carries_one_request_after_another(
    reply: Reply, server: ScriptedServer, transport: PlainTransport
) -> None:
    server.on("/file", reply)
    for _ in range(3):
        assert await read(transport, "http://cache/file") == reply.body
    assert (server.connections, len(server.requests)) == (1, 3)


async def test_a_connection_that_the_server_closes_is_not_used_again(
    server: ScriptedServer, transport: PlainTransport
) -> None:
    server.on("/file", Reply(body=b"hello", headers={"Connection": "close"}), HELLO)
    for _ in range(2):
        assert await read(transport, "http://cache/file") == b"hello"
    assert server.connections == 2


async def test_what_follows_a_body_is_no_answer_to_the_next_request(nursery: trio.Nursery) -> None:
    """On real sockets, where it has come before anybody reads it."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    served = 0

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal served
        served += 1
        await stream.receive_some(65536)
        await stream.send_all(
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhelloHTTP/1.1 200 OK\r\n"
        )
        await trio.sleep_forever()

    nursery.start_soon(trio.serve_listeners, serve, listeners)
    transport = PlainTransport(2, 60.0)
    for _ in range(2):
        assert await read(transport, f"http://127.0.0.1:{port}/file") == b"hello"
    assert served == 2
    await transport.aclose()


async def test_a_body_that_is_given_up_takes_its_connection_with_it(
    server: ScriptedServer, transport: PlainTransport
) -> None:
    server.on("/file", Reply(body=b"h" * (4 * READ)), HELLO)
    response = await transport.handle_async_request(request("http://cache/file"))
    assert isinstance(response.stream, httpx.AsyncByteStream)
    await anext(aiter(response.stream))
    await response.aclose()
    assert await read(transport, "http://cache/file") == b"hello"
    assert server.connections == 2


async def test_a_body_that_ends_too_early(
    server: ScriptedServer, transport: PlainTransport
) -> None:
    server.on("/file", Reply(body=b"hello", stop_at=2))
    with pytest.raises(httpx.RemoteProtocolError, match="3 bytes before the end"):
        await read(transport, "http://cache/file")


async def test_a_server_that_closes_instead_of_answering(
    network: MemoryNetwork, transport: PlainTransport
) -> None:
    class Closing(ScriptedServer):
        async def converse(self, stream: trio.abc.Stream) -> None:
            await stream.receive_some(65536)

    network.servers["cache"] = Closing()
    with pytest.raises(httpx.RemoteProtocolError, match="without sending a response"):
        await read(transport, "http://cache/file")


@pytest.mark.parametrize("length", [None, READ + 5], ids=["chunked", "of known length"])
async def test_a_body_is_sent(length: int | None, nursery: trio.Nursery) -> None:
    body = b"h" * (READ + 5)
    received = bytearray()

    async def serve(stream: trio.SocketStream) -> None:
        while body not in received.replace(b"\r\n3\r\n", b"").replace(b"\r\n40002\r\n", b""):
            received.extend(await stream.receive_some(65536))
        await stream.send_all(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")

    async def pieces() -> AsyncIterator[bytes]:
        yield body[:3]
        yield body[3:]

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    nursery.start_soon(trio.serve_listeners, serve, listeners)
    async with make_client() as client:
        headers = {} if length is None else {"Content-Length": str(length)}
        url = f"http://127.0.0.1:{port}/file"
        response = await client.put(url, content=pieces(), headers=headers)
    assert response.status_code == 201
    assert (b"chunked" in received) == (length is None)


async def test_who_comes_when_all_are_in_use_waits_for_a_turn(
    server: ScriptedServer, transport: PlainTransport, autojump_clock: MockClock
) -> None:
    server.on("/file", HELLO)
    held = [await transport.handle_async_request(request("http://cache/file")) for _ in range(2)]
    with pytest.raises(httpx.PoolTimeout):
        await transport.handle_async_request(request("http://cache/file", pool=1.0))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, transport, "http://cache/file")
        await trio.testing.wait_all_tasks_blocked()
        assert len(server.requests) == 2
        await held[0].aread()
    assert (len(server.requests), server.connections) == (3, 2)
    await held[1].aclose()


async def test_what_is_idle_gives_way_to_another_server(
    network: MemoryNetwork, server: ScriptedServer, transport: PlainTransport
) -> None:
    other = network.server("other")
    for each in (server, other):
        each.on("/file", HELLO)
    both = [await transport.handle_async_request(request("http://cache/file")) for _ in range(2)]
    for response in both:
        await response.aread()
    await read(transport, "http://other/file")
    both = [await transport.handle_async_request(request("http://cache/file")) for _ in range(2)]
    for response in both:
        await response.aread()
    # One of the two went for the other server's, which went for the second of these.
    assert (server.connections, other.connections) == (3, 1)
    await read(transport, "http://other/file")
    assert other.connections == 2


async def test_a_request_that_fails_gives_its_turn_back(
    network: MemoryNetwork, server: ScriptedServer, transport: PlainTransport
) -> None:
    server.on("/file", HELLO)
    for _ in range(5):
        with pytest.raises(httpx.ConnectError):
            await read(transport, "http://nowhere/file")
    assert await read(transport, "http://cache/file") == b"hello"


async def test_one_that_nobody_used_for_long_is_not_used_again(
    server: ScriptedServer, transport: PlainTransport, autojump_clock: MockClock
) -> None:
    server.on("/file", HELLO)
    for seconds, connections in [(0, 1), (59, 1), (61, 2)]:
        await trio.sleep(seconds)
        assert await read(transport, "http://cache/file") == b"hello"
        assert server.connections == connections


async def test_timeouts_are_those_of_the_request(
    server: ScriptedServer, transport: PlainTransport, autojump_clock: MockClock
) -> None:
    server.on("/silent", Reply(silent=True))
    server.on("/stalls", Reply(body=b"hello", stop_at=2, stall=True))
    with pytest.raises(httpx.ReadTimeout):
        await transport.handle_async_request(request("http://cache/silent", read=5.0))
    response = await transport.handle_async_request(request("http://cache/stalls", read=5.0))
    with pytest.raises(httpx.ReadTimeout):
        await response.aread()
    await response.aclose()


@pytest.mark.parametrize("name", ["http_proxy", "ALL_PROXY"])
async def test_a_proxy_of_the_environment_is_not_passed_by(
    name: str, network: MemoryNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "http://proxy:3128")
    async with make_client(trust_env=True) as client:
        assert not any(isinstance(each, PlainTransport) for each in client._mounts.values())
    async with make_client(trust_env=False) as client:
        assert any(isinstance(each, PlainTransport) for each in client._mounts.values())
