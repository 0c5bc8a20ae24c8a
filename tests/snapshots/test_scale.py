"""Many store paths, many snapshots, many calls at once: what is done for each, and what is done once.

Counted, not timed: every call of a Python or C function that a step makes in its threads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from fusesnap.nix.store_path import StorePath
from fusesnap.snapshots import farms as farms_module
from fusesnap.snapshots.directories import remove_tree
from fusesnap.snapshots.interface import Mount

if TYPE_CHECKING:
    from tests.snapshots.conftest import Bench

TREE = {"bin": {"tool": b"tool"}}
FEW, MANY = 10, 300
LATER = 4_000_000_000.0  # seconds since the epoch: whatever is on disk was changed long ago
LOOKS = {"stat", "lstat", "open", "scandir", "listdir"}


class Counter:
    """How many calls are made in threads, and how often by name for those of C."""

    def __init__(self) -> None:
        self.calls = 0
        self.names: dict[str, int] = {}

    def profile(self, _frame: object, event: str, argument: object) -> None:
        if event in {"call", "c_call"}:
            self.calls += 1
        if event == "c_call":
            name = getattr(argument, "__name__", "")
            self.names[name] = self.names.get(name, 0) + 1

    def of(self, names: set[str]) -> int:
        return sum(self.names.get(name, 0) for name in names)


@contextmanager
def counting() -> Iterator[Counter]:
    """Count in everything that is handed to a thread."""
    counter, original = Counter(), trio.to_thread.run_sync

    async def run_sync(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            sys.setprofile(counter.profile)
            try:
                return function(*arguments)
            finally:
                sys.setprofile(None)

        return await original(counted, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trio.to_thread, "run_sync", run_sync)
        yield counter


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What farms are built, by the name that they hide."""
    original, reserved = farms_module._build, []

    def build(farm: farms_module.Farm, top: Path) -> None:
        reserved.append(farm.reserved)
        original(farm, top)

    monkeypatch.setattr(farms_module, "_build", build)
    return reserved


async def image_of(bench: Bench, name: str, count: int) -> list[StorePath]:
    """An image with so many paths, all committed: nine of ten directories, the others single files."""
    paths = [
        bench.path(f"{name}-{number}", b"file" if number % 10 == 0 else TREE, committed=True)
        for number in range(count)
    ]
    await bench.nix_layer(name, "", *paths)
    return paths


async def life_of(bench: Bench, image: str) -> Counter:
    """What a warm container costs, from Prepare to Remove, after the first of its image."""
    await bench.snapshotter.prepare(f"first-{image}", image, {})
    with counting() as counter:
        await bench.snapshotter.prepare(f"second-{image}", image, {})
        await bench.snapshotter.mounts(f"second-{image}")
        await bench.snapshotter.remove(f"second-{image}")
    return counter


# Paths


async def test_a_warm_container_costs_no_more_with_more_paths(bench: Bench) -> None:
    bench.now = LATER
    await image_of(bench, "few", FEW)
    few = await life_of(bench, "few")
    await image_of(bench, "many", MANY)
    many = await life_of(bench, "many")
    assert few.calls > 100  # it does count
    assert many.calls - few.calls < (MANY - FEW) / 10
    assert many.of(LOOKS) == few.of(LOOKS)


async def test_a_store_that_changed_is_looked_at_again(bench: Bench) -> None:
    """Once for each path, but neither is the farm built again, nor its name found out."""
    bench.now = LATER
    await image_of(bench, "image", FEW)
    await bench.snapshotter.prepare("first", "image", {})
    bench.path("another", TREE, committed=True)
    with counting() as changed:
        await bench.snapshotter.prepare("second", "image", {})
    with counting() as same:
        await bench.snapshotter.prepare("third", "image", {})
    assert changed.calls - same.calls >= FEW
    assert changed.of({"setxattr", "link", "openssl_sha256"}) == 0


async def test_what_vanished_is_not_shown_as_complete(bench: Bench) -> None:
    """An absent target of a redirect would be an empty directory."""
    bench.now = LATER
    gone, *_ = await image_of(bench, "image", 3)
    bench.lazy.offer(gone)
    await bench.snapshotter.prepare("before", "image", {})
    remove = bench.store.location(gone)
    remove.unlink()
    (mount,) = await bench.snapshotter.prepare("after", "image", {})
    assert any("lazy" in option for option in mount.options)


async def test_a_change_within_the_clocks_tick_is_not_missed(bench: Bench) -> None:
    """A directory that changes twice in a tick may look the same after the second change."""
    paths = await image_of(bench, "image", 3)
    bench.now = bench.store.real.stat().st_ctime
    await bench.snapshotter.prepare("before", "image", {})
    state = bench.store.real.stat()
    directory = bench.store.location(paths[1])
    bench.lazy.offer(paths[1])
    remove_tree(directory)
    # The kernel has given it another time; look through the eyes of one that has not.
    with pytest.MonkeyPatch.context() as patch:
        original = os.stat

        def stat(path: Any, **options: Any) -> os.stat_result:
            return state if str(path) == str(bench.store.real) else original(path, **options)

        patch.setattr(os, "stat", stat)
        (mount,) = await bench.snapshotter.prepare("after", "image", {})
    assert any("lazy" in option for option in mount.options)


