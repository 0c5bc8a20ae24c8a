"""Reading by the chunk, and everything that can be wrong with it."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
import trio
from trio.testing import MockClock

from fusesnap.errors import DeadlineExceeded, FusesnapError, InvalidData, PathNotFound, Unavailable
from fusesnap.fetch.chunked_paths import ChunkedPaths
from fusesnap.fetch.contents import UNUSED, Contents
from fusesnap.fetch.events import (
    Asked,
    Boarded,
    FetchEvent,
    InLine,
    Landed,
    Received,
    TransferBegun,
)
from fusesnap.fetch.flight import Flight, Reader
from fusesnap.fetch.link import open_link
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.realiser import Limits, Realiser
from fusesnap.fetch.unpacking import ThreadUnpackers
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.hash import Hash, HashAlgorithm
from fusesnap.nix.index_reference import IndexReference
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.startup_trace import Circumstances, Ending, StartupTrace, TraceBuilder
from fusesnap.nix.store_path import StoreDir
from fusesnap.store.local_store import LocalStore
from fusesnap.store.partial_nars import PartialNars
from fusesnap.store.room import StoreLimits
from fusesnap.substituter.memory import Fault, MemorySubstituter
from fusesnap.substituter.narinfo_cache import NarInfoCache
from fusesnap.substituter.pool import SubstituterPool
from fusesnap.substituter.retry import RetryPolicy

from ..store.conftest import Tree
from ..substituter.samples import KEY, TRUSTED, sample, secret_key
from .published import CHUNK, PublishedPath, published, put

BIG = random.Random(1).randbytes(200 * CHUNK)  # noqa: S311 - not for secrets
OTHER_BIG = random.Random(2).randbytes(300 * CHUNK)  # noqa: S311
TREE: Tree = {"big": BIG, "other": OTHER_BIG, "small": b"hello", "to": "small"}
STALL = 30.0
FLIPPED: Tree = {"a": BIG[:6000], "b": b"x" * 2000}
EVERY_BYTE = bool(os.environ.get("FUSESNAP_EVERY_BYTE"))  # set by scripts/check-every-byte


class Node:
    """One process on a state directory, with some caches."""

    def __init__(
        self, state: Path, nursery: trio.Nursery, caches: list[MemorySubstituter], keys: TrustedKeys
    ) -> None:
        async def at_once(seconds: float) -> None:
            await trio.lowlevel.checkpoint()

        self.store = LocalStore.open(state, StoreDir(), clock=lambda: 0.0)
        pool = SubstituterPool(
            caches,
            store_dir=StoreDir(),
            trusted_keys=TRUSTED,
            narinfo_cache=NarInfoCache(":memory:", lambda: 0.0),
            retry=RetryPolicy(sleep=at_once),
            deadline=10.0,
        )
        link = open_link(nursery)
        self.partials = PartialNars.in_state(state, UUID(int=1))
        self.heard: list[FetchEvent] = []
        observe = self.heard.append
        self.chunked = ChunkedPaths(
            self.store, pool, self.partials, keys, link, nursery, STALL, observe
        )
        self.realiser = Realiser(
            self.store,
            pool,
            ThreadUnpackers(self.store),
            link,
            nursery,
            Limits(stall=STALL),
            lambda pid: Reader(pid, "test"),
            observe,
            chunked=self.chunked,
        )
        self.contents = Contents(self.store, self.realiser, self.chunked, nursery)


MakeNode = Callable[..., Awaitable[Node]]


@pytest.fixture
def cache() -> MemorySubstituter:
    return MemorySubstituter()


@pytest.fixture
async def make_node(
    tmp_path: Path, cache: MemorySubstituter, nursery: trio.Nursery
) -> AsyncIterator[MakeNode]:
    """Start a process on the same state directory; the one before it is dead by then."""
    nodes: list[tuple[Node, trio.CancelScope]] = []

    async def make(*more: MemorySubstituter, keys: TrustedKeys = TRUSTED) -> Node:
        await end()
        started: list[Node] = []

        async def live(task_status: trio.TaskStatus[trio.CancelScope]) -> None:
            async with trio.open_nursery() as own:
                started.append(Node(tmp_path / "state", own, [cache, *more], keys))
                task_status.started(own.cancel_scope)
                await trio.sleep_forever()

        scope = await nursery.start(live)
        nodes.append((started[0], scope))
        return started[0]

    async def end() -> None:
        while nodes:
            node, scope = nodes.pop()
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked(0.01)
            for chunked in list(node.chunked._open.values()):
                chunked.close()
            node.store.close()

    yield make
    await end()


async def node_with(make_node: MakeNode, path: PublishedPath, **options: object) -> Node:
    node = await make_node(**options)
    await node.realiser.admit([path.path])
    return node


async def read(node: Node, path: PublishedPath, name: bytes, offset: int, size: int) -> bytes:
    """As a FUSE node reads: from the store where the path is committed."""
    tree = await node.contents.tree(path.path)
    entry = next(entry for entry in tree.entries if entry.name == name)
    size = min(size, entry.size - offset)
    data = await node.contents.read(path.path, entry.offset + offset, size)
    if data is None:
        assert node.store.is_committed(path.path)
        index = next(i for i, e in enumerate(tree.entries) if e.name == name)
        file = node.store.location(path.path) / tree.path(index).decode()
        return file.read_bytes()[offset : offset + size]
    return data


def bytes_asked(cache: MemorySubstituter) -> int:
    return sum(end - start for _, start, end in cache.parts)


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


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.lowlevel.checkpoint()


# ------------------------------------------------------- what can be wrong


def wrong_index(cache: MemorySubstituter, path: PublishedPath) -> None:
    data = bytearray(cache.files[path.index_name])
    data[-5] ^= 1
    cache.files[path.index_name] = bytes(data)


def gone_index(cache: MemorySubstituter, path: PublishedPath) -> None:
    del cache.files[path.index_name]


def index_of_another_nar(cache: MemorySubstituter, path: PublishedPath) -> None:
    other = published("lazy", {"big": b"x"})
    cache.files[path.index_name] = other.index.to_bytes(KEY)
    change_reference(cache, path, len(cache.files[path.index_name]))


def index_by_a_stranger(cache: MemorySubstituter, path: PublishedPath) -> None:
    """The narinfo claims a trusted key; the index is signed by another of that name."""
    stranger = secret_key("key-2")
    impostor = replace(stranger, name=KEY.name)
    cache.files[path.index_name] = path.index.to_bytes(impostor)


def index_larger_than_announced(cache: MemorySubstituter, path: PublishedPath) -> None:
    change_reference(cache, path, 10)


def sizes_that_lie(cache: MemorySubstituter, path: PublishedPath) -> None:
    """A signed index that contradicts itself: its tree makes a larger NAR than it says."""
    larger = published("lazy", {**TREE, "big": BIG + b"x" * 10_000})  # type: ignore[dict-item]
    liar = replace(path.index, tree=larger.index.tree)
    cache.files[path.index_name] = liar.to_bytes(KEY)
    change_reference(cache, path, len(cache.files[path.index_name]))


def change_reference(cache: MemorySubstituter, path: PublishedPath, size: int) -> None:
    reference = IndexReference(path.index_name, size, KEY.name)
    name = f"{path.path.hash_part}.narinfo"
    cache.files[name] = reference.added_to(path.info).to_text().encode()


def without_parts(cache: MemorySubstituter, path: PublishedPath) -> None:
    cache.sends_parts = False


@pytest.mark.parametrize(
    "damage",
    [
        wrong_index,
        gone_index,
        index_of_another_nar,
        index_by_a_stranger,
        index_larger_than_announced,
        sizes_that_lie,
        without_parts,
    ],
)
async def test_a_path_whose_index_is_no_good_is_fetched_whole(
    cache: MemorySubstituter,
    make_node: MakeNode,
    damage: Callable[[MemorySubstituter, PublishedPath], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = put(cache, published("lazy", TREE))
    damage(cache, path)
    node = await node_with(make_node, path)
    assert await read(node, path, b"big", 70_000, 100) == BIG[70_000:70_100]
    assert node.store.is_committed(path.path)
    assert f"{path.path}: is fetched whole: " in caplog.text
    assert node.partials.paths() == set()


async def test_a_key_that_is_not_trusted_is_not_even_asked_for(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    stranger = secret_key("stranger-1")
    path = put(cache, published("lazy", TREE, key=stranger), key=stranger)
    node = await node_with(make_node, path)
    assert await read(node, path, b"small", 0, 5) == b"hello"
    assert path.index_name not in cache.requests
    assert node.store.is_committed(path.path)


async def test_no_wrong_chunk_is_ever_shown(cache: MemorySubstituter, make_node: MakeNode) -> None:
    """Swapped with another valid chunk of the same file and size; the cache's NAR is no good then, another's is."""
    path = put(cache, published("lazy", TREE))
    good = MemorySubstituter("memory://good")
    put(good, path)
    one, other = path.chunk_of(b"big", 0), path.chunk_of(b"big", CHUNK)
    assert one.file_size == other.file_size
    file = bytearray(path.file)
    file[one.file_start : one.file_end] = path.file[other.file_start : other.file_end]
    cache.files[path.info.url] = bytes(file)
    node = await make_node(good)
    await node.realiser.admit([path.path])
    assert await read(node, path, b"big", 0, 100) == BIG[:100]
    assert node.store.is_committed(path.path)
    assert path.info.url in good.requests


async def test_no_flipped_bit_of_a_nar_is_ever_shown(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    """A sample; ``scripts/check-every-byte`` tries them all."""
    node = await make_node()
    size = len(published("lazy-0", FLIPPED).file)
    places = range(0, 8 * size, 7) if EVERY_BYTE else random.Random(4).sample(range(8 * size), 24)  # noqa: S311
    shown = 0
    for number, place in enumerate(places):
        shown += await shown_with_a_flipped_bit(node, cache, f"lazy-{number}", place)
    # zstd leaves some bits of a frame's header without meaning.
    assert shown < len(places) / 4


async def shown_with_a_flipped_bit(
    node: Node, cache: MemorySubstituter, name: str, place: int
) -> bool:
    """Read all of a path of whose file one bit is wrong; whether all of it was shown, as it must be."""
    path = put(cache, published(name, FLIPPED))
    file = bytearray(path.file)
    file[place // 8 % len(file)] ^= 1 << place % 8
    cache.files[path.info.url] = bytes(file)
    await node.realiser.admit([path.path])
    shown = 0
    for entry, contents in ((b"a", BIG[:6000]), (b"b", b"x" * 2000)):
        with suppress(FusesnapError):
            assert await read(node, path, entry, 0, len(contents)) == contents
            shown += 1
    return shown == 2


async def test_a_nar_that_was_replaced_is_told(
    cache: MemorySubstituter, make_node: MakeNode, caplog: pytest.LogCaptureFixture
) -> None:
    """The index is of the file that was there before: another compression of the same NAR."""
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    await node.contents.tree(path.path)
    del cache.files[path.info.url]
    moved = replace(path.info, url="nar/moved.nar", compression="none", file_size=None, unknown=())
    moved = replace(moved, file_hash=None)
    cache.publish(moved, path.nar)
    assert await read(node, path, b"big", 0, 10) == BIG[:10]
    assert node.store.is_committed(path.path)
    assert f"{path.path}: is fetched whole: " in caplog.text


async def test_another_nar_is_no_substitute_once_something_was_shown(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    await node.contents.tree(path.path)
    put(cache, published("lazy", {**TREE, "small": b"other"}))  # type: ignore[dict-item]
    node = await make_node()  # nor after a restart
    with pytest.raises(InvalidData, match="but the path is in use as"):
        await node.realiser.realise(path.path)
    tree = await node.contents.tree(path.path)
    assert list(tree.entries) == list(path.index.tree.entries)


async def test_a_cache_that_fails_in_the_middle_of_a_part_is_left_for_another(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    good = MemorySubstituter("memory://good")
    put(good, path)
    node = await make_node(good)
    await node.realiser.admit([path.path])
    await node.contents.tree(path.path)
    cache.script(path.info.url, *[Fault(Unavailable("memory://cache: gone"), after=9)] * 20)
    assert await read(node, path, b"big", 0, 10) == BIG[:10]


async def test_a_path_that_nobody_has_any_more_is_an_error(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    await node.contents.tree(path.path)
    cache.files.clear()
    with pytest.raises((PathNotFound, Unavailable)):
        await read(node, path, b"big", 0, 10)
    put(cache, path)
    assert await read(node, path, b"big", 0, 10) == BIG[:10]


async def test_a_reader_waits_no_longer_than_it_may(
    cache: MemorySubstituter, make_node: MakeNode, mock_clock: MockClock
) -> None:
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    await node.contents.tree(path.path)
    cache.script(path.info.url, Fault(after=0))  # nothing comes, for ever
    watched: list[Flight] = []
    mock_clock.autojump_threshold = 0.2  # not while a thread does something
    began = trio.current_time()
    entry = path.chunk_of(b"big")
    with pytest.raises(DeadlineExceeded, match="no progress for 30 s: waiting for a part of it"):
        await node.contents.read(path.path, entry.start, 10, watch=watched.append)
    assert STALL <= trio.current_time() - began < 2 * STALL
    (flight,) = watched
    assert (flight.path, flight.cache) == (path.path, "memory://cache")


async def test_a_disk_that_is_full_ends_in_an_error_and_nothing_wrong(
    cache: MemorySubstituter, make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    await node.contents.tree(path.path)

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("fusesnap.store.partial_nars.os.pwrite", full)
        assert await read(node, path, b"big", 0, 10) == BIG[:10]  # the whole NAR found room
    assert node.store.is_committed(path.path)


async def test_a_wrong_nar_hash_in_a_signed_index_is_found_before_anything_is_committed(
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    """Chunks are right by the index, and the NAR that they make is not the one that the narinfo names."""
    path = published("lazy", TREE)
    lie = Hash(HashAlgorithm.SHA256, bytes(32))
    info = replace(path.info, nar_hash=lie)
    signed = replace(info, signatures=(KEY.sign(info.fingerprint()),))
    put(cache, replace(path, info=signed, index=replace(path.index, nar_hash=lie)))
    node = await node_with(make_node, path)
    await read(node, path, b"big", 0, 10)
    with pytest.raises(InvalidData, match="hashes to"):
        await node.realiser.realise(path.path)
    assert not node.store.is_committed(path.path)


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
    cache: MemorySubstituter, make_node: MakeNode
) -> None:
    """A descriptor that is closed while a thread writes to it may be another file's by then."""
    path = put(cache, published("lazy", TREE))
    node = await node_with(make_node, path)
    await node.contents.tree(path.path)
    chunked = await node.chunked.find(path.path)
    assert chunked is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(chunked.read, path.chunk_of(b"big").start, 10)
        await until(lambda: not chunked.is_idle)
        await node.chunked.committed(path.path)
        assert not chunked.is_idle
    await until(lambda: chunked.is_idle)
    assert await chunked.read(0, 10) is None


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
    assert await read(node, path, b"other", 51 * CHUNK, CHUNK) == OTHER_BIG[51 * CHUNK : 52 * CHUNK]
    assert await read(node, path, b"big", 0, 100) == BIG[:100]
    assert len(cache.parts) == asked


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
