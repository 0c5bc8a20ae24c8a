"""From a bundle's first byte to a reader's: what is asked for, who waits for what, and everything that can break."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fusesnap.errors import DeadlineExceeded, InvalidData, Unavailable
from fusesnap.fetch.bundle_stream import SILENT
from fusesnap.fetch.events import BUNDLED, Asked, Landed, Received
from fusesnap.fetch.flight import Flight
from fusesnap.fetch.loader import Loader
from fusesnap.fetch.priority import Priority
from fusesnap.nix.startup_bundle import MAX_EXTENT_SIZE
from fusesnap.nix.store_path import StoreDir
from fusesnap.substituter.memory import MemorySubstituter

from .lazy_node import BIG, OTHER_BIG, TREE, MakeNode, Node, node_with, read, until
from .published import CHUNK, PublishedPath, published, put
from .streamed import Bundled, Sender, Taking, bundled
from .test_foresight import trace_of

EXTENT = 32 * CHUNK
COUNT = 6


def six_extents(path: PublishedPath) -> Bundled:
    """Of the file ``big``: of each extent the last byte comes when the one before it is there."""
    return bundled(*((path, b"big", number * EXTENT, EXTENT) for number in range(COUNT)))


async def reads_right(node: Node, path: PublishedPath, *numbers: int) -> None:
    for number in numbers:
        start = number * EXTENT
        assert await read(node, path, b"big", start, EXTENT) == BIG[start : start + EXTENT]


def entry_offset(path: PublishedPath, name: bytes) -> int:
    return next(each.offset for each in path.index.tree.entries if each.name == name)


def priority_of(taking: Taking) -> Priority:
    assert taking.stream._passage is not None
    return taking.stream._passage.load.priority


async def begun(
    node: Node, nursery: trio.Nursery, bundle: Bundled, until_byte: int | None = None
) -> Taking:
    """A stream of which everything up to a byte was taken."""
    taking = Taking(node, Sender(bundle.file, until_byte))
    nursery.start_soon(taking.run)
    await until(lambda: taking.sender.sent == taking.sender.until or taking.over)
    await wait_all_tasks_blocked(0.02)
    return taking


@pytest.fixture
def path(cache: MemorySubstituter) -> PublishedPath:
    return put(cache, published("lazy", TREE))


@pytest.fixture
async def node(make_node: MakeNode, path: PublishedPath) -> Node:
    return await node_with(make_node, path)


@pytest.fixture
def bundle(path: PublishedPath) -> Bundled:
    return six_extents(path)


def test_an_extent_is_as_large_as_may_be() -> None:
    assert EXTENT == MAX_EXTENT_SIZE


async def test_what_a_bundle_brings_nobody_asks_for(
    node: Node, path: PublishedPath, cache: MemorySubstituter, nursery: trio.Nursery
) -> None:
    taking = await begun(node, nursery, six_extents(path))
    await until(lambda: taking.over)
    assert taking.error is None
    await reads_right(node, path, *range(COUNT))
    assert cache.parts == []
    told = [event for event in node.heard if event.part == BUNDLED]
    assert isinstance(told[0], Asked)
    assert isinstance(told[-1], Landed)
    received = sum(event.count for event in told if isinstance(event, Received))
    assert received == len(taking.sender.file)


async def test_each_extent_is_read_before_the_next_has_come(
    node: Node,
    path: PublishedPath,
    bundle: Bundled,
    cache: MemorySubstituter,
    nursery: trio.Nursery,
) -> None:
    taking = await begun(node, nursery, bundle, bundle.header_end)
    for number, end in enumerate(bundle.ends):
        taking.sender.send(end)
        await reads_right(node, path, number)
    assert cache.parts == []


async def test_readers_wait_for_the_stream_and_have_it_urgent_so_long(
    node: Node,
    path: PublishedPath,
    bundle: Bundled,
    cache: MemorySubstituter,
    nursery: trio.Nursery,
) -> None:
    taking = await begun(node, nursery, bundle, bundle.ends[0])
    watched: list[Flight] = []
    start = entry_offset(path, b"big") + 2 * EXTENT
    found: list[bytes | None] = []

    async def wait() -> None:
        found.append(await node.contents.read(path.path, start, 100, watch=watched.append))

    async with trio.open_nursery() as readers:
        for _ in range(2):
            readers.start_soon(wait)
        await until(lambda: len(watched) == 2)
        assert priority_of(taking) is Priority.READER
        assert watched[0].state().cache == "memory://cache"
        assert watched[0].state().received == EXTENT
        assert node.chunked.flights()[0].path == path.path  # as people are shown it
        taking.sender.send(bundle.ends[2])
    assert found == [BIG[2 * EXTENT : 2 * EXTENT + 100]] * 2
    assert priority_of(taking) is Priority.TRACE
    assert cache.parts == []


async def test_what_no_extent_has_is_asked_for_alone_and_the_stream_goes_on(
    node: Node,
    path: PublishedPath,
    bundle: Bundled,
    cache: MemorySubstituter,
    nursery: trio.Nursery,
) -> None:
    taking = await begun(node, nursery, bundle, bundle.ends[0])
    assert await read(node, path, b"other", 50 * CHUNK, 10) == OTHER_BIG[50 * CHUNK :][:10]
    chunk = path.chunk_of(b"other", 50 * CHUNK)
    assert cache.parts == [(path.info.url, chunk.file_start, chunk.file_end)]  # nothing around it
    taking.sender.send()
    await until(lambda: taking.over)
    assert taking.sender.asked == [0]
    assert taking.error is None


async def test_a_small_request_pauses_no_stream_however_quick_the_link_is(
    node: Node, path: PublishedPath, nursery: trio.Nursery
) -> None:
    """On a link with next to no delay even one chunk is more than what is on its way."""
    bundle = six_extents(path)
    taking = await begun(node, nursery, bundle, bundle.ends[0])
    passage = taking.stream._passage
    assert passage is not None
    for beside in (True, False):
        with node.link.passage(Priority.READER, "other", 1 << 20, modest=True, beside=beside):
            assert passage.paused is not beside
    await until(lambda: not passage.paused)


async def test_a_read_that_is_partly_promised_waits_for_both(
    node: Node, path: PublishedPath, cache: MemorySubstituter, nursery: trio.Nursery
) -> None:
    bundle = bundled((path, b"big", 0, EXTENT), (path, b"big", EXTENT, 5 * CHUNK))
    taking = await begun(node, nursery, bundle, bundle.header_end)
    found: list[bytes] = []

    async def wait() -> None:
        found.append(await read(node, path, b"big", 0, EXTENT + 7 * CHUNK))

    async with trio.open_nursery() as readers:
        readers.start_soon(wait)
        await until(lambda: bool(cache.parts))
        await wait_all_tasks_blocked(0.02)
        assert found == []
        taking.sender.send()
    assert found == [BIG[: EXTENT + 7 * CHUNK]]
    first, last = (
        path.chunk_of(b"big", EXTENT + 5 * CHUNK),
        path.chunk_of(b"big", EXTENT + 6 * CHUNK),
    )
    assert cache.parts == [(path.info.url, first.file_start, last.file_end)]


async def test_a_trace_does_not_ask_for_what_is_promised(
    node: Node,
    path: PublishedPath,
    bundle: Bundled,
    cache: MemorySubstituter,
    nursery: trio.Nursery,
) -> None:
    taking = await begun(node, nursery, bundle, bundle.header_end)
    node.contents.foresee(trace_of(path, (b"big", 0, COUNT * EXTENT)))
    await wait_all_tasks_blocked(0.02)
    entry = next(each for each in path.index.tree.entries if each.name == b"other")
    await node.contents.want_file(path.path, entry)
    await wait_all_tasks_blocked(0.02)
    assert cache.parts == []
    taking.sender.send()
    await until(lambda: taking.over)
    await reads_right(node, path, *range(COUNT))
    assert cache.parts == []


async def test_while_it_runs_nothing_is_guessed_of_what_a_program_will_load(
    cache: MemorySubstituter, make_node: MakeNode, nursery: trio.Nursery
) -> None:
    path = put(cache, published("lazy", {"big": BIG, "lib.so": b"\x7fELF" + OTHER_BIG}))
    node = await node_with(make_node, path)
    bundle = six_extents(path)
    taking = await begun(node, nursery, bundle, bundle.header_end)
    tree, pin = path.index.tree, node.store.pinned(path.path)
    assert pin is not None
    library = next(i for i, each in enumerate(tree.entries) if each.name == b"lib.so")

    async def opened() -> None:
        loader = Loader(node.store, StoreDir(), node.contents, nursery)
        loader.opened(pin.ordinal, tree, library)
        await wait_all_tasks_blocked(0.05)

    await opened()
    assert cache.parts == []
    taking.sender.send()
    await until(lambda: taking.over)
    await opened()
    assert cache.parts  # a program that is started otherwise


async def test_wherever_it_breaks_readers_get_the_right_bytes(
    cache: MemorySubstituter, make_node: MakeNode, nursery: trio.Nursery
) -> None:
    """At every extent's end and just before it, with somebody waiting for the last; what came before is kept."""
    path = put(cache, published("lazy", TREE))
    bundle = six_extents(path)
    places = {bundle.header_end, *bundle.ends[:-1], *(end - 300 for end in bundle.ends)}
    for place in sorted(places):
        node = await node_with(make_node, path)
        taking = await begun(node, nursery, bundle, place)
        whole = sum(end <= place for end in bundle.ends)
        async with trio.open_nursery() as readers:
            readers.start_soon(reads_right, node, path, COUNT - 1)
            await wait_all_tasks_blocked(0.02)
            assert cache.parts == []
            taking.sender.fail(Unavailable("it broke"))
        assert isinstance(taking.error, Unavailable)
        asked = {start for _, start, _ in cache.parts}
        await reads_right(node, path, *range(whole))
        if whole:  # nothing of it was asked for again
            first, last = path.chunk_of(b"big"), path.chunk_of(b"big", whole * EXTENT - CHUNK)
            assert not asked & set(range(first.file_end, last.file_start))
        await reads_right(node, path, *range(COUNT))
        await node.chunked.committed(path.path)
        cache.parts.clear()


