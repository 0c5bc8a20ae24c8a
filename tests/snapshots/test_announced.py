"""What an image will show is learnt when its lowest layer is about to be unpacked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from fusesnap.errors import PathNotFound, Unavailable
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.snapshots.announced import CHAIN_LABEL, AnnouncedImage

from .conftest import Tree, plant, upper_of

if TYPE_CHECKING:
    from tests.snapshots.conftest import Bench

LOWER, UPPER = "sha256:lower", "sha256:upper"


def labels_of(*paths: StorePath) -> dict[str, str]:
    numbered = {
        f"containerd.io/snapshot/nix-store-path.{number}": StoreDir().format(path)
        for number, path in enumerate(paths)
    }
    return {"containerd.io/snapshot/nix-layer": "true", **numbered}


class Client:
    """Knows one image; ``asked`` has the chain IDs that it was asked for, with their namespaces."""

    def __init__(self, *labels: dict[str, str]) -> None:
        self.labels = labels
        self.failure: Unavailable | None = None
        self.asked: list[tuple[str, str]] = []

    async def find(self, namespace: str, chain_id: str) -> AnnouncedImage | None:
        self.asked.append((namespace, chain_id))
        if self.failure is not None:
            raise self.failure
        known = chain_id in {LOWER, UPPER}
        return AnnouncedImage((LOWER, UPPER), self.labels) if known else None


async def prepare(
    bench: Bench, name: str, parent: str, chain_id: str, tree: Tree | None = None
) -> str:
    """Have a layer's snapshot prepared, as containerd does before it fetches the layer, and fill it with ``tree``."""
    key = f"k8s.io/1/extract-{name} {chain_id}"
    mounts = await bench.snapshotter.prepare(key, parent, {CHAIN_LABEL: chain_id})
    await trio.testing.wait_all_tasks_blocked(0.05)
    plant(upper_of(mounts), tree or {})
    return key


async def test_its_paths_are_admitted_and_foreseen_while_its_lowest_layer_is_fetched(
    bench: Bench, nursery: trio.Nursery
) -> None:
    tool = bench.path("tool", {"bin": {"tool": b"tool"}})
    brought = {"containerd.io/snapshot/x": "y"}
    client = Client(brought, labels_of(tool))
    bench.open(find_image=client.find, nursery=nursery)
    key = await prepare(bench, "1", "", LOWER)
    shown = frozenset({tool})
    assert bench.starts.heard == [
        ("foreseen", shown, {**brought, **labels_of(tool)}),
        ("admitted", f"k8s.io/0/{UPPER}", shown),
    ]
    assert bench.source.admitted == [tool]
    await bench.snapshotter.commit("lower", key, {})
    key = await prepare(bench, "2", "lower", UPPER, bench.placeholders(tool))
    assert client.asked == [("k8s.io", LOWER)]  # once an image
    await bench.snapshotter.commit("image", key, {})
    assert bench.source.admitted == [tool]
    await prepare(bench, "3", "", LOWER)  # it was removed, and is pulled again
    assert client.asked == [("k8s.io", LOWER)] * 2


async def test_an_image_that_says_nothing_of_store_paths_is_an_ordinary_one(
    bench: Bench, nursery: trio.Nursery
) -> None:
    bench.open(find_image=Client({}, {}).find, nursery=nursery)
    await prepare(bench, "1", "", LOWER)
    assert (bench.starts.heard, bench.source.admitted) == ([], [])


@pytest.mark.parametrize("what", ["unknown", "failing", "unavailable"])
async def test_the_layer_is_unpacked_whatever_comes_of_it(
    bench: Bench, nursery: trio.Nursery, what: str
) -> None:
    tool = bench.path("tool", {"bin": {"tool": b"tool"}})
    client = Client({}, labels_of(tool))
    if what == "failing":
        client.failure = Unavailable("containerd is away")
    if what == "unavailable":
        bench.source.failures[tool] = PathNotFound("no cache has it")
    bench.open(find_image=client.find, nursery=nursery)
    chain_id = "sha256:another" if what == "unknown" else LOWER
    key = await prepare(bench, "1", "", chain_id)
    assert client.asked == [("k8s.io", chain_id)]
    assert "admitted" not in {each[0] for each in bench.starts.heard}
    await bench.snapshotter.commit("lower", key, {})
    assert (await bench.snapshotter.stat("lower")).name == "lower"


async def test_a_container_is_no_layer(bench: Bench, nursery: trio.Nursery) -> None:
    client = Client({})
    bench.open(find_image=client.find, nursery=nursery)
    await bench.snapshotter.prepare("k8s.io/1/container", "", {})
    assert client.asked == []
