"""What containerd's core/snapshots demands of every snapshotter: keys, names, kinds, parents, labels, times, errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from fusesnap.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from fusesnap.nix.store_path import StorePath
from fusesnap.snapshots.interface import Info, Kind

if TYPE_CHECKING:
    from tests.snapshots.conftest import Bench

NOW_NS = 1_700_000_000 * 10**9


@pytest.fixture(params=["bench", "prompt_bench"])
def bench(request: pytest.FixtureRequest) -> Bench:
    """Every rule holds whichever way an answer comes."""
    made: Bench = request.getfixturevalue(request.param)
    return made


async def base(bench: Bench) -> None:
    """The six snapshots of containerd's suite: c1 <- c2 committed, a1 on c2, a2, view v1 on c2, view v2."""
    snapshotter = bench.snapshotter
    await bench.layer("c1", "", {}, key="c1-a")
    await bench.layer("c2", "c1", {}, key="c2-a")
    await snapshotter.prepare("a1", "c2", {})
    await snapshotter.prepare("a2", "", {})
    await snapshotter.view("v1", "c2", {})
    await snapshotter.view("v2", "", {})


BASE = {
    "c1": (Kind.COMMITTED, ""),
    "c2": (Kind.COMMITTED, "c1"),
    "a1": (Kind.ACTIVE, "c2"),
    "a2": (Kind.ACTIVE, ""),
    "v1": (Kind.VIEW, "c2"),
    "v2": (Kind.VIEW, ""),
}


async def test_kinds_and_parents(bench: Bench) -> None:
    await base(bench)
    for key, (kind, parent) in BASE.items():
        assert await bench.snapshotter.stat(key) == Info(key, parent, kind, NOW_NS, NOW_NS, {})
    assert {info.name for info in await bench.snapshotter.walk()} == BASE.keys()


@pytest.mark.parametrize("taken", sorted(BASE))
async def test_a_key_or_name_is_taken_once(bench: Bench, taken: str) -> None:
    await base(bench)
    for call in (bench.snapshotter.prepare, bench.snapshotter.view):
        with pytest.raises(AlreadyExists, match=f"'{taken}' exists already"):
            await call(taken, "", {})
    with pytest.raises(AlreadyExists, match=f"'{taken}' exists already"):
        await bench.snapshotter.commit(taken, "a2", {})
    assert (await bench.snapshotter.stat("a2")).kind is Kind.ACTIVE


async def test_parents_are_committed(bench: Bench) -> None:
    await base(bench)
    for call in (bench.snapshotter.prepare, bench.snapshotter.view):
        with pytest.raises(NotFound, match="parent snapshot 'nowhere' does not exist"):
            await call("new", "nowhere", {})
        for parent in ("a1", "v1"):
            with pytest.raises(InvalidArgument, match=f"parent '{parent}': expected a committed"):
                await call("new", parent, {})
    with pytest.raises(NotFound):
        await bench.snapshotter.stat("new")


async def test_unknown_keys(bench: Bench) -> None:
    snapshotter = bench.snapshotter
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: snapshotter.stat("x"),
        lambda: snapshotter.usage("x"),
        lambda: snapshotter.mounts("x"),
        lambda: snapshotter.remove("x"),
        lambda: snapshotter.commit("name", "x", {}),
        lambda: snapshotter.update(Info("x", "", Kind.ACTIVE, 0, 0, {}), ["nonsense"]),
    ]
    for call in calls:
        with pytest.raises(NotFound, match="snapshot 'x' does not exist"):
            await call()


async def test_empty_key(bench: Bench) -> None:
    for call in (bench.snapshotter.prepare, bench.snapshotter.view):
        with pytest.raises(InvalidArgument, match="is empty"):
            await call("", "", {})
    await bench.snapshotter.prepare("a", "", {})
    with pytest.raises(InvalidArgument, match="is empty"):
        await bench.snapshotter.commit("", "a", {})