async def test_many_at_once_build_one_farm(bench: Bench, built: list[str]) -> None:
    await image_of(bench, "image", FEW)
    mounts: dict[str, Sequence[Mount]] = {}

    async def start(key: str) -> None:
        mounts[key] = await bench.snapshotter.prepare(key, "image", {})

    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(start, f"container-{number}")
    assert built == [".fusesnap-store"]
    lowers = {
        option
        for (mount,) in mounts.values()
        for option in mount.options
        if option.startswith("lowerdir=")
    }
    assert len(mounts) == 100
    assert len(lowers) == 1
    assert len(await bench.snapshotter.walk()) == 101


async def test_many_at_once_look_once_at_a_busy_store(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asked before somebody looked need not look too; who asks after it must."""
    await image_of(bench, "image", FEW)
    await bench.snapshotter.prepare("first", "image", {})
    bench.now = bench.store.real.stat().st_ctime
    with bench.metastore.reading() as transaction:
        chain = transaction.chain("image")
    looks: list[int] = []
    original = bench.store.committed_among

    def committed_among(paths: Sequence[StorePath]) -> set[StorePath]:
        looks.append(len(paths))
        return original(paths)

    monkeypatch.setattr(bench.store, "committed_among", committed_among)
    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(bench.snapshotter._answers.views.plan, chain, [])
    at_once = len(looks)
    assert 1 <= at_once <= 2
    await bench.snapshotter._answers.views.plan(chain, [])
    assert len(looks) == at_once + 1


async def test_files_that_arrive_do_not_build_the_farm_anew(bench: Bench, built: list[str]) -> None:
    """There is an entry in it for every directory. They are served by FUSE until the last of them is there."""
    glibc = bench.path("glibc", TREE)
    files = [bench.path(f"file-{number}", b"%d" % number) for number in range(3)]
    await bench.nix_layer("image", "", glibc, *files)
    for number, path in enumerate(files):
        root = await bench.run(f"before-{number}", "image")
        assert bench.look(root / "nix/store") == {
            glibc.base_name: TREE,
            **{file.base_name: b"%d" % index for index, file in enumerate(files)},
        }
        assert len(built) == 2
        bench.store.commit(path, b"%d" % number)
    (mount,) = await bench.snapshotter.prepare("after", "image", {})
    assert len(built) == 3
    assert not any("lazy/views" in option for option in mount.options)
    assert bench.source.prefetched == [*sorted(files), *sorted(files[1:]), *files[2:]]


async def test_what_must_be_complete_is_not_what_was_remembered(bench: Bench) -> None:
    bench.now = LATER
    tool = bench.path("tool", TREE)
    await bench.nix_layer("image", "", tool)
    await bench.snapshotter.prepare("cold", "image", {})
    with bench.metastore.reading() as transaction:
        chain = transaction.chain("image")
    views = bench.snapshotter._answers.views
    assert not (await views.plan(chain, [])).generation.complete
    assert (await views.plan(chain, [], complete=True)).generation.complete
    assert bench.source.realised == [tool]
    assert (await views.plan(chain, [])).generation.complete


# Images


async def test_an_image_is_made_ready_when_it_is_unpacked(bench: Bench, built: list[str]) -> None:
    async with trio.open_nursery() as nursery:
        bench.open(nursery=nursery)
        paths = [bench.path("tool", TREE), bench.path("file", b"file")]
        await bench.nix_layer("image", "", *paths)
    assert len(built) == 2
    assert (bench.source.realised, bench.source.prefetched) == ([], [])  # nobody runs it yet
    await bench.snapshotter.cleanup()
    root = await bench.run("container", "image")
    assert len(built) == 2
    assert bench.look(root / "nix/store") == {
        paths[0].base_name: TREE,
        paths[1].base_name: b"file",
    }
    assert bench.source.prefetched == [paths[1]]


async def test_only_the_whole_image_stays_ready(bench: Bench) -> None:
    """What was built for a layer of it goes."""
    async with trio.open_nursery() as nursery:
        bench.open(nursery=nursery)
        await bench.nix_layer("one", "", bench.path("tool", TREE, committed=True))
    async with trio.open_nursery() as nursery:
        bench.open(nursery=nursery)
        await bench.nix_layer("two", "one", bench.path("other", TREE, committed=True))
    await bench.snapshotter.cleanup()
    (farm,) = (bench.state / "farms").iterdir()
    (mount,) = await bench.snapshotter.prepare("container", "two", {})
    assert any(farm.name in option for option in mount.options)
    await bench.snapshotter.remove("container")
    await bench.snapshotter.remove("two")
    assert not list((bench.state / "farms").iterdir())


async def test_an_image_that_goes_meanwhile_is_no_error(
    bench: Bench, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = bench.open()._foresight.build

    async def build(name: str) -> None:
        await bench.snapshotter.remove(name)
        await original(name)

    async with trio.open_nursery() as nursery:
        monkeypatch.setattr(bench.open(nursery=nursery)._foresight, "build", build)
        await bench.nix_layer("image", "", bench.path("tool", TREE, committed=True))
    assert built == []
    await bench.snapshotter.cleanup()
    assert not list((bench.state / "farms").iterdir())


# Snapshots


async def test_a_container_costs_hardly_more_with_more_snapshots(bench: Bench) -> None:
    """A name to compare, but no call, for each of the others."""
    bench.now = LATER
    await image_of(bench, "image", FEW)
    alone = await life_of(bench, "image")
    for number in range(200):
        await bench.snapshotter.prepare(f"other-{number}", "image", {})
    with counting() as among:
        await bench.snapshotter.prepare("last", "image", {})
        await bench.snapshotter.mounts("last")
        await bench.snapshotter.remove("last")
    assert among.calls - alone.calls < 20
