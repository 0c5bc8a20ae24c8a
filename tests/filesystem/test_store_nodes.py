"""What may be said of a path before it is there, and what when it is not what it was said to be."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
import trio

from fusesnap.errors import FusesnapError, InvalidData, NotFound
from fusesnap.fetch.chunked_paths import ChunkedPaths
from fusesnap.fetch.contents import Contents
from fusesnap.fetch.flight import Reader
from fusesnap.fetch.link import open_link
from fusesnap.fetch.realiser import Limits, Realiser
from fusesnap.fetch.unpacking import ThreadUnpackers
from fusesnap.filesystem.error_counts import ErrorCounts
from fusesnap.filesystem.inode import Inode, InodeKind
from fusesnap.filesystem.open_files import OpenFiles
from fusesnap.filesystem.store_nodes import StoreNodes
from fusesnap.filesystem.waiting import WaitingRequests
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.tree import Tree
from fusesnap.store.local_store import LocalStore
from fusesnap.store.partial_nars import PartialNars
from fusesnap.substituter.memory import MemorySubstituter
from fusesnap.substituter.narinfo_cache import NarInfoCache
from fusesnap.substituter.pool import SubstituterPool
from fusesnap.substituter.retry import RetryPolicy

from ..substituter.samples import KEY, TRUSTED, Sample, sample


class Noted:
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[object, ...]] = []

    def accessed(self, ordinal: int, pid: int | None) -> None:
        self.heard.append(("accessed", ordinal, pid))

    def opened(self, ordinal: int, tree: Tree, entry: int, pid: int | None) -> None:
        assert tree.entries[entry]
        self.heard.append(("opened", ordinal, entry, pid))

    def read(self, ordinal: int, entry: int, offset: int, size: int) -> None:
        self.heard.append(("read", ordinal, entry, offset, size))


class Bench:
    """Nodes over a real store and a cache in memory. Samples are single files."""

    def __init__(self, store: LocalStore, nursery: trio.Nursery) -> None:
        self.store = store
        self.cache = MemorySubstituter()
        self.accesses = Noted()
        pool = SubstituterPool(
            [self.cache],
            store_dir=StoreDir(),
            trusted_keys=TRUSTED,
            narinfo_cache=NarInfoCache(":memory:", lambda: 0.0),
            retry=RetryPolicy(attempts=1),
            deadline=10.0,
        )
        link = open_link(nursery)
        realiser = Realiser(
            store, pool, ThreadUnpackers(store), link, nursery, Limits(), self.identify
        )
        self.realiser = realiser
        waiting = WaitingRequests(self.identify, ErrorCounts())
        self.open_files = OpenFiles()
        partials = PartialNars.in_state(store.layer.parent, UUID(int=1))
        chunked = ChunkedPaths(store, pool, partials, TRUSTED, link, nursery, stall=10.0)
        contents = Contents(store, realiser, chunked, nursery)
        self.nodes = StoreNodes(store, contents, self.open_files, waiting, self.accesses)

    def identify(self, pid: int) -> Reader:
        return Reader(pid, "test")

    def publish(self, sample: Sample) -> None:
        self.cache.publish(sample.info, sample.file)
        self.store.pin(sample.info)


@pytest.fixture
async def bench(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Bench]:
    with LocalStore.open(tmp_path / "state", StoreDir(), clock=lambda: 0.0) as store:
        yield Bench(store, nursery)


async def test_a_claimed_directory_is_one_unfetched_and_an_error_when_its_nar_says_file(
    bench: Bench,
) -> None:
    hello = sample("hello")
    bench.publish(hello)
    root = bench.nodes.claimed_root(hello.path)
    assert stat.S_ISDIR(root.mode)
    inode = Inode.parse(root.inode)
    assert bench.cache.requests == []
    for ask in (bench.nodes.entries(inode, None), bench.nodes.lookup(inode, b"bin", None)):
        with pytest.raises(InvalidData, match="placeholder says directory, its NAR says regular"):
            await ask
    # Overlayfs would take any answer but an error for an empty directory.
    with pytest.raises(InvalidData, match="placeholder says directory, its NAR does not"):
        bench.nodes.claimed_root(hello.path)


async def test_a_path_that_no_image_names_is_an_error_and_no_absence(bench: Bench) -> None:
    with pytest.raises(NotFound, match="no image on this node names it"):
        bench.nodes.claimed_root(sample("unknown").path)


async def test_files_are_read_from_any_place_and_what_is_asked_is_told(bench: Bench) -> None:
    hello = sample("hello", size=300_000)
    bench.publish(hello)
    root = await bench.nodes.root(hello.path, 7, None)
    inode = Inode.parse(root.inode)
    assert (inode.kind, inode.view) == (InodeKind.STORE, 0)  # files are shared by all views
    assert root.size == 300_000
    await bench.nodes.open(inode, 5)
    whole = await bench.nodes.read(inode, 0, 1 << 20)
    assert len(whole) == 300_000
    assert await bench.nodes.read(inode, 299_990, 4096) == whole[299_990:]
    assert await bench.nodes.read(inode, 300_000, 4096) == b""
    assert bench.accesses.heard[:4] == [
        ("accessed", inode.ordinal, None),
        ("accessed", inode.ordinal, 5),
        ("opened", inode.ordinal, 0, 5),
        ("read", inode.ordinal, 0, 0, 1 << 20),
    ]
    assert bench.accesses.heard[-1] == ("read", inode.ordinal, 0, 300_000, 4096)


async def test_an_access_is_told_before_it_is_answered(bench: Bench) -> None:
    """So that the order is the one of asking, not of what came first from a cache."""
    lost = sample("lost")
    ordinal = bench.store.pin(lost.info).ordinal
    with pytest.raises(FusesnapError):
        await bench.nodes.root(lost.path, 1, 8)
    assert bench.accesses.heard == [("accessed", ordinal, 8)]


async def test_what_cannot_be_verified_is_an_error_for_every_question(bench: Bench) -> None:
    hello = sample("hello", compression="none")
    bench.publish(Sample(hello.info, hello.file[:-16] + b"x" * 16))
    with pytest.raises(FusesnapError):
        await bench.nodes.root(hello.path, 1, None)
    assert not bench.store.is_committed(hello.path)


async def test_a_path_rebuilt_before_anything_was_shown_is_served_as_it_is_now(
    bench: Bench,
) -> None:
    hello, other = sample("hello"), sample("other", size=77)
    bench.store.pin(hello.info)
    rebuilt = Sample(replace(other.info, store_path=hello.path), other.file).signed_by(KEY)
    bench.cache.publish(rebuilt.info, rebuilt.file)
    assert (await bench.nodes.root(hello.path, 1, None)).size == 77


async def read_whole(bench: Bench, path: StorePath) -> tuple[Inode, bytes]:
    inode = Inode.parse((await bench.nodes.root(path, 1, None)).inode)
    await bench.nodes.open(inode, None)
    return inode, await bench.nodes.read(inode, 0, 1 << 20)


async def test_what_was_collected_is_fetched_again_by_whoever_still_reads(bench: Bench) -> None:
    hello = sample("hello", size=300_000)
    bench.publish(hello)
    inode, whole = await read_whole(bench, hello.path)
    assert bench.store.collect(None).paths == (hello.path,)
    # An open file goes on; one that has to be opened again is fetched again, by the tree that is in memory.
    assert await bench.nodes.read(inode, 0, 1 << 20) == whole
    assert not bench.store.is_committed(hello.path)
    bench.open_files.close()
    assert await bench.nodes.read(inode, 100, 1 << 20) == whole[100:]
    assert bench.store.is_committed(hello.path)
    assert bench.cache.requests.count(hello.info.url) == 2
    assert (await bench.nodes.attributes(inode, None)).size == 300_000


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("how", ["gone", "cut short", "another"])
async def test_what_somebody_removed_or_changed_behind_our_back_is_fetched_again(
    bench: Bench, how: str, anew: bool
) -> None:
    hello = sample("hello", size=300_000)
    bench.publish(hello)
    inode, whole = await read_whole(bench, hello.path)
    bench.open_files.close()
    location = bench.store.location(hello.path)
    location.unlink()
    if how == "cut short":
        location.write_bytes(whole[:-1000])
    if how == "another":
        location.mkdir()
    if anew:
        bench.realiser.forget_tree(inode.ordinal)  # a worker that starts anew knows none
    assert await bench.nodes.read(inode, 0, 1 << 20) == whole
    assert location.read_bytes() == whole


async def test_a_claimed_directory_that_was_collected_is_one_still(bench: Bench) -> None:
    hello = sample("hello")
    bench.publish(hello)
    root = bench.nodes.claimed_root(hello.path)
    await read_whole(bench, hello.path)
    bench.store.collect(None)
    assert bench.nodes.claimed_root(hello.path) == root
