"""Chunks of a path are made of another generation of it."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.fetch.bundles import Bundles
from fusesnap.fetch.events import Rebuilt
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.rebuilding import ChunkMaker
from fusesnap.fetch.seeds import SEEDS_AT_MOST, ranked
from fusesnap.nix.chunk_table import ChunkTable
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.hash_parts import Occurrence
from fusesnap.nix.nar import NarEnd, nar_bytes
from fusesnap.nix.startup_bundle import MAX_EXTENT_SIZE, file_name
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.substituter.memory import MemorySubstituter

from ..store.conftest import Tree, path_named, tree_events
from ..substituter.samples import KEY, TRUSTED
from .lazy_node import MakeNode, Node, bytes_asked, node_with, read, until
from .published import CHUNK, PublishedPath, published, put
from .streamed import bundled

PLAIN = random.Random(3).randbytes(120 * CHUNK)  # noqa: S311 - not for secrets
NAME = "app-1.0"


def path_of(generation: str, name: str = NAME) -> StorePath:
    return StorePath(path_named(f"{generation}-{name}").hash_part, name)


def files(generation: str, **more: bytes) -> Tree:
    """What is in a generation: it names itself and a library, whose name is another each time."""
    own = f"/nix/store/{path_of(generation)}".encode()
    library = f"/nix/store/{path_named(f'library-{generation}').hash_part}-library".encode()
    program = PLAIN[: 5 * CHUNK] + library + b"/lib:" + own + PLAIN[5 * CHUNK :]
    script = b"#!" + own + b"/bin/sh\n"
    return {
        "bin": {"program": program, "to": f"/nix/store/{path_of(generation)}/bin/program"},
        "etc": {f"{n}": (script + b"%d" % n,) for n in range(40)},
        **more,
    }


def generation(which: str, tree: Tree | None = None, name: str = NAME) -> PublishedPath:
    return published(
        f"{which}-{name}",
        files(which) if tree is None else tree,
        [f"library-{which}"],
        store_path=path_of(which, name),
    )


def program(which: str) -> bytes:
    tree = files(which)
    assert isinstance(tree, dict)
    assert isinstance(tree["bin"], dict)
    found = tree["bin"]["program"]
    assert isinstance(found, bytes)
    return found


@pytest.fixture
def old(cache: MemorySubstituter) -> PublishedPath:
    return put(cache, generation("old"))


@pytest.fixture
def new(cache: MemorySubstituter) -> PublishedPath:
    return put(cache, generation("new"))


async def node_after(make_node: MakeNode, old: PublishedPath, new: PublishedPath) -> Node:
    """The old generation is committed, the new one is known."""
    node = await node_with(make_node, old)
    await node.realiser.realise(old.path)
    await node.realiser.admit([new.path])
    return node


def asked_of(cache: MemorySubstituter, path: PublishedPath) -> int:
    return sum(end - start for url, start, end in cache.parts if url == path.info.url)


def whole_of(cache: MemorySubstituter, path: PublishedPath) -> int:
    """How often all of a path was asked for."""
    parts = sum(url == path.info.url for url, _, _ in cache.parts)
    return cache.requests.count(path.info.url) - parts


def rebuilt(node: Node) -> int:
    return sum(event.size for event in node.heard if isinstance(event, Rebuilt))


async def test_what_differs_in_hash_parts_alone_is_read_without_a_request(
    cache: MemorySubstituter, make_node: MakeNode, old: PublishedPath, new: PublishedPath
) -> None:
    node = await node_after(make_node, old, new)
    assert await read(node, new, b"program", 0, 10**6) == program("new")
    assert await read(node, new, b"7", 0, 100) == f"#!/nix/store/{new.path}/bin/sh\n7".encode()
    assert asked_of(cache, new) == 0
    assert new.info.url not in cache.requests
    assert rebuilt(node) > 10 * CHUNK
    assert not node.store.is_committed(new.path)


async def test_all_of_it_is_committed_without_its_file(
    cache: MemorySubstituter, make_node: MakeNode, old: PublishedPath, new: PublishedPath
) -> None:
    """As by prefetch: nobody has looked into the new one."""
    node = await node_after(make_node, old, new)
    await node.realiser.have(new.path)
    assert node.store.is_committed(new.path)
    assert (node.store.location(new.path) / "bin/program").read_bytes() == program("new")
    assert new.info.url not in cache.requests
    assert asked_of(cache, new) == 0
    assert node.partials.paths() == set()


async def test_parts_of_the_old_one_are_enough_for_the_same_parts_of_the_new(
    cache: MemorySubstituter, make_node: MakeNode, old: PublishedPath, new: PublishedPath
) -> None:
    node = await node_with(make_node, old)
    await read(node, old, b"program", 0, 6 * CHUNK)
    chunked = node.chunked.opened(old.path)
    assert chunked is not None
    await until(lambda: chunked.is_idle)
    node = await node_with(make_node, new)  # also after a restart
    assert await read(node, new, b"program", 0, 6 * CHUNK) == program("new")[: 6 * CHUNK]
    # What is guessed to be read next is fetched, and the old one has it not; nothing of what was read.
    first = new.chunk_of(b"program", 6 * CHUNK)
    assert all(start >= first.file_start for url, start, _ in cache.parts if url == new.info.url)
    assert await read(node, new, b"program", 0, 10**6) == program("new")
    assert asked_of(cache, new) > 0


async def test_only_what_has_changed_is_fetched(
    cache: MemorySubstituter, make_node: MakeNode, old: PublishedPath
) -> None:
    changed = files("new", data=b"x" * 3 * CHUNK)
    assert isinstance(changed, dict)
    new = put(cache, generation("new", changed))
    node = await node_after(make_node, old, new)
    await node.realiser.have(new.path)
    assert node.store.is_committed(new.path)
    chunks = {new.chunk_of(b"data", n * CHUNK) for n in range(3)}
    most = sum(chunk.file_size for chunk in chunks) + 3 * CHUNK
    assert 0 < asked_of(cache, new) <= most
    assert whole_of(cache, new) == 0


async def test_a_path_that_has_changed_altogether_comes_in_one_stream(
    cache: MemorySubstituter, make_node: MakeNode, old: PublishedPath
) -> None:
    other: Tree = {"bin": {"program": bytes(reversed(PLAIN))}}
    new = put(cache, generation("new", other))
    node = await node_after(make_node, old, new)
    await node.realiser.have(new.path)
    assert node.store.is_committed(new.path)
    assert whole_of(cache, new) == 1
    assert asked_of(cache, new) == 0


async def test_of_a_path_that_has_no_name_like_it_no_index_is_asked_for(
    cache: MemorySubstituter, make_node: MakeNode, old: PublishedPath
) -> None:
    new = put(cache, generation("new", name="other-1.0"))
    node = await node_after(make_node, old, new)
    await node.realiser.have(new.path)
    assert node.store.is_committed(new.path)
    assert new.index_name not in cache.requests


async def test_another_version_may_have_the_same_files(
    cache: MemorySubstituter, make_node: MakeNode, old: PublishedPath
) -> None:
    new = put(cache, generation("new", files("new"), name="app-1.1"))
    node = await node_after(make_node, old, new)
    assert await read(node, new, b"program", 0, 10**6) == program("new")
    assert rebuilt(node) > 0


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "unreadable"])
async def test_a_source_that_is_not_what_it_was_costs_a_request_and_nothing_else(
    cache: MemorySubstituter,
    make_node: MakeNode,
    old: PublishedPath,
    new: PublishedPath,
    damage: str,
) -> None:
    node = await node_after(make_node, old, new)
    spoil(node.store.location(old.path) / "bin/program", damage)
    assert await read(node, new, b"program", 0, 10**6) == program("new")
    if damage == "changed":  # one byte: the other chunks are made
        assert asked_of(cache, new) < 8 * CHUNK
        assert rebuilt(node) > 100 * CHUNK
    else:
        assert asked_of(cache, new) > 100 * CHUNK
    assert not node.chunked._whole_until


def spoil(file: Path, damage: str) -> None:
    match damage:
        case "changed":
            with file.open("r+b") as opened:
                opened.seek(3 * CHUNK)
                byte = opened.read(1)
                opened.seek(3 * CHUNK)
                opened.write(bytes((byte[0] ^ 1,)))
        case "cut":
            os.truncate(file, 100)
        case "gone":
            file.unlink()
        case "unreadable":
            file.unlink()
            file.mkdir()


async def test_a_source_that_is_collected_meanwhile(
    cache: MemorySubstituter, make_node: MakeNode, old: PublishedPath, new: PublishedPath
) -> None:
    node = await node_after(make_node, old, new)
    await node.contents.tree(new.path)  # its seeds are known
    node.store.discard(old.path)
    assert await read(node, new, b"program", 0, 10**6) == program("new")
    assert rebuilt(node) == 0


async def test_an_index_that_lies_of_hash_parts_makes_nothing_wrong(
    cache: MemorySubstituter, make_node: MakeNode, old: PublishedPath, new: PublishedPath
) -> None:
    """It says that they are elsewhere, and swaps two of them."""
    chunks = new.index.chunks
    moved = [Occurrence(o.position - 1, 1 - o.which) for o in chunks.occurrences]
    liar = ChunkTable(
        [chunk.size for chunk in chunks],
        [chunk.file_size for chunk in chunks],
        chunks.digests,
        chunks.hash_parts,
        moved,
        chunks.blanked_digests,
    )
    lying = replace(new, index=replace(new.index, chunks=liar))
    cache.files[new.index_name] = lying.index.to_bytes(KEY)
    node = await node_after(make_node, old, new)
    assert await read(node, new, b"program", 0, 10**6) == program("new")
    assert asked_of(cache, new) > 0
    assert not node.chunked._whole_until


async def test_a_reader_does_not_wait_for_the_rest_that_is_made(
    cache: MemorySubstituter, make_node: MakeNode, old: PublishedPath, new: PublishedPath
) -> None:
    """Everything was wanted ahead; what a reader wants of it that cannot be made is fetched for him at once."""
    node = await node_after(make_node, old, new)
    spoil(node.store.location(old.path) / "bin/program", "gone")
    chunked = await node.chunked.find(new.path)
    assert chunked is not None
    chunked.want([(0, new.info.nar_size)], Priority.REST)
    assert await read(node, new, b"program", 0, 100) == program("new")[:100]
    await until(lambda: chunked.is_idle)
    assert chunked.remaining == 0
    assert bytes_asked(cache) < 2 * len(new.file)


class _Memory:
    """A seed that has one file's bytes, whichever are asked for."""

    def __init__(self, contents: dict[tuple[bytes, ...], bytes]) -> None:
        self._contents = contents

    def read(self, names: Sequence[bytes], size: int, offset: int, length: int) -> bytes | None:
        data = self._contents.get(tuple(names), b"")
        return data[offset : offset + length] if len(data) == size else None

    def rest(self) -> None:
        pass


