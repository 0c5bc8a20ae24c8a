"""A snapshot of a Nix image keeps its closure from before it is looked for until Remove."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from fusesnap.errors import ClosureUnavailable, PathNotFound
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.snapshots.mountinfo import parse
from fusesnap.snapshots.snapshot_roots import SnapshotRoots
from fusesnap.store.collector_lock import CollectorLock
from fusesnap.store.roots import Roots, read_permanent_roots
from fusesnap.store.temporary_roots import TemporaryRoots, read_temporary_roots

if TYPE_CHECKING:
    from tests.snapshots.conftest import Bench

HELLO = {"bin": {"hello": b"hello"}}


def rooted(bench: Bench) -> set[str]:
    """What no collector may take: ours, and real Nix's, which knows roots of valid paths only by their process."""
    nix = bench.state / "nix"
    with CollectorLock(nix).collecting():
        temporary = read_temporary_roots(nix, StoreDir())
    permanent = read_permanent_roots(nix, StoreDir())
    assert temporary == permanent
    return permanent


async def test_from_before_the_first_look_until_remove(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    hello, glibc = bench.path("hello", HELLO), bench.path("glibc", HELLO, committed=True)
    both = {hello.base_name, glibc.base_name}
    seen: list[set[str]] = []

    async def admit(
        paths: Collection[StorePath], shown: Collection[StorePath]
    ) -> Mapping[StorePath, int]:
        seen.append(rooted(bench))
        return await ask(paths, shown)

    ask = bench.source.admit
    monkeypatch.setattr(bench.source, "admit", admit)
    await bench.layer("base", "", {"etc": {}})
    assert rooted(bench) == set()
    await bench.nix_layer("image", "base", hello, glibc)
    assert seen == [both]
    await bench.snapshotter.prepare("container", "image", {})
    assert rooted(bench) == both
    await bench.snapshotter.remove("container")
    assert rooted(bench) == both
    assert bench.store.let_go == []
    await bench.snapshotter.remove("image")
    assert rooted(bench) == set()
    assert set(bench.store.let_go) == both  # in use until now
    await bench.snapshotter.remove("base")


async def test_two_images_of_one_closure_keep_it_twice(bench: Bench) -> None:
    hello = bench.path("hello", HELLO)
    await bench.nix_layer("one", "", hello)
    await bench.nix_layer("two", "", hello)
    await bench.snapshotter.remove("one")
    assert rooted(bench) == {hello.base_name}
    await bench.snapshotter.remove("two")
    assert rooted(bench) == set()


async def test_a_commit_that_fails_may_be_tried_again_and_leaves_nothing(bench: Bench) -> None:
    hello = bench.path("hello", HELLO)
    bench.source.failures[hello] = PathNotFound("hello: no cache has it")
    with pytest.raises(ClosureUnavailable):
        await bench.nix_layer("image", "", hello)
    del bench.source.failures[hello]
    key = "k8s.io/1/extract-1-x image"
    await bench.snapshotter.commit("image", key, {})
    assert rooted(bench) == {hello.base_name}
    other = bench.path("other", HELLO)
    bench.source.failures[other] = PathNotFound("other: no cache has it")
    with pytest.raises(ClosureUnavailable):
        await bench.layer("no image", "", bench.placeholders(other), key="failing")
    await bench.snapshotter.remove("failing")
    assert rooted(bench) == {hello.base_name}


async def test_what_is_mounted_is_kept_also_when_its_snapshots_are_gone(bench: Bench) -> None:
    hello = bench.path("hello", HELLO, committed=True)
    await bench.nix_layer("image", "", hello)
    root = await bench.run("container", "image")
    await bench.snapshotter.remove("container")  # by hand: containerd would not
    await bench.snapshotter.remove("image")
    assert rooted(bench) == {hello.base_name}
    bench.mounts.unmount(root)
    await bench.snapshotter.cleanup()
    assert rooted(bench) == set()


def test_which_mounts_count() -> None:
    class Names:
        def names(self) -> set[str]:
            return {"snapshot-7", "snapshot-8", "snapshot-77", "of-somebody-else"}

    line = "30 20 0:40 / / rw - overlay overlay rw,lowerdir={},upperdir=/s/9/fs,workdir=/w\n"
    roots = SnapshotRoots(cast(Roots, Names()), Path("/state"))  # only its names are asked for
    for lowers in ("/state/farms/a:/state/snapshots/7/fs", "farms/a:layer:snapshots/7/fs"):
        mounts = partial(parse, line.format(lowers).encode())
        assert roots.of_nobody({8}, mounts) == ["snapshot-77"]
    for lowers in (
        "/state/idmapped/2/state/snapshots/7/fs",
        "idmapped/2/state/snapshots/7/fs:layer",
    ):
        mounts = partial(parse, line.format(lowers).encode())
        assert roots.of_nobody({8}, mounts) == ["snapshot-77"]
    # containerd's own snapshotter, and another daemon of ours.
    elsewhere = "/containerd/overlayfs/snapshots/7/fs:/state2/snapshots/77/fs"
    mounts = partial(parse, line.format(elsewhere).encode())
    assert roots.of_nobody({8}, mounts) == ["snapshot-7", "snapshot-77"]
    assert roots.of_nobody({8}, tuple) == ["snapshot-7", "snapshot-77"]


async def test_a_restart_makes_roots_and_rows_agree(bench: Bench) -> None:
    hello, other = bench.path("hello", HELLO), bench.path("other", HELLO)
    await bench.nix_layer("lost", "", hello)  # by a loss of power, or an earlier version made none
    await bench.nix_layer("kept", "", other)
    directory = bench.state / "nix/gcroots/fusesnap"
    shutil.rmtree(directory / "snapshot-1")
    bench.store.roots.add("snapshot-99", [bench.path("gone", HELLO)])
    bench.close()
    nix = bench.state / "nix"
    bench.store.temporary = TemporaryRoots(nix, StoreDir(), CollectorLock(nix))
    bench.store.roots = Roots(nix, bench.store.temporary, bench.store.let_go.extend)
    snapshotter = bench.open()
    await snapshotter.recover()
    await snapshotter.remove_leftovers()
    assert {path.name for path in directory.iterdir()} == {"snapshot-1", "snapshot-2"}
    assert rooted(bench) == {hello.base_name, other.base_name}


async def test_the_list_of_a_closure_is_kept_while_it_is_read(bench: Bench) -> None:
    hello = bench.path("hello", HELLO)
    closure = bench.path("closure", {"store-paths": f"/nix/store/{hello}\n".encode()})
    kept: list[set[str]] = []

    async def realise(path: StorePath) -> None:
        with CollectorLock(bench.state / "nix").collecting():
            kept.append(read_temporary_roots(bench.state / "nix", StoreDir()))
        bench.store.commit(path, bench.source.contents[path])

    bench.source.realise = realise  # type: ignore[method-assign]
    labels = {"containerd.io/snapshot/nix-closure": f"/nix/store/{closure}"}
    await bench.layer("image", "", {}, labels)
    assert kept[0] == {closure.base_name}
    assert rooted(bench) == {hello.base_name}
