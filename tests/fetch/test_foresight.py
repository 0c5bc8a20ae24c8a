"""What is fetched before it is read: by a trace, and by guesses."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import trio
import trio.testing

from fusesnap.fetch.chunked_path import ChunkedPath
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.read_ahead import LEAST_REACH
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.startup_trace import Circumstances, Ending, StartupTrace, TraceBuilder
from fusesnap.nix.store_path import StoreDir
from fusesnap.substituter.memory import MemorySubstituter

from ..store.conftest import Tree
from .lazy_node import (
    BIG,
    OTHER_BIG,
    TREE,
    MakeNode,
    Node,
    bytes_asked,
    node_with,
    read,
    until,
)
from .published import CHUNK, PublishedPath, published, put


def trace_of(path: PublishedPath, *reads: tuple[bytes, int, int]) -> StartupTrace:
    builder = TraceBuilder()
    number = builder.path(path.path, path.info.nar_hash)
    for name, offset, length in reads:
        entry = next(i for i, e in enumerate(path.index.tree.entries) if e.name == name)
        size = path.index.tree.entries[entry].size
        builder.read(builder.file(number, entry, size, name), offset, length, size)
    closure = ClosureDigest.of([path.path], StoreDir())
    return builder.trace(closure, Circumstances(0, "1", 1, 0, Ending.EXIT))


async def test_what_a_trace_foresees_is_there_when_it_is_asked_for(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    stock = published("stock", TREE)
    stock = replace(stock, info=replace(stock.info, unknown=()))
    cache.publish(stock.info, stock.file)
    node = await node_with(make_node, path)
    await node.realiser.admit([stock.path])
    node.contents.foresee(trace_of(path, (b"big", 0, 100), (b"other", 50 * CHUNK, 3 * CHUNK)))
    node.contents.foresee(trace_of(stock, (b"big", 0, 100)))
    await until(lambda: len(cache.parts) == 2 and node.store.is_committed(stock.path))
    chunked = await node.chunked.find(path.path)
    assert chunked is not None
    await until(lambda: chunked.is_idle)
    assert (
        bytes_asked(cache) < 150_000
    )  # 16 KiB and 32, as a trace rounds, and a chunk on each side
    asked = len(cache.parts)
    entry = next(e for e in path.index.tree.entries if e.name == b"other")
    await node.contents.want_file(path.path, entry)  # the trace knows better
    assert chunked.is_idle
    assert await read(node, path, b"other", 51 * CHUNK, CHUNK) == OTHER_BIG[51 * CHUNK : 52 * CHUNK]
    assert await read(node, path, b"big", 0, 100) == BIG[:100]
    assert len(cache.parts) == asked


async def guessing(make_node: MakeNode, path: PublishedPath) -> tuple[Node, ChunkedPath]:
    """A process that has asked for a whole file, of which nobody has said that it is needed."""
    node = await node_with(make_node, path)
    chunked = await node.chunked.find(path.path)
    assert chunked is not None
    entry = next(e for e in path.index.tree.entries if e.name == b"other")
    await node.contents.want_file(path.path, entry)
    assert chunked.is_empty  # nothing has come of it
    return node, chunked


async def test_a_path_that_is_completed_while_a_part_of_it_comes_does_not_come_twice(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    may_come = cache.hold(path.info.url)
    node, _ = await guessing(make_node, path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(node.realiser.realise, path.path, priority=Priority.COMPLETION))
        await until(lambda: len(node.realiser.flights()) == 2)
        may_come.set()
    assert node.store.is_committed(path.path)
    assert bytes_asked(cache) == len(path.file)
    assert cache.requests.count(path.info.url) == len(cache.parts)  # never the whole file


def blocks_asked(cache: MemorySubstituter) -> set[int]:
    """Which parts of files came, whether they were interrupted and asked for again or not."""
    return {block for _, start, end in cache.parts for block in range(start // CHUNK, end // CHUNK)}


async def test_a_trace_ends_what_was_guessed_before(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    may_come = cache.hold(path.info.url)
    node, chunked = await guessing(make_node, path)
    await trio.testing.wait_all_tasks_blocked(0.05)
    begun = blocks_asked(cache)
    node.contents.foresee(trace_of(path, (b"other", 50 * CHUNK, CHUNK)))
    await until(lambda: chunked.is_foreseen)
    may_come.set()
    await until(lambda: chunked.is_idle)
    assert 0 < len(begun) < len(OTHER_BIG) / CHUNK - 8
    assert len(blocks_asked(cache) - begun) < 8
    assert await read(node, path, b"other", 0, len(OTHER_BIG)) == OTHER_BIG


async def test_a_trace_of_another_nar_fetches_no_part(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    other = published("lazy", {**TREE, "small": b"other"})  # type: ignore[dict-item]
    node = await node_with(make_node, path)
    node.contents.foresee(trace_of(other, (b"big", 0, 100)))
    await until(lambda: path.index_name in cache.requests)
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert cache.parts == []


async def test_a_file_that_is_wanted_whole_comes_behind_its_readers(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    tree = await node.contents.tree(path.path)
    entry = next(entry for entry in tree.entries if entry.name == b"other")
    await node.contents.want_file(path.path, entry)
    # The last chunk is wanted now: what has not begun begins with it.
    at = len(OTHER_BIG) - CHUNK
    assert await read(node, path, b"other", at, CHUNK) == OTHER_BIG[at:]
    chunked = await node.chunked.find(path.path)
    assert chunked is not None
    await until(lambda: chunked.is_idle)
    assert bytes_asked(cache) < 1.1 * len(OTHER_BIG)  # each once, but for what stands around it
    asked = len(cache.parts)
    assert await read(node, path, b"other", 0, len(OTHER_BIG)) == OTHER_BIG
    assert len(cache.parts) == asked


async def test_who_comes_upon_a_guess_has_what_is_on_either_side(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    tree = await node.contents.tree(path.path)
    entry = next(entry for entry in tree.entries if entry.name == b"other")
    await node.contents.want_file(path.path, entry)
    at = 280 * CHUNK  # far enough behind that it has not begun
    await read(node, path, b"other", at, CHUNK)
    chunk = path.chunk_of(b"other", at)
    (found,) = [part for part in cache.parts if part[1] <= chunk.file_start < part[2]]
    _, start, end = found
    assert chunk.file_start - LEAST_REACH <= start < chunk.file_start - LEAST_REACH // 2
    assert end > chunk.file_end


async def test_parts_of_a_file_are_cut_to_it(cache: MemorySubstituter, make_node: MakeNode) -> None:
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    tree = await node.contents.tree(path.path)
    entry = next(entry for entry in tree.entries if entry.name == b"big")
    beyond = len(BIG) + 10 * CHUNK
    parts = [(len(BIG) - 1, beyond), (beyond, beyond + 1)]
    await node.contents.want_parts(path.path, entry, parts, Priority.TRACE)
    chunked = await node.chunked.find(path.path)
    assert chunked is not None
    await until(lambda: chunked.is_idle)
    last = path.chunk_of(b"big", len(BIG) - 1)
    assert cache.parts == [(path.info.url, last.file_start, last.file_end)]


async def test_whoever_waits_for_what_another_takes_over_gets_it_too(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    entry = next(
        entry for entry in (await node.contents.tree(path.path)).entries if entry.name == b"other"
    )
    found: list[bytes | None] = []

    async def ask(offset: int, priority: Priority) -> None:
        found.append(
            await node.contents.read(path.path, entry.offset + offset, CHUNK, priority=priority)
        )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, 0, Priority.REST)
        nursery.start_soon(ask, 0, Priority.TRACE)
        nursery.start_soon(ask, 0, Priority.READER)
    assert found == [OTHER_BIG[:CHUNK]] * 3


async def test_indexes_are_learnt_before_anybody_looks(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    node.contents.learn([path.path])
    await until(lambda: node.chunked.opened(path.path) is not None)
    asked = len(cache.requests)
    await node.contents.tree(path.path)
    assert len(cache.requests) == asked
    node.contents.learn([path.path] * 1000)  # too many to be worth a request each


async def test_of_a_closure_the_small_is_fetched_whole_unless_it_has_programs(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    modules: dict[str, Tree] = {"one.py": b"import two\n" * 500, "two.py": b"pass\n"}
    paths = [
        put(cache, published(name, tree))
        for name, tree in {
            "modules": modules,
            "library": {**modules, "libone.so.1": b"\x7fELF"},
            "large": {**modules, "data": OTHER_BIG},
        }.items()
    ]
    node = await node_with(make_node, paths[0])
    await node.realiser.admit([path.path for path in paths])
    await node.contents.guess_small([path.path for path in paths])
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert {name for name, _, _ in cache.parts} == {paths[0].info.url}
    asked = len(cache.parts)
    assert await read(node, paths[0], b"two.py", 0, 5) == b"pass\n"
    assert len(cache.parts) == asked
