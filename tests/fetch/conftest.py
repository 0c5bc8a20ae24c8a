"""A realiser on a real local store, with caches in memory."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio

from fusesnap.fetch.builder import Builder
from fusesnap.fetch.events import ObserveFetch, unobserved
from fusesnap.fetch.flight import Reader
from fusesnap.fetch.link import open_link
from fusesnap.fetch.realiser import Limits, Realiser
from fusesnap.fetch.scheduler import LinkLimits
from fusesnap.fetch.unpack_processes import UnpackProcesses
from fusesnap.fetch.unpacking import ThreadUnpackers, Unpackers
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.store_path import StoreDir
from fusesnap.store.local_store import LocalStore
from fusesnap.substituter.memory import MemorySubstituter
from fusesnap.substituter.narinfo_cache import NarInfoCache
from fusesnap.substituter.pool import SubstituterPool
from fusesnap.substituter.retry import RetryPolicy

from ..substituter.samples import TRUSTED
from .lazy_node import MakeNode, Node

MakeRealiser = Callable[..., Realiser]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path / "state", StoreDir(), clock=lambda: 0.0) as opened:
        yield opened


@pytest.fixture(params=["threads", "processes"])
async def unpackers(
    request: pytest.FixtureRequest, store: LocalStore, nursery: trio.Nursery
) -> Unpackers:
    """Both ways to unpack must pass the same tests."""
    if request.param == "threads":
        return ThreadUnpackers(store)
    state = str(store.layer.parent)
    command = [sys.executable, "-m", "fusesnap.daemon.unpack_worker", state, "/nix/store"]
    processes = UnpackProcesses(command, 1, nursery, ThreadUnpackers(store))
    processes.start()
    with trio.fail_after(60):
        await processes.all_ready()
    return processes


@pytest.fixture
async def make_realiser(
    store: LocalStore, unpackers: Unpackers, nursery: trio.Nursery
) -> MakeRealiser:
    """A realiser that reads the given caches, without waits between attempts."""

    async def at_once(seconds: float) -> None:
        await trio.lowlevel.checkpoint()

    def make(
        *caches: MemorySubstituter,
        limits: Limits | None = None,
        link_limits: LinkLimits | None = None,
        observe: ObserveFetch = unobserved,
        builder: Builder | None = None,
    ) -> Realiser:
        pool = SubstituterPool(
            caches,
            store_dir=StoreDir(),
            trusted_keys=TRUSTED,
            narinfo_cache=NarInfoCache(":memory:", lambda: 0.0),
            retry=RetryPolicy(sleep=at_once),
            deadline=10.0,
        )
        return Realiser(
            store,
            pool,
            unpackers,
            open_link(nursery, link_limits),
            nursery,
            limits or Limits(),
            lambda pid: Reader(pid, "test"),
            observe,
            builder,
        )

    return make


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
