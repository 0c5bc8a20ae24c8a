"""Snapshots of containers with user namespaces, mounted for real as containerd 2 mounts them."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fusesnap.errors import InvalidArgument, NotFound, Unsupported
from fusesnap.snapshots.id_mapping import GID_LABEL, UID_LABEL, IdMapping
from fusesnap.snapshots.idmapped import clones
from fusesnap.snapshots.interface import Mount

if TYPE_CHECKING:
    from tests.snapshots.conftest import Bench

GLIBC = {"lib": {"libc.so": b"\x7fELF"}}
CONFIG = b"a single file"
ROOT = (100_000, 200_000)
LABELS = {UID_LABEL: "0:100000:65536", GID_LABEL: "0:200000:65536"}
OPTIONS = ("uidmap=0:100000:65536", "gidmap=0:200000:65536")
DIGEST = "sha256:" + "0123456789abcdef" * 4


def owner(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid


def owners(root: Path) -> set[tuple[int, int]]:
    """Whose everything is that one finds."""
    return {owner(root)} | {
        owner(Path(where) / name)
        for where, directories, files in os.walk(root)
        for name in (*directories, *files)
    }


def mount_mapped(bench: Bench, mounts: Sequence[Mount]) -> Path:
    """Mount as containerd 2.1: it maps a clone of the directory that all lowers have in common (``mount_linux.go``)."""
    (mount,) = mounts
    assert mount.options[:2] == OPTIONS
    rest = mount.options[2:]
    (lower,) = [word for word in rest if word.startswith("lowerdir=")]
    lowers = lower.removeprefix("lowerdir=").split(":")
    common = os.path.commonpath(lowers)
    place = bench.state.parent / "mapped"
    with clones({"common": Path(common)}, IdMapping.from_root(*ROOT)) as made:
        made.attach(place)
    seen = "lowerdir=" + lower.removeprefix("lowerdir=").replace(common, str(place / "common"))
    options = tuple(seen if word == lower else word for word in rest)
    try:
        return bench.mounts.mount([replace(mount, options=options)])
    finally:
        unmount(place / "common")


async def image(bench: Bench, *, committed: bool) -> None:
    """An image with a file of its own and a closure."""
    await bench.layer("base", "", {"etc": {"hostname": b"test"}})
    glibc = bench.path("glibc", GLIBC, committed=committed)
    config = bench.path("config", CONFIG, committed=committed)
    await bench.nix_layer("image", "base", glibc, config)


def mount(*words: str | Path) -> None:
    subprocess.run(["mount", *words], check=True)


def unmount(*words: str | Path) -> None:
    subprocess.run(["umount", *words], check=True)


def mounted_below(directory: Path) -> list[str]:
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [point for point in points if point.startswith(f"{directory}/")]


def refuse_idmapping(bench: Bench) -> None:
    """Have a lazy layer that cannot be mounted idmapped: an overlay cannot, as FUSE cannot before Linux 6.12."""
    lazy, upper, work = bench.state / "lazy", bench.state / "upper", bench.state / "work"
    upper.mkdir()
    work.mkdir()
    mount("-t", "overlay", "-o", f"lowerdir={lazy},upperdir={upper},workdir={work}", "none", lazy)


def contents(bench: Bench, root: Path) -> dict[str, object]:
    """The store paths that a container sees, by their names."""
    return {path.name.split("-", 1)[1]: bench.look(path) for path in (root / "nix/store").iterdir()}


# With the capability "remap-ids"


async def test_labels_become_options(bench: Bench, upper: Callable[..., Path]) -> None:
    await image(bench, committed=True)
    await bench.layer("plain", "base", {"file": b""})
    for parent in ("image", "plain", "base"):
        mounts = await bench.snapshotter.prepare(f"c-{parent}", parent, LABELS)
        assert mounts[0].options[:2] == OPTIONS
        assert owner(upper(mounts)) == ROOT
        assert await bench.snapshotter.mounts(f"c-{parent}") == mounts
        root = mount_mapped(bench, mounts)
        assert owners(root) == {ROOT}
        (root / "etc/hostname").write_bytes(b"changed")
        assert owner(upper(mounts) / "etc/hostname") == ROOT
        view = await bench.snapshotter.view(f"v-{parent}", parent, LABELS)
        assert view[0].options[:2] == OPTIONS
    (bind,) = await bench.snapshotter.prepare("scratch", "", LABELS)
    assert bind.options == (*OPTIONS, "rw", "rbind")
    assert owner(Path(bind.source)) == ROOT


async def test_what_fuse_serves_is_mapped_by_us(
    bench: Bench, upper: Callable[..., Path], lowers: Callable[..., list[Path]]
) -> None:
    await image(bench, committed=False)
    mounts = await bench.snapshotter.prepare("container", "image", LABELS)
    assert OPTIONS[0] not in mounts[0].options
    assert {str(layer.relative_to(bench.state)).split("/")[0] for layer in lowers(mounts)} == {
        "idmapped"
    }
    root = bench.mounts.mount(mounts)
    assert owners(root) == {ROOT}
    assert contents(bench, root) == {"glibc": GLIBC, "config": CONFIG}
    (root / "etc/hostname").write_bytes(b"changed")
    assert owner(upper(mounts) / "etc/hostname") == ROOT
    assert not bench.source.realised
    assert await bench.snapshotter.mounts("container") == mounts
    view = await bench.snapshotter.view("view", "image", LABELS)
    assert owners(bench.mounts.mount(view)) == {ROOT}
    # Others see the same files as they are on disk.
    assert owners(await bench.run("other", "image")) == {(0, 0)}


async def test_fuse_is_never_below_a_directory_that_containerd_clones(bench: Bench) -> None:
    """A clone of a directory has none of the mounts below it: the lazy layer would be an empty directory."""
    lazy = bench.state / "lazy"
    mount("-t", "tmpfs", "tmpfs", lazy)
    lazy.joinpath("views").mkdir()
    bench.lazy.lazy.mkdir(parents=True)
    os.setxattr(bench.lazy.lazy, "trusted.overlay.opaque", b"y")
    await image(bench, committed=False)
    cold = await bench.snapshotter.prepare("cold", "image", LABELS)
    assert OPTIONS[0] not in cold[0].options
    place = bench.state.parent / "clone"
    with clones({"state": bench.state}, IdMapping.from_root(*ROOT)) as made:
        made.attach(place)
    assert list(bench.lazy.lazy.iterdir())
    assert not list((place / "state/lazy/layer/.fusesnap-lazy").iterdir())
    root = bench.mounts.mount(cold)
    assert owners(root) == {ROOT}
    assert contents(bench, root) == {"glibc": GLIBC, "config": CONFIG}


async def test_an_answer_names_the_fuse_mount_that_there_is_now(bench: Bench) -> None:
    """Somebody unmounted it, and the supervisor mounted it again."""
    await image(bench, committed=False)
    cold = await bench.snapshotter.prepare("cold", "image", LABELS)
    (clone,) = bench.state.glob("idmapped/*/lazy")
    before = clone.stat().st_dev
    mount("-t", "tmpfs", "tmpfs", bench.state / "lazy")
    assert await bench.snapshotter.mounts("cold") == cold
    assert clone.stat().st_dev == (bench.state / "lazy").stat().st_dev != before
    assert await bench.snapshotter.mounts("cold") == cold
    assert mounted_below(clone.parent) == [str(clone.parent / "state"), str(clone)]


async def test_idmapped_mounts_live_as_long_as_their_snapshot(bench: Bench) -> None:
    await image(bench, committed=False)
    places = bench.state / "idmapped"
    mounts = await bench.snapshotter.prepare("container", "image", LABELS)
    await bench.snapshotter.prepare("other", "image", LABELS)
    root = bench.mounts.mount(mounts)
    assert len(list(places.iterdir())) == 2
    assert stat.S_IMODE(places.stat().st_mode) == 0o700  # below, root's directories are another's
    with pytest.raises(OSError, match="Read-only file system"):
        next(places.glob("*/state/layer")).joinpath("new").touch()
    await bench.snapshotter.remove("other")
    await bench.snapshotter.cleanup()
    (place,) = places.iterdir()
    # A restart of the machine leaves directories without mounts.
    for mounted in place.iterdir():
        unmount(mounted)
    bench.mounts.unmount(root)
    bench.close()
    bench.open()
    await bench.snapshotter.recover()
    assert owners(bench.mounts.mount(mounts)) == {ROOT}
    await bench.snapshotter.remove("container")
    assert not list(places.iterdir())
    assert bench.store.real.is_dir()
    assert not mounted_below(places)


async def test_they_do_not_multiply_where_mounts_are_shared(bench: Bench) -> None:
    """systemd makes "/" shared. A clone in its peer group would get all that is mounted there later, also clones."""
    mount("--bind", bench.state, bench.state)
    mount("--make-shared", bench.state)
    await image(bench, committed=False)
    for key in ("one", "two", "three"):
        mounts = await bench.snapshotter.prepare(key, "image", LABELS)
    assert len(mounted_below(bench.state)) == 6
    assert owners(bench.mounts.mount(mounts)) == {ROOT}
    for key in ("one", "two"):
        await bench.snapshotter.remove(key)
    assert len(mounted_below(bench.state)) == 2


async def test_where_fuse_cannot_be_mapped_the_closure_is_completed_first(bench: Bench) -> None:
    await image(bench, committed=False)
    refuse_idmapping(bench)
    assert not bench.source.realised
    mounts = await bench.snapshotter.prepare("container", "image", LABELS)
    assert {path.name for path in bench.source.realised} == {"glibc", "config"}
    assert owners(mount_mapped(bench, mounts)) == {ROOT}
    assert await bench.snapshotter.mounts("container") == mounts


async def test_where_the_store_cannot_be_mapped_nothing_is_fetched(
    bench: Bench, tmp_path: Path
) -> None:
    for name in ("lower", "upper", "work", "shown"):
        (tmp_path / name).mkdir()
    layers = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    mount("-t", "overlay", "-o", layers, "none", tmp_path / "shown")
    elsewhere = type(bench)(tmp_path / "shown/state", bench.mounts)
    await image(elsewhere, committed=False)
    with pytest.raises(Unsupported) as caught:
        await elsewhere.snapshotter.prepare("container", "image", LABELS)
    assert f"{elsewhere.state}: its file system cannot be mounted idmapped" in str(caught.value)
    assert "remap-ids" in str(caught.value)
    assert not elsewhere.source.realised
    with pytest.raises(NotFound):
        await elsewhere.snapshotter.stat("container")
    elsewhere.close()


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({UID_LABEL: "0:100000:65536"}, f"label {GID_LABEL}: expected <id in the container>"),
        ({**LABELS, UID_LABEL: "0:1"}, f"label {UID_LABEL}: expected <id in the container>"),
        ({**LABELS, UID_LABEL: "0:1:2,upperdir=/etc"}, "got 'upperdir=/etc'"),
        ({**LABELS, UID_LABEL: "0:1:2,userxattr"}, "got 'userxattr'"),
        ({**LABELS, GID_LABEL: "1:100000:65536"}, "expected a range for the container's id 0"),
        ({**LABELS, GID_LABEL: "0:100000:0"}, "is not a range of ids below 4294967295"),
        ({**LABELS, GID_LABEL: "0:4294967290:6"}, "is not a range of ids below 4294967295"),
        ({**LABELS, UID_LABEL: "0:1000:10,5:2000:10"}, "the kernel refuses the mapping"),
    ],
)
async def test_labels_that_cannot_be_used(
    bench: Bench, labels: dict[str, str], reason: str
) -> None:
    await image(bench, committed=False)
    for call in (bench.snapshotter.prepare, bench.snapshotter.view):
        with pytest.raises(InvalidArgument) as caught:
            await call("container", "image", labels)
        assert reason in str(caught.value)
        with pytest.raises(NotFound):
            await bench.snapshotter.stat("container")


async def test_several_ranges(bench: Bench) -> None:
    await bench.layer("base", "", {"file": b"", "other": b""})
    await bench.nix_layer("image", "base", bench.path("glibc", GLIBC))
    labels = {UID_LABEL: "0:5000:10,10:7000:90", GID_LABEL: "3:1:1,0:6000:3"}
    mounts = await bench.snapshotter.prepare("container", "image", labels)
    base = next(bench.state.glob("snapshots/*/fs/other"))
    os.chown(base, 12, 3)
    root = bench.mounts.mount(mounts)
    assert owner(root / "file") == (5000, 6000)
    assert owner(root / "other") == (7002, 1)


# Without it: containerd gives every file that it finds another owner


def shift(root: Path) -> None:
    """What ``remapRootFS`` of containerd does (``client/container_opts_unix.go``)."""
    for where, directories, files in os.walk(root):
        for name in (".", *directories, *files):
            path = Path(where) / name
            before = path.lstat()
            if before.st_uid < ROOT[0]:
                os.lchown(path, before.st_uid + ROOT[0], before.st_gid + ROOT[1])


@pytest.mark.parametrize(
    ("key", "labels"),
    [
        pytest.param(f"default/7/{DIGEST}-100000-200000", {}, id="1.6"),
        pytest.param(f"default/7/{DIGEST}", LABELS, id="2"),
    ],
)
@pytest.mark.parametrize("committed", [False, True], ids=["cold", "warm"])
async def test_a_shifted_image_has_its_store_mapped_above_it(
    bench: Bench, key: str, labels: dict[str, str], *, committed: bool
) -> None:
    await image(bench, committed=committed)
    rewritten = bench.mounts.mount(await bench.snapshotter.prepare(f"{key}-remap", "image", {}))
    assert not [
        path
        for path in (rewritten / "nix/store").iterdir()
        if path.is_dir() and any(path.iterdir())
    ]
    shift(rewritten)
    bench.mounts.unmount(rewritten)
    await bench.snapshotter.commit(key, f"{key}-remap", {})
    farms = set((bench.state / "farms").iterdir())
    mounts = await bench.snapshotter.prepare("container", key, labels)
    assert OPTIONS[0] not in mounts[0].options
    root = bench.mounts.mount(mounts)
    assert owners(root) == {ROOT}
    assert contents(bench, root) == {"glibc": GLIBC, "config": CONFIG}
    assert (root / "etc/hostname").read_bytes() == b"test"
    assert not bench.source.realised
    assert await bench.snapshotter.mounts("container") == mounts
    # The farms are those of the image itself.
    assert owners(await bench.run("other", "image")) == {(0, 0)}
    assert len(set((bench.state / "farms").iterdir()) - farms) <= 2


async def test_a_shifted_image_of_ordinary_layers_is_not_mapped_again(bench: Bench) -> None:
    await bench.layer("base", "", {"etc": {"hostname": b"test"}})
    rewritten = bench.mounts.mount(await bench.snapshotter.prepare(f"{DIGEST}-remap", "base", {}))
    shift(rewritten)
    bench.mounts.unmount(rewritten)
    await bench.snapshotter.commit(DIGEST, f"{DIGEST}-remap", {})
    mounts = await bench.snapshotter.prepare("container", DIGEST, LABELS)
    assert OPTIONS[0] not in mounts[0].options
    assert owners(bench.mounts.mount(mounts)) == {ROOT}


async def test_a_container_may_be_named_so(bench: Bench) -> None:
    await image(bench, committed=True)
    for key in ("default/7/some-remap", "default/7/100000-100000-remap", "sha256:1-remap"):
        root = await bench.run(key, "image")
        assert (
            next((root / "nix/store").glob("*-glibc")) / "lib/libc.so"
        ).read_bytes() == b"\x7fELF"


async def test_where_it_cannot_be_mapped_the_store_is_shown_as_it_is(bench: Bench) -> None:
    await image(bench, committed=False)
    rewritten = bench.mounts.mount(await bench.snapshotter.prepare(f"{DIGEST}-remap", "image", {}))
    shift(rewritten)
    bench.mounts.unmount(rewritten)
    await bench.snapshotter.commit(DIGEST, f"{DIGEST}-remap", {})
    refuse_idmapping(bench)
    root = bench.mounts.mount(await bench.snapshotter.prepare("container", DIGEST, LABELS))
    assert owner(root / "etc/hostname") == ROOT
    libc = next((root / "nix/store").glob("*-glibc")) / "lib/libc.so"
    assert owner(libc) == (0, 0)
    assert libc.read_bytes() == b"\x7fELF"
    assert not bench.source.realised
