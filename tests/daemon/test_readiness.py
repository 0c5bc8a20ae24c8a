"""Caches are made ready for what is missing, and not again and again."""

from __future__ import annotations

from trio.testing import MockClock

from fusesnap.daemon.readiness import OPEN_FOR, Readiness
from fusesnap.substituter.memory import MemorySubstituter

from ..fetch.lazy_node import MakeNode
from ..substituter.samples import sample


async def test_no_cache_is_asked_where_nothing_is_missing(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    here, missing = sample("here"), sample("missing")
    for each in (here, missing):
        cache.publish(each.info, each.file)
    node = await make_node()
    await node.realiser.admit([here.path])
    await node.realiser.realise(here.path)
    cache.requests.clear()
    readiness = Readiness(node.store, node.pool)
    await readiness.get_ready([here.path])
    assert cache.requests == []
    await readiness.get_ready([here.path, missing.path])
    assert set(cache.requests) == {"nix-cache-info"}


async def test_connections_that_are_open_are_not_opened_again(
    cache: MemorySubstituter, make_node: MakeNode, mock_clock: MockClock
) -> None:
    node = await make_node()
    readiness = Readiness(node.store, node.pool)
    await readiness.open()
    asked = len(cache.requests)
    await readiness.get_ready([sample("missing").path])
    await readiness.open()
    assert len(cache.requests) == asked > 0
    mock_clock.jump(OPEN_FOR)
    await readiness.get_ready([sample("missing").path])
    assert len(cache.requests) > asked
