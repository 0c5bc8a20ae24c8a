"""Images without Nix: what containerd's own overlayfs snapshotter would mount, and what is seen then."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fusesnap.errors import InvalidConfiguration
from fusesnap.snapshots.interface import Mount
from fusesnap.snapshots.overlay import OverlayOptions, check_root

if TYPE_CHECKING:
    from tests.snapshots.conftest import Bench


async def test_mounts_are_those_of_overlayfs(bench: Bench) -> None:
    snapshots = bench.state / "snapshots"
    kernel = OverlayOptions.of_kernel().common

    def fs(id_: int) -> str:
        return f"{snapshots}/{id_}/fs"

    bottom = Mount("bind", fs(1), ("rw", "rbind"))
    assert await bench.snapshotter.prepare("first", "", {}) == (bottom,)
    assert await bench.snapshotter.mounts("first") == (bottom,)
    await bench.snapshotter.commit("one", "first", {})
    empty_view = Mount("bind", fs(2), ("ro", "rbind"))
    assert await bench.snapshotter.view("nothing", "", {}) == (empty_view,)
    one_layer = Mount("bind", fs(1), ("ro", "rbind"))
    assert await bench.snapshotter.view("single", "one", {}) == (one_layer,)
    assert await bench.snapshotter.mounts("single") == (one_layer,)
    work = f"workdir={snapshots}/4/work"
    above = Mount("overlay", "overlay", (work, f"upperdir={fs(4)}", f"lowerdir={fs(1)}", *kernel))
    assert await bench.snapshotter.prepare("second", "one", {}) == (above,)
    await bench.snapshotter.commit("two", "second", {})
    both = Mount("overlay", "overlay", (f"lowerdir={fs(4)}:{fs(1)}", *kernel))
    assert await bench.snapshotter.view("both", "two", {}) == (both,)
    assert await bench.snapshotter.mounts("both") == (both,)


def test_options_follow_the_kernel(tmp_path: Path) -> None:
    assert OverlayOptions.of_kernel(tmp_path).common == ()
    (tmp_path / "index").touch()
    assert OverlayOptions.of_kernel(tmp_path).common == ("index=off",)


@pytest.mark.parametrize("root", ["/with,comma", "/with:colon", "/with\\backslash", "relative"])
def test_roots_that_mount_options_cannot_name(root: str) -> None:
    with pytest.raises(InvalidConfiguration, match="expected an absolute path"):
        check_root(Path(root))


async def test_layers_merge(bench: Bench) -> None:
    await bench.layer("one", "", {"foo": b"foo", "a": {"b": {"c": {}}}, "lib": {"hidden": b""}})
    await bench.layer("two", "one", {"bar": b"bar", "foo": b"new", "a": {"b": None}})
    await bench.layer("three", "two", {"lib": [{"shown": b""}]})
    merged = {"a": {}, "bar": b"bar", "foo": b"new", "lib": {"shown": b""}}
    assert bench.look(await bench.run("container", "three")) == merged
    assert bench.look(await bench.show("view", "three")) == merged


async def test_what_a_container_writes_is_its_own_until_committed(bench: Bench) -> None:
    await bench.layer("image", "", {"etc": {"hosts": b"old"}, "gone": b""})
    root = await bench.run("container", "image")
    (root / "etc" / "hosts").write_bytes(b"new")
    (root / "gone").unlink()
    (root / "hard").hardlink_to(root / "etc" / "hosts")
    untouched = await bench.show("view", "image")
    assert bench.look(untouched) == {"etc": {"hosts": b"old"}, "gone": b""}
    bench.mounts.unmount(root)
    await bench.snapshotter.commit("changed", "container", {})
    shown = await bench.show("after", "changed")
    assert bench.look(shown) == {"etc": {"hosts": b"new"}, "hard": b"new"}


async def test_a_mounted_snapshot_can_be_committed(bench: Bench) -> None:
    root = await bench.run("key", "")
    (root / "foo").write_bytes(b"foo")
    await bench.snapshotter.commit("name", "key", {})
    assert bench.look(await bench.show("view", "name")) == {"foo": b"foo"}


async def test_views_are_read_only(bench: Bench) -> None:
    await bench.layer("one", "", {"file": b""})
    await bench.layer("two", "one", {})
    for parent in ("", "one", "two"):
        root = await bench.show(f"view of {parent}", parent)
        with pytest.raises(OSError, match="Read-only") as caught:
            (root / "new").touch()
        assert caught.value.errno == errno.EROFS


async def test_the_root_has_the_parents_owner_and_containerds_mode(
    bench: Bench, upper: Callable[..., Path]
) -> None:
    mask = os.umask(0o077)
    try:
        first = upper(await bench.snapshotter.prepare("first", "", {}))
        assert stat.S_IMODE(first.stat().st_mode) == 0o755
        os.chown(first, 12, 34)
        await bench.snapshotter.commit("one", "first", {})
        second = upper(await bench.snapshotter.prepare("second", "one", {}))
    finally:
        os.umask(mask)
    status = second.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o755, 12, 34)
    assert stat.S_IMODE((second.parent / "work").stat().st_mode) == 0o711


async def test_deep_chains(bench: Bench, lowers: Callable[..., list[Path]]) -> None:
    """128 layers, as many as containerd's suite has: together they must fit into the page that mount(2) takes."""
    name = ""
    for number in range(128):
        name = await bench.layer(f"{number}", name, {f"file{number}": b"", "same": b"%d" % number})
    mounts = await bench.snapshotter.prepare("container", name, {})
    directories = lowers(mounts)
    assert len(directories) == 128
    # containerd changes into the common directory, and gives what is left of the names.
    relative = ":".join(str(path.relative_to(bench.state)) for path in directories)
    assert len(relative) < 4096 - 512


async def test_no_directory_of_the_image_is_reserved(bench: Bench) -> None:
    await bench.layer("one", "", {".fusesnap-store": {"x": b""}})
    await bench.layer("two", "one", {".fusesnap-lazy": b"file"})
    shown = bench.look(await bench.run("container", "two"))
    assert shown == {".fusesnap-store": {"x": b""}, ".fusesnap-lazy": b"file"}
