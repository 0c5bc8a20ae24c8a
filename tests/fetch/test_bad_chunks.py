"""Everything that can be wrong with an index, a chunk, and what carries them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from fusesnap.errors import DeadlineExceeded, FusesnapError, InvalidData, PathNotFound, Unavailable
from fusesnap.fetch.flight import Flight
from fusesnap.nix.hash import Hash, HashAlgorithm
from fusesnap.nix.index_reference import IndexReference
from fusesnap.substituter.memory import Fault, MemorySubstituter

from ..store.conftest import Tree
from ..substituter.samples import KEY, secret_key
from .lazy_node import (
    BIG,
    STALL,
    TREE,
    MakeNode,
    Node,
    node_with,
    read,
)
from .published import CHUNK, PublishedPath, published, put

FLIPPED: Tree = {"a": BIG[:6000], "b": b"x" * 2000}
EVERY_BYTE = bool(os.environ.get("FUSESNAP_EVERY_BYTE"))  # set by scripts/check-every-byte


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
    """A sample; ``scripts/check-every-byte`` tries them all. Each is of a package of its own: no other is its seed."""
    node = await make_node()
    size = len(published("lazy-0", FLIPPED).file)
    places = range(0, 8 * size, 7) if EVERY_BYTE else random.Random(4).sample(range(8 * size), 24)  # noqa: S311
    shown = 0
    for number, place in enumerate(places):
        shown += await shown_with_a_flipped_bit(node, cache, f"lazy{number}", place)
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
