"""NARs over HTTP as it is when it goes wrong, on a scripted server and a virtual clock."""

from __future__ import annotations

import gzip

import httpx
import pytest
import trio
from trio.testing import MockClock

from fusesnap.errors import (
    PathNotFound,
    Unavailable,
)
from fusesnap.substituter.http import HttpSubstituter
from fusesnap.substituter.retry import CannotContinue, Refusal, Throttled
from fusesnap.substituter.transfer import PROGRESS
from tests.substituter.exchanges import BIG, NAR, NARINFO, MakeCache, failure, read, rest
from tests.substituter.samples import CACHE_INFO
from tests.substituter.scripted_server import MemoryNetwork, Reply, ScriptedServer


async def test_range_is_asked_for_what_is_missing(
    server: ScriptedServer, cache: MakeCache, autojump_clock: MockClock
) -> None:
    tag = {"ETag": '"v1"'}
    server.on(NAR, Reply(200, BIG.file, tag, stop_at=100_000), rest(BIG, 100_000))
    assert await read(cache(), BIG.info) == BIG.file
    first, second = server.requests
    assert "range" not in first.headers
    assert second.headers["range"] == "bytes=100000-"
    assert second.headers["if-range"] == '"v1"'


async def test_weak_tag_is_no_condition(
    server: ScriptedServer, cache: MakeCache, autojump_clock: MockClock
) -> None:
    tag = {"ETag": 'W/"v1"'}
    server.on(NAR, Reply(200, BIG.file, tag, stop_at=100_000), rest(BIG, 100_000))
    assert await read(cache(), BIG.info) == BIG.file
    assert "if-range" not in server.requests[1].headers


async def test_transfer_that_breaks_again_and_again_but_goes_on(
    server: ScriptedServer, cache: MakeCache, autojump_clock: MockClock
) -> None:
    parts = [
        rest(BIG, start, stop_at=PROGRESS) for start in range(PROGRESS, 4 * PROGRESS, PROGRESS)
    ]
    end = rest(BIG, 4 * PROGRESS)
    server.on(NAR, Reply(200, BIG.file, stop_at=PROGRESS), *parts, end)
    assert await read(cache(attempts=2), BIG.info) == BIG.file
    assert len(server.requests) == 5


async def test_transfer_that_stalls_goes_on(
    server: ScriptedServer, cache: MakeCache, autojump_clock: MockClock
) -> None:
    server.on(NAR, Reply(200, BIG.file, stop_at=100_000, stall=True), rest(BIG, 100_000))
    assert await read(cache(), BIG.info) == BIG.file


async def test_attempts_without_progress_are_counted(
    server: ScriptedServer, cache: MakeCache, autojump_clock: MockClock
) -> None:
    crumbs = [rest(BIG, 100_000 + n, stop_at=1) for n in range(50)]
    server.on(NAR, Reply(200, BIG.file, stop_at=100_000), *crumbs)
    await failure(lambda: read(cache(attempts=3), BIG.info), Unavailable)
    assert len(server.requests) == 4  # the first one made progress


async def test_server_error_before_the_first_byte_is_tried_again(
    server: ScriptedServer, cache: MakeCache, autojump_clock: MockClock
) -> None:
    server.on(NAR, Reply(500), Reply(silent=True), Reply(200, BIG.file))
    assert await read(cache(), BIG.info) == BIG.file
    assert all("range" not in request.headers for request in server.requests)


async def test_retry_after_of_a_nar_is_obeyed(
    server: ScriptedServer, cache: MakeCache, autojump_clock: MockClock
) -> None:
    server.on(NAR, Reply(503, headers={"Retry-After": "12"}), Reply(200, BIG.file))
    assert await read(cache(), BIG.info) == BIG.file
    assert trio.current_time() == pytest.approx(12)


