"""What is left on disk: after Remove, after a crash, of farms that nobody uses; and what the kernel says is mounted."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fusesnap.errors import AlreadyExists, StorageFailure, Unsupported
from fusesnap.nix.tree import STORE_MTIME_NS
from fusesnap.snapshots.directories import Directories, remove_tree
from fusesnap.snapshots.farms import DirectoryMetadata, Farm, Farms, read_metadata
from fusesnap.snapshots.interface import Kind
from fusesnap.snapshots.metastore import Metastore
from fusesnap.snapshots.mountinfo import overlay_mounts, parse
from fusesnap.snapshots.records import Generation
from fusesnap.snapshots.usage import disk_usage

if TYPE_CHECKING:
    from tests.snapshots.conftest import Bench

TREE = {"bin": {"tool": b"tool"}}


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


# Snapshots' directories


async def test_recovery_removes_what_no_row_owns(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.layer("image", "", {"file": b"x"})
    await bench.snapshotter.prepare("container", "image", {})
    bench.close()
    for leftover in ("new-1", "rm-2", "77"):
        bench.plant(bench.state / "snapshots" / leftover, {"fs": {"file": b""}, "work": {}})
    bench.plant(bench.state / "farms" / "new-1", {"nix": {}})
    bench.plant(bench.state / "farms" / "0123", {"nix": {}})
    bench.open()
    await bench.snapshotter.recover()
    await bench.snapshotter.remove_leftovers()
    assert names(bench.state / "snapshots") == {"1", "2"}
    assert not names(bench.state / "farms")
    assert caplog.text.count("which no snapshot owns") == 4
    assert f"removed {bench.state}/farms/new-1, which was being built" in caplog.text
    assert f"removed {bench.state}/snapshots/77, which no snapshot owns" in caplog.text
    assert bench.look(await bench.show("view", "image")) == {"file": b"x"}


async def test_what_cannot_be_removed_at_the_start_is_told_and_kept_for_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise StorageFailure("no space", errno.ENOSPC)

    bench.plant(bench.state / "snapshots" / "77", {"fs": {}})
    with monkeypatch.context() as patch:
        patch.setattr(Directories, "set_orphans_aside", full)
        await bench.snapshotter.remove_leftovers()
    assert "no space" in caplog.text
    await bench.snapshotter.cleanup()
    assert not names(bench.state / "snapshots")


async def test_recovery_tells_of_missing_directories(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.layer("image", "", {})
    (bench.state / "snapshots" / "1").rename(bench.state / "elsewhere")
    await bench.snapshotter.recover()
    assert f"{bench.state}/snapshots/1/fs of a snapshot is missing" in caplog.text


@pytest.mark.parametrize("value", [None, b"n"])
async def test_a_store_that_is_not_opaque_is_refused(bench: Bench, value: bytes | None) -> None:
    if value is None:
        os.removexattr(bench.store.real, "trusted.overlay.opaque")
    else:
        os.setxattr(bench.store.real, "trusted.overlay.opaque", value)
    with pytest.raises(Unsupported, match=r"fusesnap-store: expected .*trusted\.overlay\.opaque"):
        await bench.snapshotter.recover()


async def test_a_failed_prepare_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.layer("image", "", {})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "chown", full)
        with pytest.raises(StorageFailure, match="No space left on device") as caught:
            await bench.snapshotter.prepare("key", "image", {})
    assert caught.value.errno == errno.ENOSPC
    assert names(bench.state / "snapshots") == {"1"}
    await bench.snapshotter.prepare("key", "image", {})


async def test_a_rolled_back_id_comes_again(bench: Bench) -> None:
    """The directory of a transaction that never was committed does not stand in the way of the next."""
    bench.plant(bench.state / "snapshots" / "1", {"fs": {"old": b""}})
    assert bench.look(await bench.run("key", "")) == {}
    await bench.snapshotter.cleanup()
    assert names(bench.state / "snapshots") == {"1"}


async def test_ids_are_never_reused(bench: Bench) -> None:
    for number in range(3):
        mounts = await bench.snapshotter.prepare("key", "", {})
        assert mounts[0].source == str(bench.state / "snapshots" / str(number + 1) / "fs")
        await bench.snapshotter.remove("key")


def test_several_may_remove_the_same_directory(tmp_path: Path) -> None:
    for number in range(20):
        top = tmp_path / str(number)
        for name in ("a", "b", "c"):
            (top / name / "1/2/3/4").mkdir(parents=True)
            (top / name / "1/file").touch()
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(remove_tree, [top] * 4))
        assert not top.exists()


async def test_removal_survives_what_cannot_be_removed(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    root = await bench.run("key", "")
    (root / "inside").mkdir()
    bench.plant(bench.state / "elsewhere", {})
    inside = bench.state / "snapshots" / "1" / "fs" / "inside"
    (mount,) = await bench.snapshotter.view("other", "", {})
    bench.mounts.mount_at(mount, inside)
    await bench.snapshotter.remove("key")
    assert "Device or resource busy" in caplog.text
    assert [info.name for info in await bench.snapshotter.walk()] == ["other"]
    bench.mounts.close()
    await bench.snapshotter.cleanup()
    assert names(bench.state / "snapshots") == {"2"}


def test_trees_deeper_than_a_path_can_be(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    (top / "file").touch()
    descriptor = os.open(top, os.O_DIRECTORY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_DIRECTORY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    remove_tree(top)
    assert not top.exists()
    remove_tree(top)  # there already, so to say


def test_usage_stays_on_one_file_system_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/")
    assert disk_usage(tmp_path).inodes == 2


def test_usage_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageFailure, match="cannot measure"):
        disk_usage(tmp_path / "nothing")


def test_a_directory_is_whole_or_not_there(tmp_path: Path) -> None:
    directories = Directories(tmp_path / "snapshots")
    with pytest.raises(StorageFailure):
        directories.create(2, Kind.ACTIVE, parent=1)  # there is no such parent
    assert not names(tmp_path / "snapshots")


# The metastore


def test_another_versions_metastore_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "db")
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(Unsupported, match="has version 2, expected 1"):
        Metastore(tmp_path / "db")


def test_a_transaction_is_all_or_nothing(tmp_path: Path) -> None:
    metastore = Metastore(tmp_path / "db")
    with pytest.raises(AlreadyExists), metastore.writing() as transaction:
        transaction.create(Kind.ACTIVE, "a", "", {}, 1)
        transaction.create(Kind.ACTIVE, "a", "", {}, 1)
    with metastore.reading() as transaction:
        assert not list(transaction.snapshots())
    metastore.close()
    metastore.close()


def test_two_processes_share_a_metastore(tmp_path: Path) -> None:
    first, second = Metastore(tmp_path / "db"), Metastore(tmp_path / "db", wait_seconds=0)
    with first.writing() as transaction:
        transaction.create(Kind.ACTIVE, "a", "", {}, 1)
        with second.reading() as other:
            assert not list(other.snapshots())
        with pytest.raises(StorageFailure, match="locked") as caught, second.writing():
            pass
        assert caught.value.errno == errno.EBUSY
    with second.writing() as transaction:
        assert transaction.snapshot("a").id == 1
    first.close()
    second.close()


def test_one_turn_at_a_time(tmp_path: Path) -> None:
    metastore = Metastore(tmp_path / "db", wait_seconds=0.001)
    with metastore.writing():
        with pytest.raises(StorageFailure, match="no turn within"), metastore.writing():
            pass
        with metastore.reading() as transaction:
            assert transaction.ids() == set()
    metastore.close()


def test_damage_is_told(tmp_path: Path) -> None:
    (tmp_path / "db").write_bytes(b"not a database" * 100)
    with pytest.raises(StorageFailure, match="not a database"):
        Metastore(tmp_path / "db")


def test_generations_are_kept_in_order(tmp_path: Path) -> None:
    metastore = Metastore(tmp_path / "db")
    full = Generation("a", "b", Path("/view"), Path("/lazy"))
    plain = Generation("a", None, None, None)
    with metastore.writing() as transaction:
        id_ = transaction.create(Kind.ACTIVE, "key", "", {}, 1).id
        for generation in (full, plain, full):
            transaction.add_generation(id_, generation)
        assert transaction.generations(id_) == [plain, full]
        assert transaction.farms() == {"a", "b"}
        assert transaction.files_views() == {Path("/view")}
        transaction.set_generation(id_, plain)
        assert transaction.generations(id_) == [plain]
        transaction.remove("key")
        assert transaction.farms() == set()
    metastore.close()


# Farms


def farm(store: Path, *directories: str, files: tuple[str, ...] = ()) -> Farm:
    parents = (
        ("", DirectoryMetadata(0o700)),
        ("nix", DirectoryMetadata()),
        ("nix/store", DirectoryMetadata(0o1775)),
    )
    return Farm(parents, ".fusesnap-store", directories, files, store)


def test_a_farm(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "file").write_bytes(b"file")
    (tmp_path / "store" / "link").symlink_to("target")
    farms = Farms(tmp_path / "farms")
    mask = os.umask(0o077)
    try:
        key = farms.ensure(farm(tmp_path / "store", "dir", files=("file", "link")))
    finally:
        os.umask(mask)
    top = farms.path(key)
    assert names(top) == {".fusesnap-store", "nix"}
    whiteout = (top / ".fusesnap-store").lstat()
    assert stat.S_ISCHR(whiteout.st_mode)
    assert whiteout.st_rdev == 0
    directory = top / "nix/store/dir"
    assert os.getxattr(directory, "trusted.overlay.redirect") == b"/.fusesnap-store/dir"
    assert (stat.S_IMODE(directory.stat().st_mode), directory.stat().st_mtime_ns) == (
        0o555,
        STORE_MTIME_NS,
    )
    assert (top / "nix/store/file").samefile(tmp_path / "store" / "file")
    assert str((top / "nix/store/link").readlink()) == "target"
    modes = [stat.S_IMODE((top / name).stat().st_mode) for name in ("", "nix", "nix/store")]
    assert modes == [0o700, 0o755, 0o1775]
    before = top.stat()
    assert farms.ensure(farm(tmp_path / "store", "dir", files=("file", "link"))) == key
    assert top.stat() == before


def test_farms_are_named_by_all_that_is_in_them(tmp_path: Path) -> None:
    one = farm(tmp_path, "a", "b")
    other_look = (("", DirectoryMetadata()), *one.parents[1:])
    different = [
        farm(tmp_path, "a"),
        farm(tmp_path, "a", files=("b",)),
        farm(tmp_path, files=("a", "b")),
        Farm(one.parents, ".fusesnap-lazy", one.directories, content=tmp_path),
        Farm(other_look, one.reserved, one.directories, content=tmp_path),
    ]
    assert len({one.key, *(two.key for two in different)}) == 6
    assert farm(tmp_path, "a", "b").key == one.key


def test_a_farm_that_cannot_be_built_leaves_nothing(tmp_path: Path) -> None:
    farms = Farms(tmp_path / "farms")
    with pytest.raises(StorageFailure, match="cannot build"):
        farms.ensure(farm(tmp_path, files=("missing",)))
    assert not names(tmp_path / "farms")


def test_metadata_is_the_topmost_layers(tmp_path: Path) -> None:
    for layer in ("top", "middle", "bottom"):
        (tmp_path / layer / "nix/store").mkdir(parents=True)
    (tmp_path / "top/nix/store").rmdir()
    (tmp_path / "middle/nix").chmod(0o711)
    (tmp_path / "middle/nix/store").chmod(0o700)
    layers = [tmp_path / layer for layer in ("top", "middle", "bottom")]
    assert read_metadata(layers, "nix").mode == 0o755
    assert read_metadata(layers, "nix/store").mode == 0o700
    (tmp_path / "top/nix/store").symlink_to("/etc")
    assert read_metadata(layers, "nix/store") == DirectoryMetadata()
    (tmp_path / "top/nix/store").unlink()
    (tmp_path / "top/nix").rmdir()
    (tmp_path / "top/nix").symlink_to("/")
    assert read_metadata(layers, "nix/store") == DirectoryMetadata()
    assert read_metadata([], "nix") == DirectoryMetadata()


async def test_farms_go_with_their_last_user(
    bench: Bench, lowers: Callable[..., list[Path]]
) -> None:
    tool = bench.path("tool", TREE)
    await bench.nix_layer("image", "", tool)
    await bench.layer("plain", "image", {})
    cold = lowers(await bench.snapshotter.prepare("cold", "image", {}))
    bench.store.commit(tool, TREE)
    warm = lowers(await bench.snapshotter.prepare("warm", "image", {}))
    lazy_farm, closure_farm = cold[0].name, warm[0].name
    assert names(bench.state / "farms") == {lazy_farm, closure_farm}
    assert await bench.snapshotter.files_views() == set()
    await bench.snapshotter.remove("warm")
    assert names(bench.state / "farms") == {lazy_farm, closure_farm}
    await bench.snapshotter.remove("cold")
    # The image keeps the farm of its newest container, so that the next one need not wait for it.
    assert names(bench.state / "farms") == {closure_farm}
    await bench.snapshotter.remove("plain")
    await bench.snapshotter.remove("image")
    assert not names(bench.state / "farms")


async def test_a_mounted_farm_stays(bench: Bench) -> None:
    """Also where its snapshot is gone: the kernel still looks things up in it."""
    tool = bench.path("tool", TREE, committed=True)
    await bench.nix_layer("image", "", tool)
    root = await bench.show("view", "image")
    await bench.snapshotter.remove("view")
    await bench.snapshotter.remove("image")
    assert len(names(bench.state / "farms")) == 1
    assert bench.look(root / "nix/store") == {tool.base_name: TREE}
    bench.mounts.unmount(root)
    await bench.snapshotter.cleanup()
    assert not names(bench.state / "farms")


async def test_a_farm_that_was_removed_while_planned_is_built_again(bench: Bench) -> None:
    await bench.nix_layer("image", "", bench.path("tool", TREE, committed=True))
    original = bench.snapshotter._build
    calls: list[object] = []

    def build(plan: object) -> None:
        original(plan)  # type: ignore[arg-type]
        if not calls:  # another snapshot's removal comes between the two
            for farm_ in (bench.state / "farms").iterdir():
                remove_tree(farm_)
        calls.append(plan)

    bench.snapshotter._build = build  # type: ignore[method-assign]
    root = await bench.run("container", "image")
    assert len(calls) == 2
    assert (root / "nix/store").is_dir()


async def test_unfinished_farms_of_the_living_stay(bench: Bench) -> None:
    building = bench.state / "farms" / "new-1"
    building.mkdir()
    descriptor = os.open(building, os.O_DIRECTORY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    await bench.snapshotter.recover()
    assert building.exists()
    os.close(descriptor)
    await bench.snapshotter.recover()
    assert not building.exists()


# mountinfo


def test_mountinfo_is_unescaped() -> None:
    text = (
        b"36 35 98:0 / /mnt rw - ext4 /dev/root rw\n"
        b"37 36 0:53 / /run/x rw,relatime shared:1 - overlay overlay rw,lowerdir=farms/abc:layer,"
        b"upperdir=/st\\040ate\\054x/1/fs,workdir=/st\\040ate\\054x/1/work,redirect_dir=follow\n"
        b"38 36 0:54 / /run/y ro - overlay overlay ro,lowerdir=farms/def:layer\n"
    )
    first, second = parse(text)
    assert first.upper == "/st ate,x/1/fs"
    assert first.names_all(("abc", "layer"))
    assert not first.names_all(("abc", "def"))
    assert second.upper is None
    assert second.names_all(("def",))


@pytest.mark.parametrize(
    ("lowers", "expected"),
    [
        ("/s/farms/1:/s/layer:/s/lazy/layer:/s/snapshots/1/fs", True),
        ("farms/1:layer:lazy/views/7:snapshots/1/fs", True),
        ("/s/idmapped/4/state/farms/1:/s/idmapped/4/lazy/layer", True),
        ("state/farms/1:lazy/layer:state/snapshots/1/fs", True),
        ("idmapped/4/state/farms/1:idmapped/4/lazy/layer", True),
        ("/s/farms/1:/s/layer:/s/snapshots/1/fs", False),
        ("/s/idmapped/4/state/farms/1:/s/idmapped/4/state/layer", False),
        ("/s/lazy-other/layer:/other/lazy/layer", False),
    ],
)
def test_a_mount_on_fuse_is_known_however_it_names_its_layers(lowers: str, expected: bool) -> None:
    line = f"1 2 0:3 / /mnt rw - overlay overlay rw,lowerdir={lowers},upperdir=/u,workdir=/w"
    (mount,) = parse(line.encode())
    assert mount.has_layer_below(Path("/s/lazy")) is expected


async def test_the_kernels_own_mountinfo(bench: Bench) -> None:
    await bench.layer("one", "", {})
    await bench.run("key", "one")
    uppers = [mount.upper for mount in overlay_mounts()]
    assert str(bench.state / "snapshots/2/fs") in uppers


async def test_removal_does_not_fail_for_what_it_leaves(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.nix_layer("image", "", bench.path("tool", TREE, committed=True))
    await bench.snapshotter.prepare("key", "image", {})

    def fail() -> None:
        raise StorageFailure("cannot read mountinfo", errno.EIO)

    with monkeypatch.context() as patch:
        patch.setattr("fusesnap.snapshots.leftovers.overlay_mounts", fail)
        await bench.snapshotter.remove("key")
        await bench.snapshotter.remove("image")  # the last that refers to the farm
    assert "cannot read mountinfo" in caplog.text
    assert not await bench.snapshotter.walk()
    await bench.snapshotter.cleanup()
    assert not names(bench.state / "snapshots")
