"""Containers stay on FUSE for the sake of what is missing of their images, and of nothing else."""

from __future__ import annotations

from fusesnap.snapshots.unfinished import Unfinished

from .conftest import Bench


async def test_what_is_missing_of_containers_is_found_and_of_images_without_them_is_not(
    bench: Bench,
) -> None:
    there = bench.path("there", {"a": b"1"}, committed=True)
    shared, one, two, unused = (bench.path(name, {"a": b"2"}) for name in ("s", "1", "2", "u"))
    await bench.nix_layer("first", "", there, shared, one)
    await bench.nix_layer("second", "", shared, two)
    await bench.nix_layer("third", "", unused)
    unfinished = Unfinished(bench.metastore, bench.store)
    assert unfinished.missing() == []
    await bench.snapshotter.prepare("container-1", "first", {})
    assert unfinished.missing() == sorted([shared, one])
    await bench.snapshotter.prepare("container-2", "second", {})
    await bench.snapshotter.prepare("container-3", "second", {})
    assert unfinished.missing() == sorted([shared, one, two])
    bench.store.commit(shared, {"a": b"2"})
    assert unfinished.missing() == sorted([one, two])
    await bench.snapshotter.remove("container-1")
    assert unfinished.missing() == [two]
    bench.store.commit(two, {"a": b"2"})
    assert unfinished.missing() == []
    await bench.snapshotter.prepare("container-4", "third", {})
    assert unfinished.missing() == [unused]
