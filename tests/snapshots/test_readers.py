"""Who reads from which snapshot, and that Remove ends it first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fusesnap.errors import NotFound, StorageFailure
from fusesnap.snapshots.mountinfo import parse, root_upper

if TYPE_CHECKING:
    from tests.snapshots.conftest import Bench

LINE = "30 20 0:40 / {} rw,relatime - {} overlay rw,lowerdir={},upperdir={},workdir=/w,index=off\n"


def mount_line(lowers: str, upper: str = "/s/7/fs", at: str = "/", kind: str = "overlay") -> str:
    return LINE.format(at, kind, lowers, upper)


@pytest.mark.parametrize(
    ("lowers", "depends"),
    [
        ("/state/farms/a:/state/layer:/state/snapshots/1/fs", False),
        ("/state/farms/a:/state/lazy/views/3:/state/layer", True),
        ("/state/farms/a:/state/layer:/state/lazy/layer:/state/snapshots/1/fs", True),
        ("farms/a:lazy/layer:snapshots/1/fs", True),  # containerd has shortened them
        ("/state/lazyness/layer:/other/lazy/layer", False),
    ],
)
def test_which_mounts_have_fuse_in_them(lowers: str, depends: bool) -> None:
    (mount,) = parse(mount_line(lowers).encode())
    assert mount.lowers == tuple(lowers.split(":"))
    assert mount.has_layer_below(Path("/state/lazy")) is depends


def test_the_upper_directory_of_a_root(tmp_path: Path) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(mount_line("/a", "/s/1/fs", "/mnt") + mount_line("/a:/b", "/s/2/fs"))
    assert root_upper(mountinfo) == "/s/2/fs"
    # Mounted over: the last one is what shows.
    mountinfo.write_text(mountinfo.read_text() + mount_line("/a", "/s/3/fs"))
    assert root_upper(mountinfo) == "/s/3/fs"
    mountinfo.write_text(mount_line("/a", kind="ext4") + mount_line("/a", at="/mnt"))
    assert root_upper(mountinfo) is None
    mountinfo.write_text("")
    assert root_upper(mountinfo) is None


def test_a_process_that_is_gone_has_no_root(tmp_path: Path) -> None:
    with pytest.raises(StorageFailure):
        root_upper(tmp_path / "mountinfo")
    assert root_upper(Path(f"/proc/{os.getpid()}/mountinfo")) != "/s/1/fs"


async def test_active_snapshots_are_known_by_their_upper_directories(bench: Bench) -> None:
    await bench.layer("image", "", {"file": b"x"})
    await bench.snapshotter.prepare("default/2/one", "image", {})
    await bench.snapshotter.view("default/3/view", "image", {})
    (upper,) = await bench.snapshotter.uppers()
    assert await bench.snapshotter.uppers() == {upper: "default/2/one"}


async def test_remove_ends_the_readers_of_an_active_snapshot_first(bench: Bench) -> None:
    tool = bench.path("tool", {"bin": {"tool": b"tool"}})
    await bench.nix_layer("image", "", tool)
    await bench.snapshotter.prepare("one", "image", {})
    await bench.snapshotter.view("view", "image", {})
    (upper,) = await bench.snapshotter.uppers()
    await bench.snapshotter.remove("one")
    assert bench.released == [upper]
    assert await bench.snapshotter.uppers() == {}
    bench.store.commit(tool, {"bin": {"tool": b"tool"}})
    await bench.snapshotter.prepare("complete", "image", {})
    # The first two have no processes of their own, and the last has no layer that somebody could wait for.
    for key in ("view", "complete", "image"):
        await bench.snapshotter.remove(key)
    assert bench.released == [upper]
    with pytest.raises(NotFound):
        await bench.snapshotter.remove("one")