@given(st.lists(st.one_of(st.binary(max_size=3000), st.sampled_from(["own", "library"]))))
def test_any_contents_with_any_hash_parts_come_out_as_they_are(
    pieces: list[bytes | str],
) -> None:
    def contents(which: str) -> bytes:
        parts = {
            "own": path_of(which).hash_part,
            "library": path_named(f"library-{which}").hash_part,
        }
        return b"".join(p if isinstance(p, bytes) else parts[p].encode() for p in pieces)

    tree: Tree = {"a": contents("new"), "b": {"c": contents("new") + b"more"}}
    new = generation("new", tree)
    seed = _Memory({(b"a",): contents("old"), (b"b", b"c"): contents("old") + b"more"})
    maker = ChunkMaker(new.index, [seed])
    nar = b"".join(nar_bytes([*tree_events(tree), NarEnd()]))
    assert b"".join(maker.make(c.number) or b"" for c in new.index.chunks) == nar


def test_seeds_are_those_of_the_same_package_the_most_alike_first() -> None:
    path = path_of("new", "app-1.0-bin")
    same = path_of("old", "app-1.0-bin")
    version = path_of("old", "app-2.0-bin")
    output = path_of("old", "app-1.0")
    others = [output, path, path_of("old", "app-tools-1.0"), version, same, same]
    assert ranked(path, others) == [same, version, output]
    many = [path_of(str(n), "app-1.0-bin") for n in range(9)]
    assert ranked(path, many) == many[:SEEDS_AT_MOST]


