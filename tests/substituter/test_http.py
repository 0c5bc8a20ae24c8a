"""Lookups over HTTP as it is when it goes wrong, on a scripted server and a virtual clock."""

from __future__ import annotations

import gzip
import itertools

import httpx
import pytest
import trio
from trio.testing import MockClock

from fusesnap.errors import (
    DeadlineExceeded,
    FusesnapError,
    InvalidData,
    PathNotFound,
    Unavailable,
)
from fusesnap.substituter.http import MAX_REDIRECTS
from fusesnap.substituter.retry import Refusal, Throttled
from tests.substituter.exchanges import BIG, NARINFO, MakeCache, failure, read
from tests.substituter.samples import CACHE_INFO, sample
from tests.substituter.scripted_server import MemoryNetwork, Reply, ScriptedServer

# Lookups


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, PathNotFound),
        (410, PathNotFound),
        (403, PathNotFound),
        (401, Refusal),
        (407, Refusal),
        (400, Refusal),
        (204, Refusal),
        (206, Refusal),
        (304, Refusal),
        (408, Unavailable),
        (429, Unavailable),
        (500, Unavailable),
        (501, Refusal),
        (502, Unavailable),
        (503, Unavailable),
        (511, Refusal),
    ],
)
async def test_status_of_a_narinfo(
    server: ScriptedServer, cache: MakeCache, status: int, kind: type[FusesnapError]
) -> None:
    server.on(NARINFO, Reply(status))
    message = await failure(lambda: cache().narinfo(BIG.path), kind)
    assert message.startswith("http://cache: ")
    assert str(status) in message


async def test_forbidden_cache_info_is_not_a_missing_one(
    server: ScriptedServer, cache: MakeCache
) -> None:
    server.on("/nix-cache-info", Reply(403))
    assert "403 forbidden" in await failure(cache().cache_info, Refusal)


async def test_lookup_is_not_repeated_here(server: ScriptedServer, cache: MakeCache) -> None:
    server.on(NARINFO, Reply(500), Reply(200, BIG.narinfo))
    await failure(lambda: cache().narinfo(BIG.path), Unavailable)
    assert await cache().narinfo(BIG.path) == BIG.info


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "120"}, 120),
        (
            {
                "Date": "Tue, 15 Nov 1994 08:12:31 GMT",
                "Retry-After": "Tue, 15 Nov 1994 08:13:01 GMT",
            },
            30,
        ),
    ],
    ids=["seconds", "date"],
)
async def test_retry_after(
    server: ScriptedServer, cache: MakeCache, headers: dict[str, str], seconds: float
) -> None:
    server.on(NARINFO, Reply(503, headers=headers))
    with pytest.raises(Throttled, match=f"503 service unavailable.* {seconds} s") as caught:
        await cache().narinfo(BIG.path)
    assert caught.value.retry_after == seconds


@pytest.mark.parametrize("text", ["soon", "-1", "Tue, 15 Nov 1994 08:13:01 GMT", "9" * 40])
async def test_retry_after_that_says_nothing(
    server: ScriptedServer, cache: MakeCache, text: str
) -> None:
    server.on(NARINFO, Reply(429, headers={"Retry-After": text}))
    await failure(lambda: cache().narinfo(BIG.path), Unavailable)


async def test_server_that_never_answers(
    server: ScriptedServer, cache: MakeCache, autojump_clock: MockClock
) -> None:
    server.on(NARINFO, Reply(silent=True))
    message = await failure(lambda: cache().narinfo(BIG.path), DeadlineExceeded)
    assert message == "http://cache: no answer within 5 s"
    assert trio.current_time() == pytest.approx(5)


async def test_narinfo_that_stops_in_the_middle(
    server: ScriptedServer, cache: MakeCache, autojump_clock: MockClock
) -> None:
    server.on(NARINFO, Reply(200, BIG.narinfo, stop_at=10, stall=True))
    await failure(lambda: cache().narinfo(BIG.path), DeadlineExceeded)


async def test_narinfo_that_comes_drop_by_drop(
    network: MemoryNetwork, cache: MakeCache, autojump_clock: MockClock
) -> None:
    class Dripping(ScriptedServer):
        async def converse(self, stream: trio.abc.Stream) -> None:
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for byte in itertools.repeat(b"x"):
                await trio.sleep(1)
                await stream.send_all(byte)

    network.servers["cache"] = Dripping()
    with trio.CancelScope(deadline=trio.current_time() + 20) as scope:
        message = await failure(lambda: cache().narinfo(BIG.path), DeadlineExceeded)
    assert message == "http://cache: no answer within 8 s"
    assert not scope.cancelled_caught


