"""The link's arithmetic, and the relay in virtual time: no socket, no sleep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing
from testbed.slow_link import CHUNK, Link, SlowLink, TokenBucket

MEGABIT = 1e6
TWENTY = Link(rate=20 * MEGABIT, round_trip=0.08)


def test_a_byte_leaves_when_all_before_it_have_left() -> None:
    bucket = TokenBucket(rate=8000)  # 1000 bytes a second
    assert bucket.departure(10.0, 500) == pytest.approx(10.5)
    assert bucket.departure(10.0, 500) == pytest.approx(11.0)
    assert bucket.departure(10.9, 100) == pytest.approx(11.1)


def test_an_idle_link_saves_nothing_up() -> None:
    bucket = TokenBucket(rate=8000)
    bucket.departure(0.0, 100)
    assert bucket.departure(100.0, 1000) == pytest.approx(101.0)


def test_a_burst_goes_at_once_after_a_pause_and_only_then() -> None:
    bucket = TokenBucket(rate=8000, burst=200)
    assert bucket.departure(5.0, 200) == pytest.approx(5.0)
    assert bucket.departure(5.0, 100) == pytest.approx(5.1)
    assert bucket.departure(5.1, 0) == pytest.approx(5.1)
    assert bucket.departure(9.0, 300) == pytest.approx(9.1)


def test_an_empty_chunk_waits_for_those_before_it() -> None:
    bucket = TokenBucket(rate=8000)
    bucket.departure(0.0, 1000)
    assert bucket.departure(0.5, 0) == pytest.approx(1.0)


async def exchange(slow: SlowLink, name: str, request: bytes, answer: bytes) -> tuple[float, float]:
    """Send a request over a new connection; returns when the answer's first and last byte came."""
    ours, relay_client = trio.testing.memory_stream_pair()
    relay_server, theirs = trio.testing.memory_stream_pair()

    async def connect() -> trio.abc.HalfCloseableStream:
        return relay_server

    async def serve() -> None:
        received = b""
        while len(received) < len(request):
            received += await theirs.receive_some()
        assert received == request
        await theirs.send_all(answer)
        await theirs.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(slow.relay, name, relay_client, connect)
        nursery.start_soon(serve)
        await ours.send_all(request)
        taken, first = 0, 0.0
        while data := await ours.receive_some():
            first = first or trio.current_time()
            taken += len(data)
        last = trio.current_time()
        assert taken == len(answer)
        await ours.aclose()
    return first, last


async def test_a_first_answer_takes_the_handshake_and_a_round_trip(
    autojump_clock: trio.testing.MockClock,
) -> None:
    began = trio.current_time()
    first, _ = await exchange(SlowLink(TWENTY), "cache", b"?", b"!")
    assert first - began == pytest.approx(0.16, abs=1e-5)


async def test_a_long_answer_takes_the_rate(autojump_clock: trio.testing.MockClock) -> None:
    size = 2_500_000  # one second's worth
    slow = SlowLink(TWENTY)
    began = trio.current_time()
    _, last = await exchange(slow, "cache", b"?", bytes(size))
    assert last - began == pytest.approx(1.16, abs=1e-5)
    traffic = slow.traffic["cache"]
    assert (traffic.connections, traffic.up, traffic.down) == (1, 1, size)


async def test_connections_of_all_forwards_share_the_rate(
    autojump_clock: trio.testing.MockClock,
) -> None:
    slow = SlowLink(TWENTY)
    began = trio.current_time()
    ends: list[float] = []

    async def one(name: str) -> None:
        _, last = await exchange(slow, name, b"?", bytes(1_250_000))
        ends.append(last - began)

    async with trio.open_nursery() as nursery:
        for name in ("cache", "registry"):
            nursery.start_soon(one, name)
    # Neither is served first: both end when all has crossed, at most some chunks apart.
    assert max(ends) == pytest.approx(1.16, abs=1e-4)
    assert min(ends) == pytest.approx(max(ends), abs=4 * CHUNK * 8 / TWENTY.rate)
    assert {name: each.down for name, each in slow.traffic.items()} == {
        "cache": 1_250_000,
        "registry": 1_250_000,
    }


async def test_a_server_that_refuses_closes_the_connection(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ours, relay_client = trio.testing.memory_stream_pair()

    async def refuse() -> trio.abc.HalfCloseableStream:
        raise ConnectionRefusedError

    await SlowLink(TWENTY).relay("cache", relay_client, refuse)
    assert await ours.receive_some() == b""


async def test_what_a_client_that_left_had_asked_for_stops_crossing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    slow = SlowLink(TWENTY)
    ours, relay_client = trio.testing.memory_stream_pair()
    relay_server, theirs = trio.testing.memory_stream_pair()

    async def connect() -> trio.abc.HalfCloseableStream:
        return relay_server

    async with trio.open_nursery() as nursery:
        nursery.start_soon(slow.relay, "cache", relay_client, connect)
        nursery.start_soon(theirs.send_all, bytes(2_500_000))
        await ours.receive_some()
        await ours.aclose()
    assert slow.traffic["cache"].down <= 2 * CHUNK


async def test_a_silent_link_loses_nothing_and_a_cut_one_breaks_what_crosses(
    autojump_clock: trio.testing.MockClock,
) -> None:
    slow = SlowLink(TWENTY)
    lengths: list[int] = []

    async def one() -> None:
        ours, relay_client = trio.testing.memory_stream_pair()
        relay_server, theirs = trio.testing.memory_stream_pair()

        async def connect() -> trio.abc.HalfCloseableStream:
            return relay_server

        async def serve() -> None:
            try:
                await theirs.send_all(bytes(2_500_000))
                await theirs.send_eof()
            except trio.BrokenResourceError:
                return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(slow.relay, "cache", relay_client, connect)
            nursery.start_soon(serve)
            taken = 0
            while data := await ours.receive_some():
                taken += len(data)
            lengths.append(taken)
            await ours.aclose()

    async def at(seconds: float, change: Callable[[], None]) -> None:
        await trio.sleep(seconds)
        change()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(at, 0.5, slow.silence)
        nursery.start_soon(at, 60, slow.mend)
        await one()
    assert (lengths, slow.traffic["cache"].resets) == ([2_500_000], 0)
    assert trio.current_time() > 60
    async with trio.open_nursery() as nursery:
        nursery.start_soon(at, 0.5, slow.cut)
        await one()
        await one()
        slow.mend()
        await one()
    assert 0 < lengths[1] < 2_500_000
    assert lengths[2:] == [0, 2_500_000]
    assert slow.traffic["cache"].resets == 2


async def test_of_many_connections_a_share_is_reset_early_and_the_same_each_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    counts = []
    for _ in range(2):
        slow = SlowLink(Link(rate=1e9, round_trip=0.001, reset=0.05, seed=3))
        whole = 0
        for _ in range(200):
            ours, relay_client = trio.testing.memory_stream_pair()
            relay_server, theirs = trio.testing.memory_stream_pair()

            async def connect(
                server: trio.abc.HalfCloseableStream = relay_server,
            ) -> trio.abc.HalfCloseableStream:
                return server

            async with trio.open_nursery() as nursery:
                nursery.start_soon(slow.relay, "cache", relay_client, connect)
                await theirs.send_all(bytes(100_000))
                await theirs.send_eof()
                taken = 0
                while data := await ours.receive_some():
                    taken += len(data)
                whole += taken == 100_000
                await ours.aclose()
        assert slow.traffic["cache"].resets == 200 - whole
        counts.append(whole)
    assert counts[0] == counts[1]
    assert 180 <= counts[0] <= 198