async def test_retry_after_beyond_the_policy_ends_it(
    server: ScriptedServer, cache: MakeCache, autojump_clock: MockClock
) -> None:
    server.on(NAR, Reply(503, headers={"Retry-After": "3600"}))
    await failure(lambda: read(cache(), BIG.info), Throttled)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "reply",
    [
        Reply(200, BIG.file),
        Reply(416),
        Reply(404),
        Reply(206, BIG.file[100_000:]),
        Reply(206, BIG.file[99_999:], {"Content-Range": f"bytes 99999-{len(BIG.file) - 1}/*"}),
        Reply(206, BIG.file[100_000:], {"Content-Range": "bytes 100000-262423/999999"}),
        Reply(206, BIG.file[100_000:-1], {"Content-Range": f"bytes 100000-{len(BIG.file) - 2}/*"}),
        Reply(206, BIG.file[100_000:], {"Content-Range": "pages 1-2/3"}),
    ],
    ids=["whole", "416", "gone", "none", "start", "length", "end", "unit"],
)
async def test_answer_that_is_not_the_continuation(
    server: ScriptedServer, cache: MakeCache, reply: Reply, autojump_clock: MockClock
) -> None:
    server.on(NAR, Reply(200, BIG.file, stop_at=100_000), reply)
    received = bytearray()
    with pytest.raises(Refusal, match=f"^http://cache: {BIG.info.url}: "):
        async with cache().nar(BIG.info) as pieces:
            async for piece in pieces:
                received += piece
    assert BIG.file.startswith(bytes(received))
    assert len(server.requests) == 2


async def test_continuation_of_an_unknown_length(
    server: ScriptedServer, cache: MakeCache, autojump_clock: MockClock
) -> None:
    size = len(BIG.file)
    end = Reply(206, BIG.file[100_000:], {"Content-Range": f"bytes 100000-{size - 1}/{size}"})
    server.on(NAR, Reply(200, BIG.file, stop_at=100_000, chunked=True), end)
    assert await read(cache(), BIG.but(file_size=None).info) == BIG.file


async def test_server_that_takes_no_ranges_is_not_asked_for_one(
    server: ScriptedServer, cache: MakeCache, autojump_clock: MockClock
) -> None:
    headers = {"Accept-Ranges": "none"}
    server.on(NAR, Reply(200, BIG.file, headers, stop_at=100_000))
    await failure(lambda: read(cache(), BIG.info), CannotContinue)
    assert len(server.requests) == 1


async def test_body_that_is_longer_than_the_file(server: ScriptedServer, cache: MakeCache) -> None:
    server.on(NAR, Reply(200, BIG.file + b"x", chunked=True))
    message = await failure(lambda: read(cache(), BIG.info), Refusal)
    assert str(len(BIG.file)) in message


async def test_body_without_end(server: ScriptedServer, cache: MakeCache) -> None:
    server.on(NAR, Reply(200, bytes(65536), endless=True))
    await failure(lambda: read(cache(), BIG.but(file_size=None).info), Refusal)
    assert server.sent < 2 * len(BIG.file)


async def test_connection_that_breaks_after_the_last_byte(
    server: ScriptedServer, cache: MakeCache
) -> None:
    server.on(NAR, Reply(200, BIG.file, stop_at=len(BIG.file), chunked=True, stall=False))
    assert await read(cache(), BIG.info) == BIG.file


async def test_nar_that_was_encoded_on_the_way(server: ScriptedServer, cache: MakeCache) -> None:
    server.on(NAR, Reply(200, gzip.compress(BIG.file), {"Content-Encoding": "gzip"}))
    assert "gzip" in await failure(lambda: read(cache(), BIG.info), Refusal)


async def test_partial_content_that_was_not_asked_for(
    server: ScriptedServer, cache: MakeCache
) -> None:
    server.on(NAR, rest(BIG, 100_000))
    assert "206" in await failure(lambda: read(cache(), BIG.info), Refusal)


async def test_forbidden_nar_is_one_that_is_not_there(
    server: ScriptedServer, cache: MakeCache
) -> None:
    server.on(NAR, Reply(403))
    await failure(lambda: read(cache(), BIG.info), PathNotFound)


async def test_cookies_are_not_kept(
    server: ScriptedServer, cache: MakeCache, client: httpx.AsyncClient
) -> None:
    server.on("/nix-cache-info", Reply(200, CACHE_INFO, {"Set-Cookie": "id=1; Path=/"}))
    await cache().cache_info()
    await cache().cache_info()
    assert not list(client.cookies.jar)
    assert "cookie" not in server.requests[1].headers


async def test_transfers_may_have_a_client_of_their_own(
    network: MemoryNetwork, client: httpx.AsyncClient
) -> None:
    server = network.server("cache")
    server.on(NARINFO, Reply(200, BIG.narinfo))
    server.on(NAR, Reply(200, BIG.file))
    async with network.attach(httpx.AsyncClient(headers={"User-Agent": "mover"})) as transfers:
        cache = HttpSubstituter("http://cache", client, transfers=transfers)
        assert await read(cache, await cache.narinfo(BIG.path)) == BIG.file
    assert [request.headers["user-agent"] for request in server.requests] == ["fusesnap", "mover"]
