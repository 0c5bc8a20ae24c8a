"""Reading by the chunk."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace

import pytest
import trio

from fusesnap.fetch.contents import UNUSED
from fusesnap.fetch.events import (
    Asked,
    Boarded,
    FetchEvent,
    InLine,
    Landed,
    Received,
    TransferBegun,
)
from fusesnap.fetch.priority import Priority
from fusesnap.nix.chunk_table import Chunk
from fusesnap.store.partial_nars import PartialNar
from fusesnap.store.room import StoreLimits
from fusesnap.substituter.memory import MemorySubstituter

from ..substituter.samples import sample
from .lazy_node import (
    BIG,
    OTHER_BIG,
    TREE,
    MakeNode,
    bytes_asked,
    node_with,
    read,
    until,
)
from .published import CHUNK, published, put


async def test_a_tree_is_told_before_a_byte_of_its_nar_has_come(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    tree = await node.contents.tree(path.path)
    assert list(tree.entries) == list(path.index.tree.entries)
    assert path.info.url not in cache.requests
    assert not node.store.is_committed(path.path)


async def test_only_what_is_read_and_what_is_near_is_fetched(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    assert await read(node, path, b"big", 5000, 100) == BIG[5000:5100]
    ((_, start, end),) = cache.parts
    chunk = path.chunk_of(b"big", 5000)
    assert start == chunk.file_start
    assert chunk.file_size <= end - start <= chunk.file_size + 128 * 1024
    assert await read(node, path, b"big", 5000, 4096) == BIG[5000:9096]
    assert len(cache.parts) == 1
    assert await read(node, path, b"small", 0, 100) == b"hello"
    assert len(cache.parts) == 2
    assert not node.store.is_committed(path.path)


def received(events: Iterable[FetchEvent]) -> int:
    return sum(event.count for event in events if isinstance(event, Received))


async def test_for_a_chunk_too_what_nothing_needs_makes_room_first(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path, garbage = put(cache, published("lazy", TREE)), sample("garbage", size=1 << 20)
    cache.publish(garbage.info, garbage.file)
    node = await node_with(make_node, path)
    await node.realiser.realise(garbage.path)
    node.store.room.keep_to(StoreLimits(max_size=node.store.size() + 1000))
    assert await read(node, path, b"big", 5000, 100) == BIG[5000:5100]
    assert not node.store.is_committed(garbage.path)
    assert node.store.size() <= node.store.room.limits.max_size


async def test_each_request_is_told_of_with_the_part_that_it_carries(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    await node.contents.tree(path.path)
    node.heard.clear()
    await read(node, path, b"big", 5000, 100)
    while not isinstance(node.heard[-1], Landed):  # the reader does not wait for all of it
        await trio.testing.wait_all_tasks_blocked(0.01)
    ((_, start, end),) = cache.parts
    part = (start, end)
    assert [event for event in node.heard if not isinstance(event, Received | InLine)] == [
        Asked(path.path, Priority.READER, part),
        Boarded(path.path, part),
        TransferBegun(path.path, cache.url, end - start, 0, part),
        Landed(path.path, None, part),
    ]
    assert received(node.heard) == end - start


async def test_bytes_of_parts_count_once_when_the_path_is_completed(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    await read(node, path, b"big", 5000, 100)
    await node.realiser.realise(path.path)
    assert received(node.heard) == bytes_asked(cache)
    whole = [event for event in node.heard if event.part is None]
    assert isinstance(whole[-1], Landed)
    assert received(whole) == 0


async def test_sequential_reads_are_ahead_of_the_reader(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    data = b"".join(
        [await read(node, path, b"other", at, CHUNK) for at in range(0, len(OTHER_BIG), CHUNK)]
    )
    assert data == OTHER_BIG
    assert len(cache.parts) < 15  # not 300


async def test_any_number_of_readers_share_one_request(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    await node.contents.tree(path.path)
    found: list[bytes] = []

    async def reader() -> None:
        found.append(await read(node, path, b"big", 0, 2 * CHUNK))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(reader)
    assert found == [BIG[: 2 * CHUNK]] * 20
    assert len(cache.parts) == 1
    assert cache.requests.count(path.index_name) == 1


async def test_parts_survive_their_process_and_serve_without_any_cache(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    assert await read(node, path, b"big", 0, 10) == BIG[:10]
    node = await make_node()
    cache.requests.clear()
    cache.parts.clear()
    cache.files.clear()
    assert await read(node, path, b"big", 0, 10) == BIG[:10]
    assert cache.requests == []


async def test_the_rest_is_fetched_and_committed_as_any_path(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    await read(node, path, b"big", 0, 10)
    before = bytes_asked(cache)
    tree = await node.realiser.realise(path.path)
    assert list(tree.entries) == list(path.index.tree.entries)
    assert bytes_asked(cache) == len(path.file)  # nothing twice
    assert before < len(path.file) / 4
    assert cache.requests.count(path.info.url) == len(cache.parts)  # never the whole file
    assert node.partials.paths() == set()
    assert await read(node, path, b"other", 0, 10) == OTHER_BIG[:10]


async def test_a_path_nobody_has_read_is_fetched_in_one_stream(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    await node.contents.tree(path.path)
    await node.realiser.realise(path.path)
    assert cache.parts == []
    assert node.partials.paths() == set()


async def test_a_reader_goes_on_while_the_path_is_committed_under_it(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    seen: list[bytes] = []

    async def reader() -> None:
        places = range(0, len(OTHER_BIG), 8 * CHUNK)
        seen.extend([await read(node, path, b"other", at, 8 * CHUNK) for at in places])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        nursery.start_soon(node.realiser.realise, path.path)
    assert b"".join(seen) == OTHER_BIG


async def test_stock_and_published_paths_of_one_cache_work_side_by_side(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    lazy = put(cache, published("lazy", TREE))
    stock = published("stock", TREE)
    plain = replace(stock, info=replace(stock.info, unknown=()))
    cache.publish(plain.info, plain.file)
    node = await node_with(make_node, lazy)
    await node.realiser.admit([plain.path])
    assert await read(node, lazy, b"small", 0, 5) == b"hello"
    assert await read(node, plain, b"small", 0, 5) == b"hello"
    assert node.store.is_committed(plain.path)
    assert not node.store.is_committed(lazy.path)
    assert plain.index_name not in cache.requests


async def test_what_is_asked_for_ahead_is_the_index_alone(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    lazy = put(cache, published("lazy", TREE))
    node = await node_with(make_node, lazy)
    node.contents.request([lazy.path], Priority.TRACE)
    await until(lambda: lazy.index_name in cache.requests)
    assert lazy.info.url not in cache.requests
    node.contents.request([lazy.path], Priority.PREFETCH)
    await until(lambda: node.store.is_committed(lazy.path))


async def test_a_path_that_nobody_reads_is_closed_and_collected_and_read_again(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    assert await read(node, path, b"big", 0, 10) == BIG[:10]
    node.contents.close_unused()
    node.store.collect(None)
    assert node.partials.paths() == {path.path}  # open
    chunked = await node.chunked.find(path.path)
    assert chunked is not None
    await until(lambda: chunked.is_idle)  # what is behind those bytes comes too
    chunked.used -= UNUSED
    node.contents.close_unused()
    node.store.roots.keep([path.path])
    node.store.collect(None)
    assert node.partials.paths() == {path.path}  # somebody wants it
    node.store.close()
    node = await make_node()
    node.store.collect(None)
    assert node.partials.paths() == set()
    assert await read(node, path, b"big", 0, 10) == BIG[:10]


async def test_what_is_being_written_is_not_closed(
    cache: MemorySubstituter, make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor that is closed while a thread writes to it may be another file's by then."""
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    await node.contents.tree(path.path)
    chunked = await node.chunked.find(path.path)
    assert chunked is not None
    writing, may_write, write = threading.Event(), threading.Event(), PartialNar.write
    written: list[int] = []

    def held(partial: PartialNar, chunk: Chunk, data: bytes) -> None:
        writing.set()
        assert may_write.wait(30)
        write(partial, chunk, data)
        written.append(chunk.number)

    monkeypatch.setattr(PartialNar, "write", held)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(chunked.read, path.chunk_of(b"big").start, 10)
        try:
            await until(writing.is_set)
            await node.chunked.committed(path.path)
            assert not chunked.is_idle
        finally:
            may_write.set()
    await until(lambda: chunked.is_idle)
    assert written
    assert await chunked.read(0, 10) is None
