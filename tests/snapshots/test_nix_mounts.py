"""Views of Nix images: how their directories look, and what Mounts answers when it is asked again."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fusesnap.nix.tree import STORE_MTIME_NS
from fusesnap.snapshots.interface import Mount

if TYPE_CHECKING:
    from tests.snapshots.conftest import Bench

HELLO = {"bin": {"hello": b"#!hello", "hi": "hello"}, "share": {"doc": {}}}
GLIBC = {"lib": {"libc.so": b"\x7fELF"}}
CONFIG = b"a single file"


def store_of(root: Path) -> Path:
    return root / "nix" / "store"


# Metadata


@pytest.fixture(params=["bench", "prompt_bench"])
def bench(request: pytest.FixtureRequest) -> Bench:
    """Every rule holds whichever way an answer comes."""
    made: Bench = request.getfixturevalue(request.param)
    return made


@pytest.mark.parametrize("committed", [False, True], ids=["cold", "warm"])
async def test_directories_look_as_the_image_has_them(
    bench: Bench, upper: Callable[..., Path], *, committed: bool
) -> None:
    hello = bench.path("hello", HELLO, committed=committed)
    config = bench.path("config", CONFIG, committed=committed)
    await bench.nix_layer("one", "", hello, config)
    key = "k8s.io/1/extract-1-x two"
    directory = upper(await bench.snapshotter.prepare(key, "one", {}))
    (directory / "nix/store").mkdir(parents=True)
    looks = {
        "": (0o711, 5, 6, 1_111),
        "nix": (0o750, 1, 2, 2_222),
        "nix/store": (0o1775, 3, 4, 3_333),
    }
    for name, (mode, uid, gid, mtime) in sorted(looks.items(), reverse=True):
        os.chown(directory / name, uid, gid)
        (directory / name).chmod(mode)
        os.setxattr(directory / name, "user.note", name.encode() or b"root")
        os.utime(directory / name, (mtime, mtime))
    await bench.snapshotter.commit("two", key, {})
    container, view = await bench.run("container", "two"), await bench.show("view", "two")
    for root in (container, view):
        for name, look in looks.items():
            status = (root / name).stat()
            found = (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime)
            if root == container and not name:  # the upper directory's, as with overlayfs
                assert found[:3] == (0o755, 5, 6)
                continue
            assert found == look
            assert os.getxattr(root / name, "user.note") == (name.encode() or b"root")
        path = (store_of(root) / hello.base_name).stat()
        assert (stat.S_IMODE(path.st_mode), path.st_uid, path.st_mtime_ns) == (
            0o555,
            0,
            STORE_MTIME_NS,
        )
        if committed:
            file = (store_of(root) / config.base_name).stat()
            assert (stat.S_IMODE(file.st_mode), file.st_mtime_ns) == (0o444, STORE_MTIME_NS)


async def test_no_overlay_attribute_shows(bench: Bench) -> None:
    hello = bench.path("hello", HELLO)
    await bench.nix_layer("image", "", hello)
    root = await bench.show("view", "image")
    for path in (root, store_of(root), store_of(root) / hello.base_name):
        assert not [name for name in os.listxattr(path) if name.startswith("trusted.overlay.")]


# Mounts, asked again


async def test_mounts_stay_while_mounted(bench: Bench) -> None:
    glibc, config = bench.path("glibc", GLIBC), bench.path("config", CONFIG)
    await bench.nix_layer("image", "", glibc, config)
    await bench.snapshotter.prepare("container", "image", {})
    await bench.snapshotter.view("view", "image", {})
    cold = [await bench.snapshotter.mounts(key) for key in ("container", "view")]
    roots = [bench.mounts.mount(mounts) for mounts in cold]
    bench.store.commit(glibc, GLIBC)
    bench.store.commit(config, CONFIG)
    warm = await bench.snapshotter.prepare("warm", "image", {})
    assert not any("lazy" in option for option in warm[0].options)
    assert [await bench.snapshotter.mounts(key) for key in ("container", "view")] == cold
    await bench.snapshotter.remove("warm")
    await bench.snapshotter.cleanup()
    assert [await bench.snapshotter.mounts(key) for key in ("container", "view")] == cold
    # A diff mounts the view of a running container a second time.
    again = bench.mounts.mount(cold[1])
    for root in (*roots, again):
        assert bench.look(store_of(root)) == {glibc.base_name: GLIBC, config.base_name: CONFIG}


async def test_mounts_improve_once_unmounted(bench: Bench) -> None:
    glibc = bench.path("glibc", GLIBC)
    await bench.nix_layer("image", "", glibc)
    cold = await bench.snapshotter.prepare("container", "image", {})
    root = bench.mounts.mount(cold)
    (root / "written").write_bytes(b"kept")
    (store_of(root) / glibc.base_name / "lib/added").write_bytes(b"kept")
    bench.store.commit(glibc, GLIBC)
    bench.mounts.unmount(root)
    warm = await bench.snapshotter.mounts("container")
    assert warm != cold
    assert not any("lazy" in option for option in warm[0].options)
    assert await bench.snapshotter.mounts("container") == warm
    root = bench.mounts.mount(warm)
    assert (root / "written").read_bytes() == b"kept"
    expected = {"lib": {"libc.so": b"\x7fELF", "added": b"kept"}}
    assert bench.look(store_of(root)) == {glibc.base_name: expected}
    assert await bench.snapshotter.mounts("container") == warm


async def test_an_answer_that_is_not_mounted_yet_stays_good(bench: Bench) -> None:
    """A client asks first and mounts later; another may ask in between, and find something better."""
    glibc = bench.path("glibc", GLIBC)
    await bench.nix_layer("image", "", glibc)
    cold = await bench.snapshotter.prepare("container", "image", {})
    bench.store.commit(glibc, GLIBC)
    assert await bench.snapshotter.mounts("container") != cold
    await bench.snapshotter.cleanup()
    root = bench.mounts.mount(cold)
    assert bench.look(store_of(root)) == {glibc.base_name: GLIBC}
    assert await bench.snapshotter.mounts("container") == cold


async def test_mounts_survive_a_restart(bench: Bench) -> None:
    glibc = bench.path("glibc", GLIBC)
    await bench.nix_layer("image", "", glibc)
    mounts = await bench.snapshotter.prepare("container", "image", {})
    bench.mounts.mount(mounts)
    bench.close()
    bench.open()
    await bench.snapshotter.recover()
    bench.store.commit(glibc, GLIBC)
    assert await bench.snapshotter.mounts("container") == mounts


async def test_there_is_always_one_mount(bench: Bench) -> None:
    await bench.nix_layer("image", "", bench.path("a", GLIBC), bench.path("b", CONFIG))
    answers: list[tuple[Mount, ...]] = []
    for key in ("container", "k8s.io/1/extract-1-x layer"):
        answers.append(tuple(await bench.snapshotter.prepare(key, "image", {})))
        answers.append(tuple(await bench.snapshotter.view(f"view {key}", "image", {})))
    assert [len(mounts) for mounts in answers] == [1] * 4
