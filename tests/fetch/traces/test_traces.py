"""Starts of a node: recorded, kept over the death of the process, and replayed before they ask."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fusesnap.errors import StorageFailure
from fusesnap.fetch.traces.database import Origin, TraceDatabase
from fusesnap.fetch.traces.recorder import Bounds, Recorder
from fusesnap.fetch.traces.recording import Start
from fusesnap.fetch.traces.search import TraceSearch, file_name
from fusesnap.fetch.traces.traces import Policy, Traces
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.startup_trace import Ending, Flaw, Lack, StartupTrace
from fusesnap.nix.startup_trace_text import format_trace, sign_trace
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.store.local_store import LocalStore
from fusesnap.substituter.memory import MemorySubstituter

from ...store.conftest import MadePath, commit_path, make_path
from ...substituter.samples import KEY, TRUSTED

HELLO, GLIBC = make_path("hello", b"h" * 20_000), make_path("glibc", b"g" * 20_000)
POLICY = Policy(record=True, replay=True, ask=True, version="0.1", readahead=0, boot="boot-1")


def path_of(made: MadePath) -> StorePath:
    return made[0].store_path


class Told(TraceDatabase):
    """Tells its node which calls it has done; of a dead node nothing is saved."""

    def __init__(self, path: Path, node: Node) -> None:
        super().__init__(path)
        self._node = node

    def save(self, drafts: Mapping[str, StartupTrace], *, orderly: bool) -> None:
        if self._node.dead:
            raise StorageFailure("a process that was killed saves nothing", 9)
        super().save(drafts, orderly=orderly)
        self._node.heard.append("save")

    def end(self, key: str) -> None:
        super().end(key)
        self._node.heard.append("end")


class Node:
    """The traces of one state directory, as the processes that serve it one after another have them."""

    def __init__(self, state: Path, store: LocalStore) -> None:
        self.store = store
        self.path = state / "traces.sqlite"
        self.requested: list[list[StorePath]] = []
        self.awaited: set[StorePath] = set()
        self.owners: dict[int, str] = {}
        self.cache = MemorySubstituter()
        self.dead = False
        self.bundles: set[ClosureDigest] = set()
        self.heard: list[str] = []
        self.ordinals = {path_of(made): store.pin(made[0]).ordinal for made in (HELLO, GLIBC)}

    def foresee(self, trace: StartupTrace) -> None:
        self.requested.append([traced.path for traced in trace.paths])

    async def bundled(self, closure: ClosureDigest, paths: Collection[StorePath]) -> bool:
        return closure in self.bundles

    def path_of(self, ordinal: int) -> StorePath | None:
        pin = self.store.pin_of(ordinal)
        return None if pin is None else pin.info.store_path

    @asynccontextmanager
    async def process(self, policy: Policy = POLICY) -> AsyncIterator[tuple[Traces, Recorder]]:
        # Time flies here while a thread is at work.
        recorder = Recorder(self.path_of, trio.current_time, Bounds(seconds=1e9))
        traces = Traces(
            lambda: Told(self.path, self),
            recorder,
            self.store,
            self.foresee,
            lambda: self.awaited,
            self.owners.get,
            TraceSearch([self.cache], TRUSTED, lambda: 1_790_000_000.0, 30),
            lambda: 1_790_000_000.0,
            policy,
            self.bundled,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(traces.run)
            yield traces, recorder
            nursery.cancel_scope.cancel()

    def start(self, key: str, *members: MadePath) -> Start:
        paths = frozenset(path_of(made) for made in members or (HELLO, GLIBC))
        lazy = paths - self.store.committed_among(paths)
        return Start(key, f"/upper/{key}", ClosureDigest.of(paths, StoreDir()), paths, lazy)

    def read(self, recorder: Recorder, *files: MadePath, pid: int = 7) -> None:
        """Fetch paths that are single files, and read them as the kernel would."""
        for made in files:
            ordinal = self.ordinals[path_of(made)]
            recorder.accessed(ordinal, pid)
            if not self.store.is_committed(path_of(made)):
                commit_path(self.store, made)
            tree = self.store.tree(path_of(made))
            assert tree is not None
            recorder.opened(ordinal, tree, 0, pid)
            recorder.read(ordinal, 0, 0, 4096)

    def stored(self) -> list[StartupTrace]:
        database = TraceDatabase(self.path)
        try:
            return [each.trace for each in database.traces()]
        finally:
            database.close()

    def put(self, trace: StartupTrace) -> None:
        database = TraceDatabase(self.path)
        database.put(trace, Origin.IMPORTED, 1)
        database.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with LocalStore.open(tmp_path / "state", StoreDir(), clock=lambda: 0.0) as store:
        yield Node(tmp_path, store)


async def looks(clock: MockClock, count: int) -> None:
    """Let so many seconds go by, one by one."""
    for _ in range(count):
        clock.jump(1)
        await wait_all_tasks_blocked()


def order(trace: StartupTrace) -> list[StorePath]:
    return [traced.path for traced in trace.paths]


async def test_a_start_is_recorded_when_it_is_over(node: Node, mock_clock: MockClock) -> None:
    async with node.process() as (traces, recorder):
        await traces.begin(node.start("one"))
        node.read(recorder, GLIBC, HELLO)
        while "one" in recorder:
            await looks(mock_clock, 1)
        while "end" not in node.heard:
            await trio.lowlevel.checkpoint()
    (trace,) = node.stored()
    assert order(trace) == [path_of(GLIBC), path_of(HELLO)]
    assert [(file.entry, file.size, file.name) for file in trace.files] == [(0, 20_000, b"")] * 2
    assert trace.circumstances.complete
    assert trace.circumstances.ended is Ending.IDLE
    assert trace.circumstances.recorded == 1_790_000_000


async def test_a_start_that_waits_is_not_over(node: Node, mock_clock: MockClock) -> None:
    async with node.process() as (traces, recorder):
        await traces.begin(node.start("one"))
        node.read(recorder, GLIBC)
        node.awaited = {path_of(HELLO)}
        while "save" not in node.heard:
            await looks(mock_clock, 1)
        await looks(mock_clock, 15)
        assert "one" in recorder
        node.read(recorder, HELLO)
        node.awaited.clear()
        while "one" in recorder:
            await looks(mock_clock, 1)
        while "end" not in node.heard:
            await trio.lowlevel.checkpoint()
    assert order(node.stored()[0]) == [path_of(GLIBC), path_of(HELLO)]


async def test_a_container_that_is_removed_has_started(node: Node) -> None:
    async with node.process() as (traces, recorder):
        await traces.begin(node.start("one"))
        node.read(recorder, GLIBC)
        await traces.end("one")
        await traces.end("never heard of")
    (trace,) = node.stored()
    assert trace.circumstances.ended is Ending.EXIT


async def test_the_next_start_is_fetched_in_that_order_before_it_asks(node: Node) -> None:
    async with node.process() as (traces, recorder):
        await traces.begin(node.start("one"))
        assert node.requested == []
        node.read(recorder, GLIBC, HELLO)
        await traces.end("one")
        node.store.collect(None)
        await traces.begin(node.start("two"))
        await traces.begin(node.start("two"))  # containerd asks for mounts again
        assert node.requested == [[path_of(GLIBC), path_of(HELLO)]]
        node.read(recorder, HELLO)
        await traces.end("two")
    (trace,) = node.stored()
    assert order(trace) == [path_of(GLIBC), path_of(HELLO)]  # the first order stays
    # The second start's files had old inodes, which the kernel may have had pages of; the first's had none.
    assert trace.circumstances.complete
    assert trace.circumstances.starts == 2


async def test_what_was_there_already_is_lacking(node: Node) -> None:
    commit_path(node.store, HELLO)
    async with node.process() as (traces, recorder):
        await traces.begin(node.start("one"))
        node.read(recorder, GLIBC)
        await traces.end("one")
    (trace,) = node.stored()
    assert trace.circumstances.lacks == ((path_of(HELLO), Lack.COMMITTED),)


async def test_what_the_kernel_was_shown_before_is_lacking(node: Node) -> None:
    async with node.process() as (traces, recorder):
        await traces.end("nobody")  # returns when its file is open
        node.read(recorder, GLIBC)  # by whomever
    node.store.collect(None)
    async with node.process() as (traces, recorder):
        await traces.begin(node.start("one"))
        node.read(recorder, GLIBC)
        await traces.end("one")
    assert node.stored()[0].circumstances.lacks == ((path_of(GLIBC), Lack.CACHED),)
    node.store.collect(None)
    async with node.process(replace(POLICY, boot="boot-2")) as (traces, recorder):
        await traces.begin(node.start("two"))
        node.read(recorder, GLIBC)
        await traces.end("two")
    assert node.stored()[0].circumstances.complete


async def test_an_orderly_end_loses_nothing(node: Node) -> None:
    async with node.process() as (traces, recorder):
        await traces.begin(node.start("one"))
        node.read(recorder, GLIBC)
    async with node.process() as (traces, recorder):
        await traces.begin(node.start("one"))  # known already
        node.read(recorder, HELLO)
        await traces.end("one")
    (trace,) = node.stored()
    assert order(trace) == [path_of(GLIBC), path_of(HELLO)]
    assert trace.circumstances.complete


async def test_a_killed_process_leaves_what_it_had_saved(node: Node, mock_clock: MockClock) -> None:
    async with node.process() as (traces, recorder):
        await traces.begin(node.start("one"))
        node.read(recorder, GLIBC)
        while "save" not in node.heard:
            await looks(mock_clock, 1)
        node.read(recorder, HELLO)
        node.dead = True
    node.dead = False
    async with node.process() as (traces, recorder):
        await traces.begin(node.start("one"))  # it is known, and goes on
        recorder.read(node.ordinals[path_of(GLIBC)], 0, 16_384, 1)
        await traces.end("one")
    (trace,) = node.stored()
    assert trace.size == 20_000
    assert order(trace) == [path_of(GLIBC)]
    assert trace.circumstances.flaws == {Flaw.INTERRUPTED}


async def test_readers_are_looked_at_and_strangers_are_left_out(node: Node) -> None:
    node.owners = {7: "/upper/one", 8: "/upper/elsewhere"}
    async with node.process() as (traces, recorder):
        await traces.begin(node.start("one"))
        node.read(recorder, HELLO, pid=8)
        node.read(recorder, GLIBC, pid=7)
        while not recorder.knows(7) or not recorder.knows(8):
            await trio.lowlevel.checkpoint()
        await traces.end("one")
    (trace,) = node.stored()
    assert order(trace) == [path_of(GLIBC)]
    assert trace.circumstances.flaws == {Flaw.SHARED}


async def test_a_trace_with_paths_of_others_is_refused(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    async with node.process() as (traces, recorder):
        await traces.begin(node.start("one"))
        node.read(recorder, GLIBC, HELLO)
        await traces.end("one")
    node.store.collect(None)
    only_hello = node.start("two", HELLO)
    node.put(replace(node.stored()[0], closure=only_hello.closure))
    async with node.process() as (traces, recorder):
        await traces.begin(only_hello)
        assert "two" in recorder  # it starts, and is recorded
    assert node.requested == []
    assert f"{path_of(GLIBC)} does not belong to the closure" in caplog.text


async def recorded(node: Node) -> StartupTrace:
    """A trace of another node, signed; here its paths are gone."""
    async with node.process(replace(POLICY, ask=False)) as (traces, recorder):
        await traces.begin(node.start("elsewhere"))
        node.read(recorder, GLIBC, HELLO)
        await traces.end("elsewhere")
    (trace,) = node.stored()
    node.path.unlink()
    node.store.collect(None)
    return sign_trace(trace, KEY)


async def test_a_start_that_nobody_knows_here_is_looked_for_in_caches(node: Node) -> None:
    trace = await recorded(node)
    node.cache.files[file_name(trace.closure)] = format_trace(trace)
    async with node.process() as (traces, recorder):
        await traces.begin(node.start("one"))
        assert "one" in recorder
    assert node.requested == [[path_of(GLIBC), path_of(HELLO)]]
    assert node.stored() == [trace]


async def test_it_is_looked_for_when_the_image_is_unpacked(node: Node) -> None:
    trace = await recorded(node)
    start = node.start("one")
    node.cache.files[file_name(trace.closure)] = format_trace(trace)
    async with node.process() as (traces, _):
        assert not await traces.knows(start.closure)
        await traces.foresee(start.closure, start.paths, None)
        assert await traces.knows(start.closure)
        assert node.requested == []
        node.cache.requests.clear()
        await traces.begin(start)
    assert node.requested == [[path_of(GLIBC), path_of(HELLO)]]
    assert node.cache.requests == []


async def test_nothing_is_looked_for_that_is_here(node: Node) -> None:
    for made in (HELLO, GLIBC):
        commit_path(node.store, made)
    start = node.start("one")
    async with node.process() as (traces, _):
        await traces.foresee(start.closure, start.paths, None)
    assert node.cache.requests == []


async def test_an_image_may_carry_it(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    trace = await recorded(node)
    start = node.start("one")
    async with node.process() as (traces, _):
        await traces.foresee(start.closure, start.paths, replace(trace, signatures=()))
        assert "is not trusted: it is unsigned" in caplog.text
        await traces.foresee(start.closure, start.paths, trace)
        await traces.begin(start)
    assert node.requested == [[path_of(GLIBC), path_of(HELLO)]]
    assert node.stored() == [trace]


async def test_both_can_be_switched_off(node: Node) -> None:
    async with node.process() as (traces, recorder):
        await traces.begin(node.start("one"))
        node.read(recorder, GLIBC)
        await traces.end("one")
    node.store.collect(None)
    async with node.process(replace(POLICY, record=False, replay=False, ask=False)) as (
        traces,
        recorder,
    ):
        await traces.begin(node.start("two"))
        assert "two" not in recorder
    assert node.requested == []
    assert len(node.cache.requests) == 1  # of the first start


async def test_without_its_file_containers_start_all_the_same(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    node.path.mkdir()
    async with node.process() as (traces, recorder):
        await traces.begin(node.start("one"))
        await traces.end("one")
        assert "one" not in recorder
    assert "nothing is recorded of starts: cannot open" in caplog.text