async def test_only_active_snapshots_are_committed(bench: Bench) -> None:
    await base(bench)
    for key in ("c2", "v1"):
        with pytest.raises(FailedPrecondition, match="expected an active snapshot"):
            await bench.snapshotter.commit("new", key, {})


async def test_committed_snapshots_have_no_mounts(bench: Bench) -> None:
    await base(bench)
    with pytest.raises(FailedPrecondition, match="'c1': expected an active snapshot or a view"):
        await bench.snapshotter.mounts("c1")


async def test_commit_frees_the_key_and_keeps_the_parent(bench: Bench) -> None:
    await base(bench)
    bench.now += 1
    await bench.snapshotter.commit("c3", "a1", {})
    later = NOW_NS + 10**9
    assert await bench.snapshotter.stat("c3") == Info("c3", "c2", Kind.COMMITTED, later, later, {})
    with pytest.raises(NotFound):
        await bench.snapshotter.stat("a1")
    await bench.snapshotter.prepare("a1", "c3", {})


async def test_commit_may_give_a_parent_but_not_change_it(bench: Bench) -> None:
    await base(bench)
    with pytest.raises(InvalidArgument, match="has the parent 'c2'"):
        await bench.snapshotter.commit("new", "a1", {}, "c1")
    with pytest.raises(NotFound, match="parent snapshot 'nowhere'"):
        await bench.snapshotter.commit("new", "a2", {}, "nowhere")
    with pytest.raises(FailedPrecondition, match="'a1' of snapshot 'a2': expected a committed"):
        await bench.snapshotter.commit("new", "a2", {}, "a1")
    await bench.snapshotter.commit("new", "a2", {}, "c2")
    await bench.snapshotter.commit("same", "a1", {}, "c2")
    assert (await bench.snapshotter.stat("new")).parent == "c2"
    assert (await bench.snapshotter.stat("same")).parent == "c2"


async def test_parents_cannot_be_removed(bench: Bench) -> None:
    await base(bench)
    for name in ("c1", "c2"):
        with pytest.raises(FailedPrecondition, match=f"cannot remove snapshot '{name}'"):
            await bench.snapshotter.remove(name)
    for key in ("v2", "v1", "a1", "a2", "c2", "c1"):
        await bench.snapshotter.remove(key)
    assert not await bench.snapshotter.walk()
    assert not list((bench.state / "snapshots").iterdir())


async def test_a_removed_key_is_free(bench: Bench) -> None:
    await bench.layer("c", "", {}, key="c-a")
    for _ in range(2):
        await bench.snapshotter.prepare("again", "c", {})
        await bench.snapshotter.remove("again")
        await bench.snapshotter.view("again", "c", {})
        await bench.snapshotter.remove("again")
    await bench.snapshotter.prepare("again", "", {})
    await bench.snapshotter.remove("c")
    await bench.snapshotter.commit("c", "again", {})


async def test_labels_are_not_inherited(bench: Bench) -> None:
    await bench.snapshotter.prepare("a", "", {"one": "1", "empty": ""})
    assert (await bench.snapshotter.stat("a")).labels == {"one": "1"}
    await bench.snapshotter.commit("c", "a", {"two": "2"})
    assert (await bench.snapshotter.stat("c")).labels == {"two": "2"}


async def test_update(bench: Bench) -> None:
    await base(bench)
    for key, (kind, parent) in BASE.items():
        bench.now += 1
        now = int(bench.now) * 10**9
        wrong = Info(key, "doesnotexist", Kind.VIEW, 7, 7, {"l1": "v1", "l2": "v2", "l3": "v3"})
        updated = await bench.snapshotter.update(wrong)
        assert updated == Info(key, parent, kind, NOW_NS, now, wrong.labels)
        assert await bench.snapshotter.stat(key) == updated
        some = updated.with_labels({"l1": "updated", "l4": "v4"})
        updated = await bench.snapshotter.update(some, ["labels.l1", "labels.l2"])
        assert updated.labels == {"l1": "updated", "l3": "v3"}
        updated = await bench.snapshotter.update(some.with_labels({"l4": "v4"}), ["labels"])
        assert updated.labels == {"l4": "v4"}
        dotted = some.with_labels({"containerd.io/gc.root": "now"})
        updated = await bench.snapshotter.update(dotted, ["labels.containerd.io/gc.root"])
        assert updated.labels == {"l4": "v4", "containerd.io/gc.root": "now"}


