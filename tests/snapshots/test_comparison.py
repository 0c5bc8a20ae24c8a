"""Which layer lies between the mounts of two states, and what it changes."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fusesnap.errors import NotOurs
from fusesnap.snapshots.comparison import Comparer
from fusesnap.snapshots.interface import Mount

PAGE = 4096
Bench = Any


@pytest.fixture
def comparer(bench: Bench) -> Comparer:
    return Comparer(bench.state, bench.metastore)


def members(comparer: Comparer, left: Sequence[Mount], right: Sequence[Mount]) -> list[str]:
    before = descriptors()
    data = b"".join(comparer.layer_tar(comparer.comparison(left, right), None))
    assert descriptors() == before
    assert "compare-" not in Path("/proc/self/mountinfo").read_text()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getnames()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_of_a_container_what_it_wrote(bench: Bench, comparer: Comparer) -> None:
    await bench.layer("one", "", {"etc": {"a": b"a"}, "keep": b"keep"})
    await bench.layer("two", "one", {"etc": {"b": b"b"}})
    right = await bench.snapshotter.prepare("container", "two", {})
    root = bench.mounts.mount(right)
    (root / "etc/a").unlink()
    (root / "etc/c").write_bytes(b"c")
    left = await bench.snapshotter.view("view", "two", {})
    assert members(comparer, left, right) == ["etc", "etc/.wh.a", "etc/c"]


@pytest.mark.parametrize("committed", [False, True])
async def test_of_a_container_of_a_nix_image_what_it_wrote(
    bench: Bench, comparer: Comparer, *, committed: bool
) -> None:
    hello = bench.path(
        "hello", {"bin": {"hello": b"hello", "other": b"other"}}, committed=committed
    )
    config = bench.path("config", b"config", committed=committed)
    await bench.layer("one", "", {"etc": {"a": b"a"}})
    await bench.nix_layer("two", "one", hello, config)
    right = await bench.snapshotter.prepare("container", "two", {})
    root = bench.mounts.mount(right)
    store = root / "nix/store"
    (store / hello.base_name / "bin/hello").unlink()
    (store / hello.base_name / "bin/mine").write_bytes(b"mine")
    if not committed:  # what there is to show is another by now
        bench.store.commit(hello, bench.source.contents[hello])
        bench.store.commit(config, bench.source.contents[config])
    left = await bench.snapshotter.view("view", "two", {})
    path = f"nix/store/{hello.base_name}"
    assert members(comparer, left, right) == [
        "nix",
        "nix/store",
        path,
        f"{path}/bin",
        f"{path}/bin/.wh.hello",
        f"{path}/bin/mine",
    ]


async def test_of_committed_layers_what_came_with_them(bench: Bench, comparer: Comparer) -> None:
    hello = bench.path("hello", {"bin": {"hello": b"hello"}}, committed=True)
    await bench.layer("one", "", {"etc": {"a": b"a"}})
    await bench.nix_layer("two", "one", hello)
    added = {"nix": {"store": {hello.base_name: {"bin": {"mine": b"mine"}}}}}
    await bench.layer("three", "two", added)
    views = [
        await bench.snapshotter.view(f"view of {name}", name, {})
        for name in ("", "one", "two", "three")
    ]
    path = f"nix/store/{hello.base_name}"
    assert members(comparer, views[0], views[1]) == ["etc", "etc/a"]
    assert members(comparer, [], views[1]) == ["etc", "etc/a"]
    # A layer that stands for store paths is what it came as; one that adds to them has nothing that it did not add.
    assert members(comparer, views[1], views[2]) == ["nix", "nix/store", path]
    assert members(comparer, views[2], views[3]) == [
        "nix",
        "nix/store",
        path,
        f"{path}/bin",
        f"{path}/bin/mine",
    ]


async def test_more_layers_than_a_page_has_room_for_by_their_names(
    bench: Bench, comparer: Comparer
) -> None:
    parent = ""
    for number in range(100):
        parent = await bench.layer(f"layer {number}", parent, {f"file-{number}": b""})
    right = await bench.snapshotter.prepare("container", parent, {})
    left = await bench.snapshotter.view("view", parent, {})
    assert len(",".join(left[0].options)) > PAGE
    (written,) = [word[len("upperdir=") :] for word in right[0].options if "upperdir=" in word]
    (Path(written) / "mine").write_bytes(b"mine")
    assert members(comparer, left, right) == ["mine"]


async def test_other_mounts_are_left_to_others(
    bench: Bench, comparer: Comparer, tmp_path: Path
) -> None:
    await bench.layer("one", "", {"a": b"a"})
    await bench.layer("two", "one", {"b": b"b"})
    await bench.layer("beside", "one", {"c": b"c"})
    one, two, beside = [
        await bench.snapshotter.view(f"view of {name}", name, {})
        for name in ("one", "two", "beside")
    ]
    foreign = Mount("bind", str(tmp_path), ("ro", "rbind"))
    device = Mount("ext4", "/dev/sda", ())
    for left, right in (
        (two, one),  # the wrong way round
        (one, one),
        (beside, two),
        ([], two),  # two layers at once
        ([foreign], one),
        (one, [foreign]),
        (one, [device]),
        (one, [*two, *two]),
        ([mapped(one[0])], two),
    ):
        with pytest.raises(NotOurs):
            comparer.comparison(left, right)
    with pytest.raises(NotOurs, match="labels"):
        members(comparer, one, [mapped(two[0])])


def mapped(mount: Mount) -> Mount:
    return Mount(mount.type, mount.source, (*mount.options, "uidmap=0:1:1", "gidmap=0:1:1"))


async def test_a_snapshots_key_begins_with_containerds_namespace(
    bench: Bench, comparer: Comparer
) -> None:
    await bench.layer("k8s.io/2/sha256:x", "", {"a": b"a"})
    empty = await bench.snapshotter.view("k8s.io/3/view", "", {})
    right = await bench.snapshotter.view("k8s.io/4/view", "k8s.io/2/sha256:x", {})
    assert comparer.namespace(comparer.comparison(empty, right)) == "k8s.io"
    await bench.layer("plain", "", {"a": b"a"})
    right = await bench.snapshotter.view("k8s.io/5/view", "plain", {})
    with pytest.raises(NotOurs, match="namespace"):
        comparer.namespace(comparer.comparison(empty, right))


def test_what_a_killed_process_has_left_mounted_goes(bench: Bench, comparer: Comparer) -> None:
    gone = 2**22 + 1  # no process has that number (proc(5), pid_max)
    left = bench.state / f"compare-{gone}-left"
    another = bench.state / f"compare-{os.getpid()}-another"
    for directory in (left, another, bench.state / f"compare-{gone}-empty"):
        directory.mkdir()
    subprocess.run(["mount", "--bind", bench.state / "snapshots", left], check=True)
    Comparer(bench.state, bench.metastore)
    assert list(bench.state.glob("compare-*")) == [another]
    assert (bench.state / "snapshots").is_dir()
    assert str(left) not in Path("/proc/self/mountinfo").read_text()
    del comparer
