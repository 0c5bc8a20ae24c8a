"""Answers without waiting: of a complete container they are those of the whole way, and of others there are none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fusesnap.errors import FusesnapError

if TYPE_CHECKING:
    from tests.snapshots.conftest import Bench

GLIBC = {"lib": {"libc.so": b"\x7fELF"}}
LATER = 4_000_000_000.0  # seconds since the epoch: whatever is on disk was changed long ago


async def image_of(bench: Bench, *, committed: bool) -> None:
    """An image of one path, of which a first container was prepared."""
    bench.now = LATER
    path = bench.path("glibc", GLIBC, committed=committed)
    await bench.nix_layer("image", "", path)
    await bench.snapshotter.prepare("first", "image", {})


async def test_a_complete_container_is_prepared_and_mounted(bench: Bench) -> None:
    await image_of(bench, committed=True)
    prompt = bench.snapshotter.prompt
    prepared = prompt.prepare("c", "image", {"some": "label"})
    assert prepared is not None
    assert prompt.mounts("c") == prepared == await bench.snapshotter.mounts("c")
    assert prompt.stat("c") == await bench.snapshotter.stat("c")
    assert prompt.stat("c").labels == {"some": "label"}
    (other,) = await bench.snapshotter.prepare("other", "image", {})
    assert prepared[0].options[2:] == other.options[2:]  # all but the upper directory
    root = bench.mounts.mount(prepared)
    assert list(bench.look(root / "nix/store").values()) == [GLIBC]


async def test_what_is_missing_has_to_be_waited_for(bench: Bench) -> None:
    await image_of(bench, committed=False)
    prompt = bench.snapshotter.prompt
    assert prompt.prepare("c", "image", {}) is None
    assert prompt.mounts("first") is None
    assert {info.name for info in await bench.snapshotter.walk()} == {"image", "first"}


async def test_a_view_that_is_not_known_has_to_be_found_out(bench: Bench) -> None:
    await image_of(bench, committed=True)
    bench.close()
    bench.open()
    assert bench.snapshotter.prompt.prepare("c", "image", {}) is None
    await bench.snapshotter.prepare("second", "image", {})
    assert bench.snapshotter.prompt.prepare("c", "image", {}) is not None


async def test_a_store_that_changed_has_to_be_looked_at(bench: Bench) -> None:
    await image_of(bench, committed=True)
    bench.path("another", GLIBC, committed=True)
    assert bench.snapshotter.prompt.prepare("c", "image", {}) is None


async def test_paths_in_labels_have_to_be_admitted(bench: Bench) -> None:
    await image_of(bench, committed=True)
    path = bench.path("labelled", GLIBC)
    labels = {
        "containerd.io/snapshot/nix-layer": "true",
        "containerd.io/snapshot/nix-store-path.0": f"/nix/store/{path.base_name}",
    }
    assert bench.snapshotter.prompt.prepare("c", "image", labels) is None


async def test_an_error_leaves_nothing(bench: Bench) -> None:
    await image_of(bench, committed=True)
    prompt = bench.snapshotter.prompt
    for key, parent in (("first", "image"), ("c", "nowhere"), ("", "image"), ("c", "first")):
        with pytest.raises(FusesnapError):
            prompt.prepare(key, parent, {})
    assert prompt.mounts("image") is None
    assert {info.name for info in await bench.snapshotter.walk()} == {"image", "first"}
