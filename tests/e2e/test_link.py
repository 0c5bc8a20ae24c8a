"""The reader first, on a slow link that is real but for its length: nginx's log and the relay's counters are asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trio.lowlevel
import trio.testing
from testbed.binary_cache import HttpCache, SigningKey
from testbed.link_process import RunningLink, slow_link
from testbed.synthetic import SimpleClosure

from fusesnap.config import check
from fusesnap.daemon.build import Node, open_node
from fusesnap.fetch.flight import FlightState
from fusesnap.fetch.priority import Priority
from fusesnap.nix.store_path import StorePath

# What is on its way over 20 Mbit/s and 80 ms, and may be lost when a response is closed, twice: the relay's own chunks,
# and the heads of the few requests.
ON_ITS_WAY = 2 * 200_000


@pytest.fixture
def link(cache: HttpCache, work: Path) -> Iterator[RunningLink]:
    with slow_link({"cache": cache.port}, work) as running:
        yield running


@dataclass
class Bench:
    """A node at the far end of the link."""

    node: Node
    cache: HttpCache
    link: RunningLink

    def path(self, text: str) -> StorePath:
        return self.node.store_dir.parse(text)

    def flight(self, text: str) -> FlightState:
        return next(each for each in self.node.realiser.flights() if each.path == self.path(text))

    def has(self, text: str, count: int) -> bool:
        """Whether so many bytes of the path have come."""
        flights = self.node.realiser.flights()
        return any(each.path == self.path(text) and each.received >= count for each in flights)

    def requests(self, *texts: str) -> list[tuple[str, int, str]]:
        """Path, status and range of the requests for NARs of these, in the order in which they ended."""
        names = {f"/{self.cache.files.narinfo(text)['URL']}": text for text in texts}
        asked = [each for each in self.cache.requests() if each.path in names]
        return [(names[each.path], each.status, each.range) for each in asked]


@pytest.fixture
async def bench(
    cache: HttpCache, key: SigningKey, link: RunningLink, work: Path
) -> AsyncIterator[Bench]:
    settings = check(
        {
            "root": str(work / "s"),
            "substituters": [link.url("cache")],
            "trusted-public-keys": [key.public],
        },
        "test",
    )
    async with open_node(settings) as node:
        yield Bench(node, cache, link)


async def received(bench: Bench, path: str, count: int) -> None:
    """Return when so many bytes of ``path`` are here."""
    with trio.fail_after(60):
        while not bench.has(path, count):  # noqa: ASYNC110 - the flight tells nobody
            await trio.sleep(0.01)


async def test_a_reader_has_the_link_for_itself_and_what_was_paused_goes_on(
    bench: Bench, simple: SimpleClosure
) -> None:
    large, small = simple.large, simple.script
    node = bench.node
    await node.realiser.admit([bench.path(large), bench.path(small)])
    before = bench.link.down()
    node.realiser.request([bench.path(large)], Priority.PREFETCH)
    await received(bench, large, 1_000_000)

    kept: list[FlightState] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.realiser.realise, bench.path(small), 1)
        while not bench.flight(large).paused:
            await trio.lowlevel.checkpoint()
        kept.append(bench.flight(large))
    kept.append(bench.flight(large))
    assert [each.paused for each in kept] == [True, True]
    assert kept[0].received == kept[1].received

    await node.realiser.realise(bench.path(large))
    sizes = bench.cache.files.compressed_size([large, small])
    assert bench.requests(large, small) == [
        (large, 200, ""),
        (small, 200, ""),
        (large, 206, f"bytes={kept[0].received}-"),
    ]
    assert sizes <= bench.link.down() - before <= sizes + ON_ITS_WAY


async def test_what_somebody_blocks_on_is_not_begun_anew(
    bench: Bench, simple: SimpleClosure
) -> None:
    node = bench.node
    await node.realiser.admit([bench.path(simple.large)])
    node.realiser.request([bench.path(simple.large)], Priority.TRACE)
    await received(bench, simple.large, 500_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.realiser.realise, bench.path(simple.large), 1)
        await trio.testing.wait_all_tasks_blocked()
        assert bench.flight(simple.large).priority is Priority.READER
    assert bench.requests(simple.large) == [(simple.large, 200, "")]
