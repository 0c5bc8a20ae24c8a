"""A published cache on a real nginx that sends files whole, whatever part is asked for."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator

import pytest
import trio
from testbed.bad_caches import BadCaches, bad_caches

from fusesnap.daemon.build import Node

from ..fetch.published import PublishedPath, published
from ..substituter.samples import CACHE_INFO, KEY
from .conftest import MakeNode

CONTENTS = random.Random(7).randbytes(3_000_000)  # noqa: S311 - not for secrets
FIRST = published("first", {"bin": {"program": (CONTENTS,)}, "small": b"hello"})
SECOND = published("second", {"big": CONTENTS[::-1]})
WHOLE = ["without-ranges", "claiming-ranges"]


@pytest.fixture(scope="module")
def all_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BadCaches]:
    files = tmp_path_factory.mktemp("published") / "files"
    (files / "nar").mkdir(parents=True)
    (files / "nix-cache-info").write_bytes(CACHE_INFO)
    for each in (FIRST, SECOND):
        (files / f"{each.path.hash_part}.narinfo").write_text(each.info.to_text())
        (files / each.info.url).write_bytes(each.file)
        (files / each.index_name).write_bytes(each.index.to_bytes(KEY))
    with bad_caches(tmp_path_factory.mktemp("nginx"), files) as caches:
        yield caches


async def read(node: Node, path: PublishedPath, name: bytes, offset: int, size: int) -> bytes:
    """As a reader of the mount is given it."""
    tree = await node.contents.tree(path.path)
    index, entry = next((i, e) for i, e in enumerate(tree.entries) if e.name == name)
    data = await node.contents.read(path.path, entry.offset + offset, size)
    if data is not None:
        return data
    assert node.store.is_committed(path.path)
    file = node.store.location(path.path) / tree.path(index).decode()
    return file.read_bytes()[offset : offset + size]


def asked(caches: BadCaches, manner: str, path: PublishedPath) -> list[tuple[int, bool]]:
    """Of each request for a path's NAR what was answered, and whether a part was asked for."""
    return [
        (request.status, bool(request.range))
        for request in caches.nars(manner)
        if request.name == path.info.url
    ]


@pytest.mark.parametrize("manner", WHOLE)
async def test_a_read_is_answered_from_the_whole_nar(
    make_node: MakeNode, caches: BadCaches, manner: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = caches.url(manner)
    async with make_node(url) as node:
        await node.realiser.admit([FIRST.path, SECOND.path])
        # What needs no byte of a NAR comes from the index.
        assert (await node.contents.tree(FIRST.path)).kind(0) is not None
        assert asked(caches, manner, FIRST) == []

        assert await read(node, FIRST, b"program", 1_500_000, 5000) == CONTENTS[1_500_000:1_505_000]
        assert await read(node, FIRST, b"small", 0, 5) == b"hello"
        assert node.store.is_committed(FIRST.path)
        assert asked(caches, manner, FIRST) == [(200, True), (200, False)]
        said = f"{FIRST.path}: is fetched whole: {url}: {FIRST.info.url}: status 200 to a request"
        assert caplog.text.count(said) == 1
        assert "expected 206: this cache sends files whole" in caplog.text

        # The cache is not asked for parts again, and has done nothing wrong.
        assert await read(node, SECOND, b"big", 10, 100) == CONTENTS[::-1][10:110]
        assert asked(caches, manner, SECOND) == [(200, False)]
        (state,) = node.pool.states()
        assert (state.reachable, state.failures, state.bad_nars) == (True, 0, 0)


async def test_what_came_by_the_chunk_before_stays(
    make_node: MakeNode, caches: BadCaches, caplog: pytest.LogCaptureFixture
) -> None:
    async with make_node(caches.url("losing-ranges")) as node:
        await node.realiser.admit([FIRST.path])
        assert await read(node, FIRST, b"program", 0, 5000) == CONTENTS[:5000]
        before = asked(caches, "losing-ranges", FIRST)
        assert {answer for answer, _ in before} == {206}
        assert not node.store.is_committed(FIRST.path)

        caches.whole.touch()
        assert await read(node, FIRST, b"program", 0, 5000) == CONTENTS[:5000]
        assert asked(caches, "losing-ranges", FIRST) == before
        assert await read(node, FIRST, b"program", 2_900_000, 5000) == CONTENTS[2_900_000:2_905_000]
        assert node.store.is_committed(FIRST.path)
    assert asked(caches, "losing-ranges", FIRST)[len(before) :] == [(200, True), (200, False)]
    assert f"{FIRST.path}: is fetched whole: " in caplog.text


@pytest.mark.parametrize("manner", WHOLE)
async def test_many_readers_are_served_by_one_whole_nar(
    make_node: MakeNode, caches: BadCaches, manner: str, caplog: pytest.LogCaptureFixture
) -> None:
    places = range(0, 2_900_000, 150_000)
    async with make_node(caches.url(manner)) as node:
        await node.realiser.admit([FIRST.path])
        shown: dict[int, bytes] = {}

        async def reader(place: int) -> None:
            shown[place] = await read(node, FIRST, b"program", place, 4096)

        async with trio.open_nursery() as readers:
            for place in places:
                readers.start_soon(reader, place)
        assert shown == {place: CONTENTS[place : place + 4096] for place in places}
        # None of them has taken it for a failure.
        (state,) = node.pool.states()
        assert (state.reachable, state.failures) == (True, 0)
    assert asked(caches, manner, FIRST).count((200, False)) == 1
    told = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(told) == 1
    assert f"{FIRST.path}: is fetched whole: " in told[0].getMessage()
