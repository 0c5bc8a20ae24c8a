"""Who is told that a container starts: for what the lazy layer serves, once it is answered."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fusesnap.errors import ClosureUnavailable, PathNotFound

if TYPE_CHECKING:
    from tests.snapshots.conftest import Bench


async def test_starts_that_the_lazy_layer_serves_are_told(bench: Bench) -> None:
    tool = bench.path("tool", {"bin": {"tool": b"tool"}})
    base = bench.path("base", {"file": b"base"}, committed=True)
    await bench.nix_layer("lower", "", base)
    await bench.nix_layer("image", "lower", tool)
    await bench.layer("ordinary", "", {"file": b"x"})
    heard = bench.starts.heard
    # Unpacking is no start, but what is unpacked will be started: with the paths of all its layers.
    assert [each[:2] for each in heard] == [
        ("foreseen", frozenset({base})),
        ("admitted", "lower"),
        ("foreseen", frozenset({base, tool})),
        ("admitted", "image"),
    ]
    assert heard[-1] == ("admitted", "image", frozenset({base, tool}))
    heard.clear()
    await bench.snapshotter.prepare("one", "image", {})
    (upper,) = await bench.snapshotter.uppers()
    assert heard == [("begins", "one", Path(upper), frozenset({tool, base}), frozenset({tool}))]
    await bench.snapshotter.mounts("one")  # its task starts, perhaps again
    assert heard[1:] == heard[:1]
    heard.clear()
    await bench.snapshotter.view("view", "image", {})
    await bench.snapshotter.prepare("ordinary-one", "ordinary", {})
    await bench.snapshotter.prepare("complete", "lower", {})
    for key in ("view", "ordinary-one", "complete"):
        await bench.snapshotter.mounts(key)
        await bench.snapshotter.remove(key)
    assert heard == []
    await bench.snapshotter.remove("one")
    assert heard == [("ended", "one")]


async def test_what_an_image_brings_is_handed_on(bench: Bench) -> None:
    tool = bench.path("tool", {"bin": {"tool": b"tool"}})
    labels = {"containerd.io/snapshot/x": "y"}
    await bench.layer("image", "", bench.placeholders(tool), labels)
    assert bench.starts.heard[0] == ("foreseen", frozenset({tool}), labels)


async def test_what_cannot_be_had_is_not_said_to_be(bench: Bench) -> None:
    tool = bench.path("tool", {"bin": {"tool": b"tool"}})
    bench.source.failures[tool] = PathNotFound("no cache has it")
    with pytest.raises(ClosureUnavailable):
        await bench.layer("image", "", bench.placeholders(tool))
    assert [each[0] for each in bench.starts.heard] == ["foreseen"]