async def test_a_stream_is_left_of_which_nearly_all_can_be_made(
    cache: MemorySubstituter, make_node: MakeNode, nursery: trio.Nursery, old: PublishedPath
) -> None:
    """What cannot be made comes as chunks, without being asked for."""
    fresh = random.Random(4).randbytes(8 * CHUNK)  # noqa: S311 - not for secrets
    new = put(cache, generation("new", files("new", fresh=fresh)))
    size = len(program("new"))
    closure = ClosureDigest.of([new.path], StoreDir())
    parts = [
        (new, b"program", start, min(MAX_EXTENT_SIZE, size - start))
        for start in range(0, size, MAX_EXTENT_SIZE)
    ]
    file = bundled(*parts, (new, b"fresh", 0, len(fresh))).file
    cache.files[file_name(closure)] = file
    node = await node_with(make_node, old)
    await node.realiser.realise(old.path)
    received = node.pool.states()[0].bytes_received
    caches, store, chunked = node.pool.caches(), node.store, node.chunked
    bundles = Bundles(caches, store, chunked, TRUSTED, node.link, nursery, 10.0)
    assert (await bundles.find(closure, [new.path])).brings
    await until(lambda: not bundles.are_coming)
    assert node.pool.states()[0].bytes_received - received < len(file) / 2
    found = await chunked.find(new.path)
    assert found is not None
    entry = next(entry for entry in found.tree.entries if entry.name == b"fresh")
    await until(lambda: not found.lacks(entry.offset, entry.offset + len(fresh)))
    assert len(fresh) <= asked_of(cache, new) <= len(fresh) + 2 * CHUNK
    assert await read(node, new, b"program", 0, size) == program("new")
    assert await read(node, new, b"fresh", 0, len(fresh)) == fresh
