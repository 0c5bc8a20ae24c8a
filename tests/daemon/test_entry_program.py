"""What an image names as its program is fetched before anybody opens it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import trio

from fusesnap.daemon.entry_program import EntryProgram
from fusesnap.fetch.events import Asked
from fusesnap.fetch.loader import Loader
from fusesnap.fetch.priority import Priority
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.substituter.memory import MemorySubstituter

from ..fetch.lazy_node import MakeNode, Node, until
from ..fetch.published import PublishedPath, published, put
from ..store.conftest import Tree, path_named

TOOL = random.Random(3).randbytes(1 << 20)  # noqa: S311 - not for secrets


def link(name: str, inner: str) -> str:
    return f"{StoreDir().format(path_named(name))}/{inner}"


class Closure:
    """An environment that links to two packages, both of which refer to what is common."""

    def __init__(self, cache: MemorySubstituter, *, indexed: bool) -> None:
        self._indexed = indexed
        links: Tree = {"one": link("one", "bin/one"), "two": link("two", "bin/two"), "no": "/x"}
        self.env = self._put(cache, "env", {"bin": links}, ())
        self.one = self._put(cache, "one", {"bin": {"one": (TOOL,)}}, ("common",))
        self.two = self._put(cache, "two", {"bin": {"two": (TOOL[:4096],)}}, ("common",))
        self.common = self._put(cache, "common", {"data": TOOL[:8192]}, ("common",))
        self.paths = frozenset(each.path for each in (self.env, self.one, self.two, self.common))

    def _put(
        self, cache: MemorySubstituter, name: str, tree: Tree, references: tuple[str, ...]
    ) -> PublishedPath:
        path = published(name, tree, references)
        if not self._indexed:
            path = replace(path, info=replace(path.info, unknown=()))
        return put(cache, path)


async def following(node: Node, nursery: trio.Nursery, closure: Closure) -> EntryProgram:
    await node.realiser.admit(closure.paths)
    loader = Loader(node.store, StoreDir(), node.contents, nursery)
    return EntryProgram(node.store, node.contents, loader, head_start=0)


async def nothing_foreseen() -> bool:
    return False


def committed(node: Node, *paths: PublishedPath) -> bool:
    wanted: list[StorePath] = [path.path for path in paths]
    return len(node.store.committed_among(wanted)) == len(wanted)


async def test_a_program_that_comes_by_the_chunk(
    cache: MemorySubstituter,
    make_node: MakeNode,
    nursery: trio.Nursery,
) -> None:
    closure, node = Closure(cache, indexed=True), await make_node()
    program = await following(node, nursery, closure)
    places = [link("nowhere", "one"), "/bin/one", link("env", "bin/no"), link("env", "bin/one")]
    await program.follow(closure.paths, [places], nothing_foreseen)
    chunked = await node.chunked.find(closure.one.path)
    assert chunked is not None
    await until(lambda: chunked.is_idle)
    entry = next(each for each in chunked.tree.entries if each.name == b"one")
    asked = len(cache.parts)
    assert await node.contents.read(closure.one.path, entry.offset, entry.size) == TOOL
    assert len(cache.parts) == asked
    # Of other paths nothing but what is in them; all of those that are small and have no programs.
    small = {closure.env.info.url, closure.common.info.url}
    assert {name for name, _, _ in cache.parts} == {closure.one.info.url, *small}


async def test_a_program_on_a_stock_cache(
    cache: MemorySubstituter,
    make_node: MakeNode,
    nursery: trio.Nursery,
) -> None:
    closure, node = Closure(cache, indexed=False), await make_node()
    program = await following(node, nursery, closure)
    await program.follow(closure.paths, [[link("env", "bin/one")]], nothing_foreseen)
    await until(lambda: committed(node, closure.env, closure.one, closure.common))
    assert closure.two.info.url not in cache.requests


async def test_guesses_come_behind_the_program(
    cache: MemorySubstituter,
    make_node: MakeNode,
    nursery: trio.Nursery,
) -> None:
    closure, node = Closure(cache, indexed=False), await make_node()
    program = await following(node, nursery, closure)
    places = [[link("env", f"bin/{name}")] for name in ("one", "none", "two")]
    await program.follow(closure.paths, places, nothing_foreseen)
    assert committed(node, closure.one, closure.two)
    asked = {each.path: each.priority for each in node.heard if isinstance(each, Asked)}
    assert asked[closure.one.path] is Priority.TRACE
    assert asked[closure.two.path] is Priority.REST


async def test_what_cannot_be_had_is_let_be(
    cache: MemorySubstituter,
    make_node: MakeNode,
    nursery: trio.Nursery,
    caplog: pytest.LogCaptureFixture,
) -> None:
    closure, node = Closure(cache, indexed=False), await make_node()
    program = await following(node, nursery, closure)
    del cache.files[closure.one.info.url]
    await program.follow(
        closure.paths, [[link("env", "bin/one"), link("env", "bin/two")]], nothing_foreseen
    )
    assert committed(node, closure.two)
    assert closure.one.path.base_name in caplog.text  # whoever fetches it says so


@pytest.mark.parametrize("guessed", [0, 1])
async def test_nothing_more_is_guessed_as_soon_as_a_trace_is_known(
    cache: MemorySubstituter, make_node: MakeNode, nursery: trio.Nursery, guessed: int
) -> None:
    closure, node = Closure(cache, indexed=False), await make_node()
    program = await following(node, nursery, closure)
    answers = iter([False] * guessed + [True])

    async def is_foreseen() -> bool:
        return next(answers)

    places = [[link("env", f"bin/{name}")] for name in ("one", "two")]
    await program.follow(closure.paths, places, is_foreseen)
    assert committed(node, closure.one) == bool(guessed)
    assert closure.two.info.url not in cache.requests