async def test_connection_that_closes_without_an_answer(
    network: MemoryNetwork, cache: MakeCache
) -> None:
    class Closing(ScriptedServer):
        async def converse(self, stream: trio.abc.Stream) -> None:
            await stream.receive_some()

    network.servers["cache"] = Closing()
    message = await failure(lambda: cache().narinfo(BIG.path), Unavailable)
    assert "broken connection" in message
    assert network.servers["cache"].connections == 3


async def test_request_that_is_lost_with_its_connection_is_sent_again(
    server: ScriptedServer, cache: MakeCache
) -> None:
    lost = Reply(200, BIG.narinfo, stop_at=10)
    server.on(NARINFO, lost, lost, Reply(200, BIG.narinfo))
    assert await cache().narinfo(BIG.path) == BIG.info
    assert server.connections == 3


async def test_server_that_does_not_speak_http(network: MemoryNetwork, cache: MakeCache) -> None:
    class Mail(ScriptedServer):
        async def converse(self, stream: trio.abc.Stream) -> None:
            await stream.receive_some()
            await stream.send_all(b"500 Command not recognized\r\n")

    network.servers["cache"] = Mail()
    await failure(lambda: cache().narinfo(BIG.path), Unavailable)


async def test_narinfo_cut_short_by_the_connection(
    server: ScriptedServer, cache: MakeCache
) -> None:
    server.on(NARINFO, Reply(200, BIG.narinfo, stop_at=30))
    await failure(lambda: cache().narinfo(BIG.path), Unavailable)


async def test_narinfo_without_end_is_not_read_to_its_end(
    server: ScriptedServer, cache: MakeCache
) -> None:
    server.on(NARINFO, Reply(200, b"X: y\n" * 10_000, endless=True))
    await failure(lambda: cache().narinfo(BIG.path), InvalidData)
    assert server.sent < 3 << 20


async def test_refusal_with_a_page_without_end(server: ScriptedServer, cache: MakeCache) -> None:
    server.on(NARINFO, Reply(404, b"sorry " * 5000, endless=True))
    await failure(lambda: cache().narinfo(BIG.path), PathNotFound)
    assert server.sent < 1 << 20


async def test_refusals_keep_the_connection(server: ScriptedServer, cache: MakeCache) -> None:
    for number in range(5):
        await failure(lambda n=number: cache().narinfo(sample(f"no-{n}").path), PathNotFound)  # type: ignore[misc]
    assert server.connections == 1


async def test_host_that_is_not_known(cache: MakeCache) -> None:
    message = await failure(lambda: cache("http://nowhere").narinfo(BIG.path), Unavailable)
    assert message == "http://nowhere: its host name is not known: Name or service not known"


async def test_host_that_refuses(network: MemoryNetwork, cache: MakeCache) -> None:
    network.refusing.add("cache")
    message = await failure(lambda: cache().narinfo(BIG.path), Unavailable)
    assert message == "http://cache: no connection: Connection refused"


async def test_compressed_narinfo(server: ScriptedServer, cache: MakeCache) -> None:
    headers = {"Content-Encoding": "gzip"}
    server.on(NARINFO, Reply(200, gzip.compress(BIG.narinfo), headers))
    assert await cache().narinfo(BIG.path) == BIG.info
    assert server.requests[0].headers["accept-encoding"] == "identity"


async def test_compressed_narinfo_that_is_a_bomb(server: ScriptedServer, cache: MakeCache) -> None:
    server.on(NARINFO, Reply(200, gzip.compress(bytes(50 << 20)), {"Content-Encoding": "gzip"}))
    message = await failure(lambda: cache().narinfo(BIG.path), InvalidData)
    assert "1048576" in message


async def test_narinfo_in_an_encoding_that_nobody_knows(
    server: ScriptedServer, cache: MakeCache
) -> None:
    server.on(NARINFO, Reply(200, BIG.narinfo, {"Content-Encoding": "rot13"}))
    message = await failure(lambda: cache().narinfo(BIG.path), InvalidData)
    assert message.startswith(f"http://cache: {BIG.narinfo_name}: ")
    assert "rot13" in message


# What came


