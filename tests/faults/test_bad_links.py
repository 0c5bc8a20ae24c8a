"""Links that go down and come back, or break some of their connections, between a node and a real nginx."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio
from testbed.bad_caches import BadCaches, bad_caches
from testbed.slow_link import Link, SlowLink, Traffic

from fusesnap.daemon.build import Node
from fusesnap.errors import Unavailable
from fusesnap.substituter.breaker import BreakerState

from .conftest import LARGE, MANY, SMALL, MakeNode, publish

FAST = Link(rate=80e6, round_trip=0.002)
HALF = len(LARGE.file) // 2


@dataclass(frozen=True)
class Way:
    """A link, and the port of its near end."""

    link: SlowLink
    port: int

    @property
    def traffic(self) -> Traffic:
        return self.link.traffic.setdefault("cache", Traffic())


async def carried(nursery: trio.Nursery, figures: Link, target: int) -> Way:
    link = SlowLink(figures)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    connect = partial(trio.open_tcp_stream, "127.0.0.1", target)
    nursery.start_soon(
        trio.serve_listeners, partial(link.relay, "cache", connect=connect), [listener]
    )
    return Way(link, listener.socket.getsockname()[1])


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - a link tells nobody
            await trio.sleep(0.002)


def received(node: Node) -> int:
    return sum(flight.received for flight in node.realiser.flights())


@pytest.mark.parametrize("how", ["cut", "silence"])
async def test_a_link_that_comes_back_carries_only_what_is_missing(
    make_node: MakeNode, caches: BadCaches, nursery: trio.Nursery, how: str
) -> None:
    way = await carried(nursery, FAST, caches.port)
    async with make_node(caches.url("good", way.port), fetch={"idle-timeout": 0.5}) as node:
        async with trio.open_nursery() as reading:
            reading.start_soon(node.realiser.realise, LARGE.path)
            await until(lambda: received(node) > HALF)
            getattr(way.link, how)()
            connections = way.traffic.connections
            await until(lambda: way.traffic.connections >= connections + 2)
            had = received(node)
            way.link.mend()
        assert node.store.is_committed(LARGE.path)
        (state,) = node.pool.states()
        assert state.breaker is BreakerState.CLOSED
    first, *_, last = caches.nars("good")
    assert (first.status, first.range) == (200, "")
    assert (last.status, last.range) == (206, f"bytes={had}-")
    assert last.size == len(LARGE.file) - had


async def test_where_the_rest_cannot_be_had_alone_the_path_is_begun_anew(
    make_node: MakeNode, caches: BadCaches, nursery: trio.Nursery
) -> None:
    way = await carried(nursery, FAST, caches.port)
    async with make_node(caches.url("without-ranges", way.port)) as node:
        async with trio.open_nursery() as reading:
            reading.start_soon(node.realiser.realise, LARGE.path)
            await until(lambda: received(node) > HALF)
            way.link.cut()
            connections = way.traffic.connections
            await until(lambda: way.traffic.connections >= connections + 2)
            way.link.mend()
        assert node.store.is_committed(LARGE.path)
    assert {request.status for request in caches.nars("without-ranges")} == {200}


async def test_a_link_that_is_down_for_good_is_given_up_and_noticed_when_it_is_back(
    make_node: MakeNode, caches: BadCaches, nursery: trio.Nursery
) -> None:
    way = await carried(nursery, FAST, caches.port)
    url = caches.url("good", way.port)
    async with make_node(url, fetch={"stall-timeout": 1.0}) as node:
        await node.realiser.admit([SMALL.path, LARGE.path])
        way.link.cut()
        connections = way.traffic.connections
        async with trio.open_nursery() as reading:
            for _ in range(20):
                reading.start_soon(fails, node, url)
        assert 0 < way.traffic.connections - connections <= 10
        await until(lambda: not node.realiser.flights())
        way.link.mend()
        await node.realiser.realise(LARGE.path)
        assert node.pool.states()[0].reachable


async def test_while_one_cache_is_silent_everything_else_comes_from_the_others(
    make_node: MakeNode,
    caches: BadCaches,
    nursery: trio.Nursery,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    alone = publish(tmp_path_factory.mktemp("alone") / "files", LARGE)
    with bad_caches(tmp_path_factory.mktemp("nginx-alone"), alone) as silent:
        way = await carried(nursery, FAST, silent.port)
        others = publish(tmp_path_factory.mktemp("others") / "files", SMALL, *MANY[:5])
        async with make_node(silent.url("good", way.port), f"file://{others}") as node:
            await node.realiser.admit([LARGE.path, SMALL.path, *(each.path for each in MANY[:5])])
            async with trio.open_nursery() as reading:
                reading.start_soon(node.realiser.realise, LARGE.path)
                await until(lambda: received(node) > HALF // 2)
                way.link.silence()
                await node.realiser.realise(SMALL.path)
                node.realiser.request([each.path for each in MANY[:5]])
                await until(lambda: all(node.store.is_committed(each.path) for each in MANY[:5]))
                assert not node.store.is_committed(LARGE.path)
                way.link.mend()


async def fails(node: Node, url: str) -> None:
    with pytest.raises(Unavailable) as caught:
        await node.realiser.realise(LARGE.path)
    assert LARGE.path.name in str(caught.value)
    assert url in str(caught.value)


@pytest.fixture(scope="session")
def hasty_caches(
    cache_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BadCaches]:
    """Caches that close each connection after one answer."""
    with bad_caches(tmp_path_factory.mktemp("hasty"), cache_directory, keepalive=0) as caches:
        yield caches


# Of some 240 connections these seeds choose 3 and 12, most of them for their first few hundred bytes.
@pytest.mark.parametrize(("percent", "seed"), [(1, 12), (5, 4)])
async def test_where_some_connections_are_reset_every_path_comes(
    make_node: MakeNode, hasty_caches: BadCaches, nursery: trio.Nursery, percent: int, seed: int
) -> None:
    hasty_caches.clear()
    figures = Link(FAST.rate, FAST.round_trip, reset=percent / 100, seed=seed)
    way = await carried(nursery, figures, hasty_caches.port)
    async with make_node(hasty_caches.url("good", way.port)) as node:
        await node.realiser.admit([each.path for each in MANY])
        async with trio.open_nursery() as reading:
            for each in MANY:
                reading.start_soon(node.realiser.realise, each.path)
        assert all(node.store.is_committed(each.path) for each in MANY)
    resets = way.traffic.resets
    assert resets >= percent
    assert len(hasty_caches.requests()) <= 2 * len(MANY) + 1 + resets