async def test_a_damaged_stream_shows_nothing_wrong(
    node: Node, path: PublishedPath, bundle: Bundled, nursery: trio.Nursery
) -> None:
    damaged = bytearray(bundle.file)
    damaged[bundle.ends[2] + 1000] ^= 0x40
    taking = Taking(node, Sender(bytes(damaged)))
    nursery.start_soon(taking.run)
    await reads_right(node, path, *reversed(range(COUNT)))
    assert isinstance(taking.error, InvalidData)
    assert await read(node, path, b"big", 0, len(BIG)) == BIG


async def test_a_stream_that_brings_nothing_is_given_up(
    node: Node, path: PublishedPath, bundle: Bundled, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    taking = await begun(node, nursery, bundle, bundle.ends[0])
    mock_clock.autojump_threshold = 0.2  # not while a thread does something
    began = trio.current_time()
    await reads_right(node, path, COUNT - 1)
    assert trio.current_time() - began < SILENT + 1
    assert isinstance(taking.error, DeadlineExceeded)
    assert "nothing came for" in str(taking.error)


async def test_a_stream_that_drips_is_given_up_by_whoever_waits(
    node: Node, path: PublishedPath, bundle: Bundled, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    taking = await begun(node, nursery, bundle, bundle.ends[0])
    mock_clock.autojump_threshold = 0.2

    async def drip() -> None:
        while not taking.over:
            await trio.sleep(SILENT - 1)
            taking.sender.send(taking.sender.until + 1)

    nursery.start_soon(drip)
    await reads_right(node, path, COUNT - 1)
    assert "nothing that somebody waits for" in str(taking.error)


async def test_a_reader_of_something_else_pauses_it_and_it_goes_on_where_it_was(
    node: Node,
    path: PublishedPath,
    bundle: Bundled,
    cache: MemorySubstituter,
    nursery: trio.Nursery,
) -> None:
    for ranges in (True, False):
        sender = Sender(bundle.file, bundle.ends[1])
        sender.ranges = ranges
        taking = Taking(node, sender)
        nursery.start_soon(taking.run)
        await until(lambda sender=sender: sender.sent == sender.until)  # type: ignore[misc]
        await wait_all_tasks_blocked(0.02)
        with node.link.passage(Priority.READER, "other", None):
            assert taking.stream.is_paused
            sender.send()
            await wait_all_tasks_blocked(0.02)
            assert not taking.over
        await until(lambda taking=taking: taking.over)  # type: ignore[misc]
        assert taking.error is None
        # Without Range the connection is kept, and not read meanwhile.
        assert sender.asked == ([0, bundle.ends[1]] if ranges else [0])
        await reads_right(node, path, *range(COUNT))
        await node.chunked.committed(path.path)
    assert cache.parts == []


async def test_what_came_is_there_for_the_next_process(
    node: Node,
    path: PublishedPath,
    bundle: Bundled,
    cache: MemorySubstituter,
    make_node: MakeNode,
    nursery: trio.Nursery,
) -> None:
    await begun(node, nursery, bundle, bundle.ends[3])
    node = await make_node()
    await reads_right(node, path, 0, 1, 2, 3)
    assert cache.parts == []
    taking = await begun(node, nursery, bundle)
    await until(lambda: taking.over)
    await reads_right(node, path, 4, 5)
    again = await begun(node, nursery, bundle)  # nothing of it is wanted
    await until(lambda: again.over)
    assert again.sender.sent < bundle.ends[0]
    assert cache.parts == []


async def test_what_extents_have_completion_does_not_fetch(
    node: Node, path: PublishedPath, cache: MemorySubstituter, nursery: trio.Nursery
) -> None:
    taking = await begun(node, nursery, six_extents(path))
    await until(lambda: taking.over)
    cache.requests.clear()
    await node.realiser.realise(path.path)
    assert node.store.is_committed(path.path)
    asked = [(start, end) for _, start, end in cache.parts]
    # Chunks of the middle of the file are made of extents, so nobody asks for them.
    first, last = path.chunk_of(b"big", CHUNK), path.chunk_of(b"big", COUNT * EXTENT - 2 * CHUNK)
    assert all(end <= first.file_start or start >= last.file_end for start, end in asked)
    assert await read(node, path, b"big", 0, len(BIG)) == BIG


async def test_completion_waits_and_nobody_makes_it_urgent(
    node: Node, path: PublishedPath, cache: MemorySubstituter, nursery: trio.Nursery
) -> None:
    """Completion asks for chunks in which there are promised bytes; those who read these wait for the stream alone."""
    few = [(path, b"other", 0, EXTENT), (path, b"other", 2 * EXTENT, 5 * CHUNK + 10)]
    bundle = bundled(*few, *((path, b"big", number * EXTENT, EXTENT) for number in range(COUNT)))
    taking = await begun(node, nursery, bundle, bundle.ends[0])
    node.realiser.request([path.path], Priority.COMPLETION)
    await wait_all_tasks_blocked(0.05)
    assert any(each.priority is Priority.COMPLETION for each in node.realiser.flights())
    assert priority_of(taking) is Priority.TRACE
    found: list[bytes] = []

    async def wait() -> None:
        found.append(await read(node, path, b"other", 2 * EXTENT + 5 * CHUNK, 10))

    async with trio.open_nursery() as readers:
        readers.start_soon(wait)
        await until(lambda: priority_of(taking) is Priority.READER)
        await wait_all_tasks_blocked(0.05)
        assert cache.parts == []
        taking.sender.send()
    assert found == [OTHER_BIG[2 * EXTENT + 5 * CHUNK :][:10]]
    await until(lambda: node.store.is_committed(path.path))


async def test_a_path_that_is_committed_meanwhile_is_left_alone(
    node: Node, path: PublishedPath, bundle: Bundled, nursery: trio.Nursery
) -> None:
    taking = await begun(node, nursery, bundle, bundle.ends[1])
    await node.chunked.committed(path.path)
    taking.sender.send()
    await until(lambda: taking.over)
    assert taking.error is None
    assert node.partials.paths() == set()