async def test_bodies_are_metered_as_they_were_sent(
    server: ScriptedServer, cache: MakeCache
) -> None:
    packed = gzip.compress(BIG.narinfo)
    server.on(NARINFO, Reply(302, b"moved", {"Location": "/other"}))
    server.on("/other", Reply(200, packed, {"Content-Encoding": "gzip"}))
    server.on("/nix-cache-info", Reply(200, CACHE_INFO))
    server.on("/trace/some", Reply(200, b"a trace"))
    server.on("/index", Reply(404, b"a page for people"))
    came: list[int] = []
    metered = cache(meter=came.append)
    await metered.narinfo(BIG.path)
    assert sum(came) == len(b"moved") + len(packed)
    came.clear()
    await metered.cache_info()
    await metered.small_file("trace/some", 100)
    assert sum(came) == len(CACHE_INFO) + len(b"a trace")
    came.clear()
    await failure(lambda: metered.small_file("index", 100), PathNotFound)
    assert sum(came) == len(b"a page for people")


async def test_what_is_lost_with_its_connection_came_too(
    server: ScriptedServer, cache: MakeCache
) -> None:
    server.on(NARINFO, Reply(200, BIG.narinfo, stop_at=30), Reply(200, BIG.narinfo))
    came: list[int] = []
    await cache(meter=came.append).narinfo(BIG.path)
    assert sum(came) == 30 + len(BIG.narinfo)


async def test_a_nar_is_counted_by_who_reads_it(server: ScriptedServer, cache: MakeCache) -> None:
    server.on(f"/{BIG.info.url}", Reply(200, BIG.file))
    came: list[int] = []
    assert await read(cache(meter=came.append), BIG.info) == BIG.file
    assert not came


# Redirects and addresses


async def test_redirects_are_followed(network: MemoryNetwork, cache: MakeCache) -> None:
    elsewhere = network.server("elsewhere")
    network.server("cache").on(NARINFO, Reply(302, b"moved", {"Location": "/other"}))
    network.servers["cache"].on("/other", Reply(307, headers={"Location": "http://elsewhere/it"}))
    elsewhere.on("/it", Reply(200, BIG.narinfo))
    assert await cache().narinfo(BIG.path) == BIG.info


async def test_redirects_in_a_circle(server: ScriptedServer, cache: MakeCache) -> None:
    server.on(NARINFO, Reply(302, headers={"Location": NARINFO}))
    assert "redirects" in await failure(lambda: cache().narinfo(BIG.path), Refusal)
    assert len(server.requests) == 1 + MAX_REDIRECTS


async def test_redirect_with_a_page_without_end(server: ScriptedServer, cache: MakeCache) -> None:
    server.on(NARINFO, Reply(302, b"moved " * 5000, {"Location": "/other"}, endless=True))
    server.on("/other", Reply(200, BIG.narinfo))
    assert await cache().narinfo(BIG.path) == BIG.info
    assert server.sent < 1 << 20


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://cache/", "http://[", "//"])
async def test_redirect_to_where_we_do_not_go(
    server: ScriptedServer, cache: MakeCache, target: str
) -> None:
    server.on(NARINFO, Reply(302, headers={"Location": target}))
    with pytest.raises(Unavailable, match=r"^http://cache: "):
        await cache().narinfo(BIG.path)


async def test_user_and_password_are_for_the_cache_alone(
    network: MemoryNetwork, cache: MakeCache
) -> None:
    elsewhere = network.server("elsewhere")
    server = network.server("cache")
    server.on(NARINFO, Reply(302, headers={"Location": "http://elsewhere/it"}))
    elsewhere.on("/it", Reply(200, BIG.narinfo))
    substituter = cache("http://user:p%40ss@cache/")
    assert substituter.url == "http://cache"
    await substituter.narinfo(BIG.path)
    expected = httpx.BasicAuth("user", "p@ss")._auth_header
    assert server.requests[0].headers["authorization"] == expected
    assert "authorization" not in elsewhere.requests[0].headers


async def test_nar_at_an_absolute_url_gets_no_password(
    network: MemoryNetwork, cache: MakeCache
) -> None:
    elsewhere = network.server("elsewhere")
    elsewhere.on("/nars/it", Reply(200, BIG.file))
    away = BIG.but(url="http://elsewhere/nars/it")
    assert await read(cache("http://user:pass@cache"), away.info) == BIG.file
    assert "authorization" not in elsewhere.requests[0].headers


async def test_url_of_a_nar_with_a_query(server: ScriptedServer, cache: MakeCache) -> None:
    server.on("/nix/nar/it.nar?hash=abc", Reply(200, BIG.file))
    asked = BIG.but(url="nar/it.nar?hash=abc")
    assert await read(cache("http://cache/nix/"), asked.info) == BIG.file
