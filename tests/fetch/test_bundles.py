"""Where a bundle is looked for, what of it is taken over, and what becomes of a bad one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from fusesnap.errors import ClosureUnavailable
from fusesnap.fetch.bundles import ABSENT_FOR, NOTHING_TOLD, Bundles, Told
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.startup_bundle import BundleHeader, file_name, root_file_name, write_bundle
from fusesnap.nix.store_path import HashPart, StoreDir
from fusesnap.substituter.memory import MemorySubstituter

from ..store.conftest import Tree
from ..substituter.samples import KEY, TRUSTED, secret_key
from .lazy_node import BIG, TREE, MakeNode, Node, read, until
from .published import PublishedPath, published, put
from .streamed import bundled

SIZE = 64 * 1024
HELLO = b"world" * 100
OTHER: Tree = {"hello": HELLO}


def both() -> tuple[PublishedPath, PublishedPath]:
    return published("lazy", TREE), published("other", OTHER)


def closure_of(*paths: PublishedPath) -> ClosureDigest:
    return ClosureDigest.of((path.path for path in paths), StoreDir())


def offered(cache: MemorySubstituter, *paths: PublishedPath) -> ClosureDigest:
    """Put ``paths`` into the cache with a bundle of the first bytes of the first and all of the second."""
    for path in paths:
        put(cache, path)
    first, second = paths
    parts = bundled((first, b"big", 0, SIZE), (second, b"hello", 0, 500))
    closure = closure_of(*paths)
    cache.files[file_name(closure)] = parts.file
    return closure


@pytest.fixture
def bundles_of(nursery: trio.Nursery) -> Callable[[Node], Bundles]:
    def make(node: Node) -> Bundles:
        caches, store, link = node.pool.caches(), node.store, node.link
        return Bundles(caches, store, node.chunked, TRUSTED, link, nursery, 10.0)

    return make


def told_of(*paths: PublishedPath, brings: bool) -> Told:
    return Told({path.path: path.info.nar_size for path in paths}, brings)


def asked(cache: MemorySubstituter) -> list[str]:
    return [name for name in cache.requests if name != "nix-cache-info"]


async def test_one_request_brings_narinfos_indexes_and_what_the_start_reads(
    cache: MemorySubstituter, make_node: MakeNode, bundles_of: Callable[[Node], Bundles]
) -> None:
    paths = both()
    closure = offered(cache, *paths)
    node = await make_node()
    bundles = bundles_of(node)
    assert (await bundles.find(closure, [path.path for path in paths])).brings
    for path in paths:
        pin = node.store.pinned(path.path)
        assert pin is not None
        assert pin.info.nar_hash == path.info.nar_hash
    assert await read(node, paths[0], b"big", 0, SIZE) == BIG[:SIZE]
    assert await read(node, paths[1], b"hello", 0, 500) == HELLO
    assert asked(cache) == [file_name(closure)]
    # What it said of a path need not be asked for to read on there.
    assert await read(node, paths[0], b"big", 2 * SIZE, 100) == BIG[2 * SIZE : 2 * SIZE + 100]
    assert [name for name in asked(cache) if name.endswith(".narinfo")] == []
    cache.requests.clear()
    # It is not asked for again by the next container of the image, now or later.
    assert (await bundles.find(closure, [path.path for path in paths])).brings
    await until(lambda: not bundles.are_coming)
    assert (await bundles.find(closure, [path.path for path in paths])).brings
    assert file_name(closure) not in cache.requests


async def test_one_without_a_start_brings_what_it_says_and_leaves_the_start_to_traces(
    cache: MemorySubstituter, make_node: MakeNode, bundles_of: Callable[[Node], Bundles]
) -> None:
    path = put(cache, published("lazy", TREE))
    closure = closure_of(path)
    index = path.index.to_bytes(KEY)
    header = BundleHeader(closure, (path.info,), ((path.path, index),), ())
    cache.files[file_name(closure)] = write_bundle(header, (), KEY, StoreDir())
    node = await make_node()
    bundles = bundles_of(node)
    told = told_of(path, brings=False)
    assert await bundles.find(closure, [path.path]) == told
    await until(lambda: not bundles.are_coming)
    assert await bundles.find(closure, [path.path]) == told
    assert await read(node, path, b"small", 0, 5) == b"hello"
    assert [name for name in asked(cache) if name != path.info.url] == [file_name(closure)]


async def test_indexes_of_a_bundle_that_brings_no_start_are_not_asked_for(
    cache: MemorySubstituter, make_node: MakeNode, bundles_of: Callable[[Node], Bundles]
) -> None:
    good, bad = paths = tuple(sorted(both(), key=lambda path: path.path))
    for path in paths:
        put(cache, path)
    closure = closure_of(*paths)
    damaged = bytearray(bad.index.to_bytes(KEY))
    damaged[-1] ^= 1
    indexes = ((good.path, good.index.to_bytes(KEY)), (bad.path, bytes(damaged)))
    header = BundleHeader(closure, (good.info, bad.info), indexes, ())
    cache.files[file_name(closure)] = write_bundle(header, (), KEY, StoreDir())
    node = await make_node()
    told = await bundles_of(node).find(closure, [path.path for path in paths])
    assert not told.brings
    node.contents.learn([path.path for path in paths])
    await until(lambda: all(node.chunked.opened(path.path) is not None for path in paths))
    # The one that is no good is asked for.
    assert asked(cache)[1:] == [bad.index_name]


async def test_any_number_of_starts_share_one_request(
    cache: MemorySubstituter, make_node: MakeNode, bundles_of: Callable[[Node], Bundles]
) -> None:
    paths = both()
    closure = offered(cache, *paths)
    bundles = bundles_of(await make_node())
    found: list[Told] = []

    async def find() -> None:
        found.append(await bundles.find(closure, [path.path for path in paths]))

    async with trio.open_nursery() as starts:
        for _ in range(5):
            starts.start_soon(find)
    assert found == [told_of(*paths, brings=True)] * 5
    assert asked(cache) == [file_name(closure)]


async def test_that_a_cache_has_none_is_remembered(
    cache: MemorySubstituter,
    make_node: MakeNode,
    bundles_of: Callable[[Node], Bundles],
    autojump_clock: MockClock,
) -> None:
    path = put(cache, published("lazy", TREE))
    bundles, closure = bundles_of(await make_node()), closure_of(path)
    for _ in range(3):
        assert await bundles.find(closure, [path.path]) == NOTHING_TOLD
    assert asked(cache) == [file_name(closure)]
    await trio.sleep(ABSENT_FOR)
    assert await bundles.find(closure, [path.path]) == NOTHING_TOLD
    assert asked(cache) == [file_name(closure)] * 2


async def test_nothing_is_asked_for_what_is_here(
    cache: MemorySubstituter, make_node: MakeNode, bundles_of: Callable[[Node], Bundles]
) -> None:
    path = put(cache, published("lazy", TREE))
    node = await make_node()
    await node.realiser.admit([path.path])
    await node.realiser.realise(path.path)
    before = asked(cache)
    assert await bundles_of(node).find(closure_of(path), [path.path]) == NOTHING_TOLD
    assert asked(cache) == before


async def test_the_next_cache_has_one(
    cache: MemorySubstituter, make_node: MakeNode, bundles_of: Callable[[Node], Bundles]
) -> None:
    paths = both()
    second = MemorySubstituter("memory://second")
    closure = offered(second, *paths)
    bundles = bundles_of(await make_node(second))
    assert (await bundles.find(closure, [path.path for path in paths])).brings
    assert asked(cache) == asked(second) == [file_name(closure)]


def of_another_closure(file: bytes, first: PublishedPath, second: PublishedPath) -> bytes:
    return bundled((first, b"big", 0, SIZE)).file


def by_a_stranger(file: bytes, first: PublishedPath, second: PublishedPath) -> bytes:
    infos = tuple(sorted((first.info, second.info), key=lambda info: info.store_path))
    header = BundleHeader(closure_of(first, second), infos, (), ())
    return write_bundle(header, (), secret_key("stranger-1"), StoreDir())


def cut_in_the_header(file: bytes, first: PublishedPath, second: PublishedPath) -> bytes:
    return file[:200]


def no_bundle(file: bytes, first: PublishedPath, second: PublishedPath) -> bytes:
    return b"<html>not found</html>"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (of_another_closure, "expected"),
        (by_a_stranger, "not trusted"),
        (cut_in_the_header, "cut short"),
        (no_bundle, "begins with"),
    ],
)
async def test_a_bad_one_is_told_and_remembered_and_all_goes_on_without(
    cache: MemorySubstituter,
    make_node: MakeNode,
    bundles_of: Callable[[Node], Bundles],
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[bytes, PublishedPath, PublishedPath], bytes],
    said: str,
) -> None:
    paths = both()
    closure = offered(cache, *paths)
    name = file_name(closure)
    cache.files[name] = spoil(cache.files[name], *paths)
    node = await make_node()
    bundles = bundles_of(node)
    for _ in range(2):
        assert await bundles.find(closure, [path.path for path in paths]) == NOTHING_TOLD
    assert asked(cache) == [name]
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(f"memory://cache: {name} is not used any further: ")
    assert said in line
    await node.realiser.admit([paths[0].path])
    assert await read(node, paths[0], b"big", 0, SIZE) == BIG[:SIZE]


async def test_its_signature_vouches_for_the_narinfos_in_it(
    cache: MemorySubstituter, make_node: MakeNode, bundles_of: Callable[[Node], Bundles]
) -> None:
    """And for nothing else: the same narinfo is not believed when it comes alone."""
    first, second = both()
    unsigned = replace(second, info=replace(second.info, signatures=()))
    closure = offered(cache, first, unsigned)
    node = await make_node()
    with pytest.raises(ClosureUnavailable, match="it is unsigned"):
        await node.realiser.admit([unsigned.path])
    told = await bundles_of(node).find(closure, [first.path, second.path])
    assert told == told_of(first, second, brings=True)
    pin = node.store.pinned(second.path)
    assert pin is not None
    assert pin.info.nar_hash == second.info.nar_hash


async def test_what_a_cut_stream_has_not_brought_comes_as_chunks(
    cache: MemorySubstituter, make_node: MakeNode, bundles_of: Callable[[Node], Bundles]
) -> None:
    first, second = both()
    closure = offered(cache, first, second)
    name = file_name(closure)
    cache.files[name] = cache.files[name][:-20]
    node = await make_node()
    assert (await bundles_of(node).find(closure, [first.path, second.path])).brings
    assert await read(node, first, b"big", 0, SIZE) == BIG[:SIZE]
    assert await read(node, second, b"hello", 0, 500) == HELLO
    await until(lambda: not node.chunked.flights() or bool(cache.parts))
    assert second.info.url in {part[0] for part in cache.parts}


def with_root(cache: MemorySubstituter) -> tuple[PublishedPath, PublishedPath, str]:
    """A path that references another, and the bundle of its closure under the root's name."""
    leaf = published("other", OTHER)
    root = published("lazy", TREE, ["other"])
    closure = offered(cache, root, leaf)
    name = root_file_name(root.path)
    cache.files[name] = cache.files.pop(file_name(closure))
    return root, leaf, name


