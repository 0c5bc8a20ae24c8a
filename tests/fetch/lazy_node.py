"""A process that reads by the chunk, over caches in memory."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import UUID

import trio

from fusesnap.fetch.chunked_paths import ChunkedPaths
from fusesnap.fetch.contents import Contents
from fusesnap.fetch.events import (
    FetchEvent,
)
from fusesnap.fetch.flight import Reader
from fusesnap.fetch.link import open_link
from fusesnap.fetch.realiser import Limits, Realiser
from fusesnap.fetch.unpacking import ThreadUnpackers
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.store_path import StoreDir
from fusesnap.store.local_store import LocalStore
from fusesnap.store.partial_nars import PartialNars
from fusesnap.substituter.memory import MemorySubstituter
from fusesnap.substituter.narinfo_cache import NarInfoCache
from fusesnap.substituter.pool import SubstituterPool
from fusesnap.substituter.retry import RetryPolicy

from ..store.conftest import Tree
from ..substituter.samples import TRUSTED
from .published import CHUNK, PublishedPath

BIG = random.Random(1).randbytes(200 * CHUNK)  # noqa: S311 - not for secrets
OTHER_BIG = random.Random(2).randbytes(300 * CHUNK)  # noqa: S311
TREE: Tree = {"big": BIG, "other": OTHER_BIG, "small": b"hello", "to": "small"}
STALL = 30.0


class Node:
    """One process on a state directory, with some caches."""

    def __init__(
        self, state: Path, nursery: trio.Nursery, caches: list[MemorySubstituter], keys: TrustedKeys
    ) -> None:
        async def at_once(seconds: float) -> None:
            await trio.lowlevel.checkpoint()

        self.store = LocalStore.open(state, StoreDir(), clock=lambda: 0.0)
        self.pool = pool = SubstituterPool(
            caches,
            store_dir=StoreDir(),
            trusted_keys=TRUSTED,
            narinfo_cache=NarInfoCache(":memory:", lambda: 0.0),
            retry=RetryPolicy(sleep=at_once),
            deadline=10.0,
        )
        self.link = link = open_link(nursery)
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


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.lowlevel.checkpoint()