@pytest.mark.parametrize(
    "field",
    ["parent", "kind", "name", "created", "created_at", "updated_at", "nonsense", "", "label"],
)
async def test_other_fields_cannot_change(bench: Bench, field: str) -> None:
    await base(bench)
    info = await bench.snapshotter.stat("c2")
    with pytest.raises(InvalidArgument, match=f"cannot update field '{field}'"):
        await bench.snapshotter.update(info.with_labels({"x": "y"}), ["labels", field])
    assert await bench.snapshotter.stat("c2") == info


async def test_a_field_mask_may_name_labels_that_are_not_there(bench: Bench) -> None:
    await bench.snapshotter.prepare("a", "", {"one": "1"})
    info = await bench.snapshotter.stat("a")
    for field in ("labels.two", "labels."):
        assert (await bench.snapshotter.update(info, [field])).labels == {"one": "1"}
    emptied = await bench.snapshotter.update(info.with_labels({"one": ""}), ["labels.one"])
    assert emptied.labels == {}


async def test_a_label_without_key_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidArgument, match="the key of the label with the value 'v' is empty"):
        await bench.snapshotter.prepare("a", "", {"": "v"})
    assert not await bench.snapshotter.walk()


async def test_times_do_not_go_back_with_the_clock(bench: Bench) -> None:
    await bench.snapshotter.prepare("a", "", {})
    bench.now -= 1000
    updated = await bench.snapshotter.update((await bench.snapshotter.stat("a")).with_labels({}))
    assert (updated.created, updated.updated) == (NOW_NS, NOW_NS)
    bench.now += 2000
    updated = await bench.snapshotter.update(updated)
    assert (updated.created, updated.updated) == (NOW_NS, NOW_NS + 1000 * 10**9)


async def test_the_chain_id_in_a_label_is_no_key(bench: Bench) -> None:
    """Only a remote snapshotter answers that it has the layer already; we unpack it, as overlayfs does.

    Otherwise containerd's namespaces would share snapshots.
    """
    ref = {"containerd.io/snapshot.ref": "sha256:1"}
    await bench.layer("one/1/sha256:1", "", {"file": b"one"}, ref)
    await bench.snapshotter.prepare("two/1/extract-1 sha256:1", "", ref)
    assert (await bench.snapshotter.stat("two/1/extract-1 sha256:1")).labels == ref


async def test_what_is_made_anew_while_it_is_committed_is_not_committed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bench.path("hello", {"bin": {}})
    admit = bench.source.admit

    async def replace_key(
        paths: Collection[StorePath], shown: Collection[StorePath]
    ) -> Mapping[StorePath, int]:
        monkeypatch.setattr(bench.source, "admit", admit)
        await bench.snapshotter.remove("key")
        await bench.snapshotter.prepare("key", "", {})
        return await admit(paths, shown)

    upper = Path((await bench.snapshotter.prepare("key", "", {}))[0].source)
    bench.plant(upper, bench.placeholders(path))
    monkeypatch.setattr(bench.source, "admit", replace_key)
    with pytest.raises(Unavailable, match="snapshot 'key' was removed and made anew"):
        await bench.snapshotter.commit("name", "key", {})
    assert (await bench.snapshotter.stat("key")).kind is Kind.ACTIVE