async def test_the_bundle_of_a_root_is_found_by_its_hash_part_and_serves_what_its_image_shows(
    cache: MemorySubstituter, make_node: MakeNode, bundles_of: Callable[[Node], Bundles]
) -> None:
    root, leaf, name = with_root(cache)
    node = await make_node()
    bundles = bundles_of(node)
    told = told_of(root, leaf, brings=True)
    assert await bundles.find_of(HashPart(root.path.hash_part)) == told
    assert await bundles.find(closure_of(leaf), [leaf.path]) == told  # while it is coming
    await until(lambda: not bundles.are_coming)
    assert await bundles.find(closure_of(leaf), [leaf.path]) == told
    assert asked(cache) == [name]
    await node.realiser.realise(root.path)
    assert await bundles.find_of(HashPart(root.path.hash_part)) == NOTHING_TOLD


async def test_what_other_processes_ask_for_is_known_to_them(
    cache: MemorySubstituter, make_node: MakeNode, bundles_of: Callable[[Node], Bundles]
) -> None:
    root, leaf, name = with_root(cache)
    await bundles_of(await make_node()).find_of(HashPart(root.path.hash_part))
    other = await make_node()
    for path in (root, leaf):
        pin = other.store.pinned(path.path)
        assert pin is not None
        assert pin.info.nar_hash == path.info.nar_hash
    assert asked(cache) == [name]


async def test_a_bundle_of_another_root_is_refused(
    cache: MemorySubstituter,
    make_node: MakeNode,
    bundles_of: Callable[[Node], Bundles],
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, leaf, name = with_root(cache)
    stranger = published("third", OTHER)
    for wanted in (
        leaf,
        stranger,
    ):  # one that is in it, and does not reference the rest; and one that is not
        cache.files[root_file_name(wanted.path)] = cache.files[name]
        bundles = bundles_of(await make_node())
        assert await bundles.find_of(HashPart(wanted.path.hash_part)) == NOTHING_TOLD
        assert f"expected that of {wanted.path.hash_part}" in caplog.text
