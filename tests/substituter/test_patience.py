"""How long a transfer in trouble is waited for, with real HTTP on a scripted network and a virtual clock."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import httpx
import pytest
import trio
from trio.testing import MockClock

from fusesnap.errors import Unavailable
from fusesnap.nix.store_path import StoreDir
from fusesnap.substituter.breaker import BreakerState
from fusesnap.substituter.http import HttpSubstituter, Timeouts
from fusesnap.substituter.narinfo_cache import NarInfoCache
from fusesnap.substituter.patience import Pace, Patience, Traffic
from fusesnap.substituter.pool import SubstituterPool
from fusesnap.substituter.retry import PartsUnsupported, RetryPolicy
from tests.substituter.caches import read
from tests.substituter.exchanges import BIG, NAR, NARINFO, rest
from tests.substituter.samples import CACHE_INFO, TRUSTED
from tests.substituter.scripted_server import MemoryNetwork, Reply, ScriptedServer

MakePool = Callable[..., SubstituterPool]
HALF = 100_000  # bytes that come before the trouble
STALL = 120.0


@pytest.fixture
def pool_of(client: httpx.AsyncClient, disk: NarInfoCache) -> MakePool:
    """A pool of the caches at the given hosts, as patient as the daemon."""

    def make(*hosts: str, patience: Patience | None = None) -> SubstituterPool:
        times = Timeouts(connect=2, stall=5, lookup=8)
        return SubstituterPool(
            [HttpSubstituter(f"http://{host}", client, timeouts=times) for host in hosts],
            store_dir=StoreDir(),
            trusted_keys=TRUSTED,
            narinfo_cache=disk,
            retry=RetryPolicy(random=lambda: 1.0),
            deadline=8,
            patience=patience or Patience(STALL),
        )

    return make


def published(network: MemoryNetwork, host: str, *nar: Reply) -> ScriptedServer:
    """A server that has the path, and gives its NAR as ``nar`` says."""
    return publish(network.server(host), *nar)


def publish(server: ScriptedServer, *nar: Reply) -> ScriptedServer:
    server.on("/nix-cache-info", Reply(200, CACHE_INFO))
    server.on(NARINFO, Reply(200, BIG.narinfo))
    server.on(NAR, *(nar or (Reply(200, BIG.file),)))
    return server


def asked_for_nar(server: ScriptedServer) -> list[str | None]:
    """The ranges that were asked for."""
    return [each.headers.get("range") for each in server.requests if each.target == NAR]


async def go_down(network: MemoryNetwork, host: str, seconds: float) -> None:
    """Down for so long, from the moment on that the NAR has broken off."""
    while not asked_for_nar(network.servers["cache"]):  # noqa: ASYNC110 - it tells nobody
        await trio.sleep(0.01)
    network.take_down(host)
    await trio.sleep(seconds)
    network.refusing.discard(host)


BREAKS = Reply(200, BIG.file, stop_at=HALF, stall=True)


@pytest.mark.parametrize("seconds", [1, 10, 60, 110])
async def test_a_link_that_comes_back_in_time_loses_nothing(
    network: MemoryNetwork,
    pool_of: MakePool,
    nursery: trio.Nursery,
    autojump_clock: MockClock,
    seconds: float,
) -> None:
    server = published(network, "cache", BREAKS, rest(BIG, HALF))
    pool = pool_of("cache")
    offer = await pool.find(BIG.path)
    nursery.start_soon(go_down, network, "cache", seconds)
    assert await read(offer) == BIG.file
    assert asked_for_nar(server) == [None, f"bytes={HALF}-"]
    assert trio.current_time() < seconds + 11
    assert pool.states()[0].breaker is BreakerState.CLOSED


async def test_a_part_is_waited_for_in_the_same_way(
    network: MemoryNetwork,
    pool_of: MakePool,
    nursery: trio.Nursery,
    autojump_clock: MockClock,
) -> None:
    start, end = 1_000, 150_000

    def part(first: int, **changes: bool) -> Reply:
        headers = {"Content-Range": f"bytes {first}-{end - 1}/{len(BIG.file)}"}
        stop_at = HALF if changes else None
        return Reply(206, BIG.file[first:end], headers, stop_at=stop_at, **changes)

    server = published(network, "cache", part(start, stall=True), part(start + HALF))
    pool = pool_of("cache")
    offer = await pool.find(BIG.path)
    nursery.start_soon(go_down, network, "cache", 60)
    async with offer.substituter.part(offer.narinfo, start, end) as pieces:
        assert b"".join([piece async for piece in pieces]) == BIG.file[start:end]
    assert asked_for_nar(server) == [
        f"bytes={start}-{end - 1}",
        f"bytes={start + HALF}-{end - 1}",
    ]


async def test_a_cache_that_sends_files_whole_has_not_failed(
    network: MemoryNetwork, pool_of: MakePool, autojump_clock: MockClock
) -> None:
    published(network, "cache")
    pool = pool_of("cache")
    offer = await pool.find(BIG.path)
    for _ in range(10):  # as many readers at once would ask
        with pytest.raises(PartsUnsupported):
            async with offer.substituter.part(offer.narinfo, 10, 20) as pieces:
                await anext(pieces)
    (state,) = pool.states()
    assert (state.breaker, state.failures, state.reachable) == (BreakerState.CLOSED, 0, True)
    assert await read(offer) == BIG.file


async def test_a_link_that_is_down_for_good_is_given_up_at_the_deadline_after_few_attempts(
    network: MemoryNetwork, pool_of: MakePool, autojump_clock: MockClock
) -> None:
    published(network, "cache", BREAKS)
    pool = pool_of("cache")
    offer = await pool.find(BIG.path)
    network.refusing.add("cache")
    network.attempts = 0
    with pytest.raises(Unavailable, match=f"http://cache: {BIG.info.url}: no connection"):
        await read(offer)
    assert STALL - 11 <= trio.current_time() <= STALL + 5
    assert 5 < network.attempts < 30
    assert pool.states()[0].breaker is not BreakerState.CLOSED


async def test_many_transfers_from_a_dead_cache_do_not_storm_it(
    network: MemoryNetwork, pool_of: MakePool, autojump_clock: MockClock
) -> None:
    published(network, "cache", Reply(503))
    pool = pool_of("cache")
    offer = await pool.find(BIG.path)
    network.refusing.add("cache")
    network.attempts = 0

    async def fail() -> None:
        with pytest.raises(Unavailable):
            await read(offer)

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(fail)
    # Those that began together, and then one at a time at growing distances.
    assert network.attempts < 150


async def test_where_another_cache_has_it_a_few_attempts_are_enough(
    network: MemoryNetwork, pool_of: MakePool, autojump_clock: MockClock
) -> None:
    published(network, "cache", BREAKS)
    published(network, "other")
    pool = pool_of("cache", "other")
    offer = await pool.find(BIG.path)
    network.refusing.add("cache")
    with pytest.raises(Unavailable):
        await read(offer)
    assert trio.current_time() < 10
    next_offer = await pool.find(BIG.path, exclude=frozenset(["http://cache"]))
    assert await read(next_offer) == BIG.file


async def test_another_cache_behind_the_same_link_is_no_help(
    network: MemoryNetwork,
    pool_of: MakePool,
    nursery: trio.Nursery,
    autojump_clock: MockClock,
) -> None:
    server = published(network, "cache", BREAKS, rest(BIG, HALF))
    other = published(network, "other")
    pool = pool_of("cache", "other")
    offer = await pool.find(BIG.path)
    for host in ("cache", "other"):
        nursery.start_soon(go_down, network, host, 40)
    assert await read(offer) == BIG.file
    assert asked_for_nar(server) == [None, f"bytes={HALF}-"]
    assert asked_for_nar(other) == []


async def test_another_cache_that_has_failed_before_is_not_gone_back_to(
    network: MemoryNetwork, pool_of: MakePool, autojump_clock: MockClock
) -> None:
    server = published(network, "cache", BREAKS, Reply(503), Reply(503), rest(BIG, HALF))
    published(network, "other")
    pool = pool_of("cache", "other")
    offer = await pool.find(BIG.path, exclude=frozenset(["http://other"]))
    assert await read(offer) == BIG.file
    assert len(asked_for_nar(server)) == 4


async def test_a_cache_that_asks_to_be_left_alone_is_left_for_another(
    network: MemoryNetwork, pool_of: MakePool, autojump_clock: MockClock
) -> None:
    server = published(network, "cache", Reply(429, headers={"Retry-After": "9"}))
    published(network, "other")
    pool = pool_of("cache", "other")
    with pytest.raises(Unavailable, match="429"):
        await read(await pool.find(BIG.path))
    assert trio.current_time() == 0
    assert len(asked_for_nar(server)) == 1


class Dripping(ScriptedServer):
    """Sends a NAR a few bytes a second once ``after`` of its bytes were sent."""

    def __init__(self, a_second: int, after: int = 0) -> None:
        super().__init__()
        self._a_second = a_second
        self._after = after

    async def _send_body(self, stream: trio.abc.Stream, reply: Reply, body: bytes) -> None:
        if len(body) < 10_000:
            await super()._send_body(stream, reply, body)
            return
        await stream.send_all(body[: self._after])
        for start in itertools.count(self._after, self._a_second):
            if start >= len(body):
                return
            await trio.sleep(1)
            await stream.send_all(body[start : start + self._a_second])


def dripping(network: MemoryNetwork, host: str, a_second: int, after: int = 0) -> ScriptedServer:
    network.servers[host] = Dripping(a_second, after)
    return publish(network.servers[host])


@pytest.mark.parametrize("after", [0, HALF])
async def test_a_byte_a_second_is_left_for_another_cache(
    network: MemoryNetwork, pool_of: MakePool, autojump_clock: MockClock, after: int
) -> None:
    dripping(network, "cache", 1, after)
    published(network, "other")
    pool = pool_of("cache", "other")
    with pytest.raises(Unavailable, match="less than 1024 bytes a second, and another cache has"):
        await read(await pool.find(BIG.path))
    assert trio.current_time() < 30
    assert (await pool.find(BIG.path)).substituter.url == "http://other"


@pytest.mark.parametrize("hosts", [["cache"], ["cache", "down"]])
async def test_where_no_other_cache_has_it_slow_is_better_than_nothing(
    network: MemoryNetwork, pool_of: MakePool, autojump_clock: MockClock, hosts: list[str]
) -> None:
    dripping(network, "cache", 500)
    pool = pool_of(*hosts)
    assert await read(await pool.find(BIG.path)) == BIG.file


async def test_a_slow_link_is_nobodys_fault(
    network: MemoryNetwork, pool_of: MakePool, autojump_clock: MockClock
) -> None:
    """Eight transfers over a link of 4 kB/s: each is below the rate, and together they are not."""
    dripping(network, "cache", 500)
    other = published(network, "other")
    pool = pool_of("cache", "other")
    offer = await pool.find(BIG.path)
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(read, offer)
    assert other.targets() == ["/nix-cache-info"]


def test_pace() -> None:
    now = 0.0
    traffic = Traffic(transfers=4)
    pace = Pace(Patience(min_rate=1000, window=10), traffic, lambda: now)

    def pass_by(seconds: int, own: int, others: int) -> list[bool]:
        nonlocal now
        judged = []
        for _ in range(seconds):
            now += 1
            traffic.received += own + others
            judged.append(pace.received(own, 1))
        return judged

    assert not any(pass_by(100, 1000, 0))
    assert not any(pass_by(100, 900, 2700))  # its share of a slow link
    assert pass_by(10, 10, 3000)[-1]  # others get a hundred times as much
    assert pass_by(20, 10, 10) == [False] * 19 + [True]  # everything is slow
    assert pass_by(40, 10, 10).index(True) == 39
    never = Pace(Patience(min_rate=0), traffic, lambda: now)
    assert not never.received(0, 1e6)