async def test_what_is_removed_while_it_is_committed_is_not_found(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bench.path("hello", {"bin": {}})
    admit = bench.source.admit

    async def remove_key(
        paths: Collection[StorePath], shown: Collection[StorePath]
    ) -> Mapping[StorePath, int]:
        await bench.snapshotter.remove("key")
        return await admit(paths, shown)

    upper = Path((await bench.snapshotter.prepare("key", "", {}))[0].source)
    bench.plant(upper, bench.placeholders(path))
    monkeypatch.setattr(bench.source, "admit", remove_key)
    with pytest.raises(NotFound, match="'key' does not exist"):
        await bench.snapshotter.commit("name", "key", {})


async def test_a_parent_that_is_made_anew_meanwhile_is_another(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bench.path("hello", {"bin": {}})
    labels = {
        "containerd.io/snapshot/nix-layer": "true",
        "containerd.io/snapshot/nix-store-path.0": f"/nix/store/{path}",
    }
    admit = bench.source.admit

    async def replace_parent(
        paths: Collection[StorePath], shown: Collection[StorePath]
    ) -> Mapping[StorePath, int]:
        monkeypatch.setattr(bench.source, "admit", admit)
        await bench.snapshotter.remove("image")
        await bench.layer("image", "", {"file": b"new"})
        return await admit(paths, shown)

    await bench.layer("image", "", {"file": b"old"})
    monkeypatch.setattr(bench.source, "admit", replace_parent)
    with pytest.raises(Unavailable, match="parent snapshot 'image' was removed and made anew"):
        await bench.snapshotter.prepare("key", "image", labels)
    with pytest.raises(NotFound):
        await bench.snapshotter.stat("key")


async def test_labels_have_a_limit(bench: Bench) -> None:
    label = {"k" * 96: "v" * 4000}
    await bench.snapshotter.prepare("a", "", label)
    too_long = {"k" * 97: "v" * 4000}
    with pytest.raises(InvalidArgument, match="at most 4096 bytes with its value, got 4097"):
        await bench.snapshotter.prepare("b", "", too_long)
    with pytest.raises(InvalidArgument, match="at most 4096"):
        await bench.snapshotter.commit("c", "a", too_long)
    info = await bench.snapshotter.stat("a")
    with pytest.raises(InvalidArgument, match="at most 4096"):
        await bench.snapshotter.update(info.with_labels(too_long))
    assert (await bench.snapshotter.stat("a")).labels == label


async def test_walk_takes_what_matches(bench: Bench) -> None:
    await base(bench)
    views = await bench.snapshotter.walk(lambda info: info.kind is Kind.VIEW)
    assert [info.name for info in views] == ["v1", "v2"]


async def test_usage(bench: Bench, upper: Callable[..., Path]) -> None:
    directory = upper(await bench.snapshotter.prepare("a", "", {}))
    empty = await bench.snapshotter.usage("a")
    (directory / "data").write_bytes(bytes(100_000))
    (directory / "same").hardlink_to(directory / "data")
    (directory / "link").symlink_to("/etc")
    used = await bench.snapshotter.usage("a")
    assert used.inodes == empty.inodes + 2 == 3
    assert 100_000 <= used.size - empty.size < 120_000
    await bench.snapshotter.commit("c", "a", {})
    assert await bench.snapshotter.usage("c") == used
    (bench.state / "snapshots").rename(bench.state / "elsewhere")  # it is not counted again
    assert await bench.snapshotter.usage("c") == used
    (bench.state / "elsewhere").rename(bench.state / "snapshots")
    await bench.snapshotter.view("v", "c", {})
    assert (await bench.snapshotter.usage("v")).size == 0


async def test_a_hundred_prepares_at_once(bench: Bench) -> None:
    await bench.layer("c", "", {"file": b"x"}, key="c-a")
    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(bench.snapshotter.prepare, f"key {number}", "c", {})
    assert len(await bench.snapshotter.walk()) == 101
    assert len(list((bench.state / "snapshots").iterdir())) == 101


async def test_one_of_many_gets_a_key(bench: Bench) -> None:
    outcomes = []

    async def prepare() -> None:
        try:
            await bench.snapshotter.prepare("key", "", {})
            outcomes.append("made")
        except AlreadyExists:
            outcomes.append("there already")

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(prepare)
    assert sorted(outcomes) == ["made"] + ["there already"] * 19
    assert len(list((bench.state / "snapshots").iterdir())) == 1
