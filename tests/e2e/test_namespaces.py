"""Two of containerd's namespaces on one daemon: the same image, the same container's name, nothing in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from testbed.containerd import Containerd
from testbed.drill_services import Snapshots
from testbed.images import Layer
from testbed.synthetic import SimpleClosure

from .conftest import Node

NixLayers = Callable[..., Layer]
NAME = "same"
WRITE = "echo $0 > /root/mark"


@pytest.fixture
def snapshots(node: Node) -> Iterator[Snapshots]:
    """What the daemon itself knows, whatever containerd shows of it."""
    client = Snapshots(node.daemon.address)
    yield client
    client.close()


def listed(containerd: Containerd) -> dict[str, tuple[str, str]]:
    """What a namespace sees: parent and kind of each snapshot, by key or name."""
    said = containerd.ctr("snapshots", "--snapshotter", containerd.snapshotter, "ls")
    found = {}
    for line in said.splitlines()[1:]:
        key, *parent, kind = line.split()
        found[key] = ("".join(parent), kind)
    return found


def stored(snapshots: Snapshots, namespace: str) -> dict[str, str]:
    """The parent of each snapshot that the daemon has for a namespace."""
    return {
        info.name: info.parent for info in snapshots.all() if info.name.startswith(f"{namespace}/")
    }


def test_namespaces_do_not_meet(
    node: Node,
    snapshots: Snapshots,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
) -> None:
    reference = node.push([base_layer, nix_layers()])
    one, two = node.containerd, node.containerd.in_namespace("two")
    one.pull(reference)
    assert listed(two) == {}
    two.pull(reference)
    layers = listed(one)
    assert len(layers) == 2
    assert listed(two) == layers
    with one.started(reference, NAME, "/bin/sleep", "1000") as first:
        with two.started(reference, NAME, "/bin/sleep", "1000") as second:
            assert listed(one).keys() - layers.keys() == {NAME}
            assert listed(two) == listed(one)
            for container, namespace in ((first, "one"), (second, "two")):
                container.execute("/bin/sh", "-c", WRITE, namespace)
            assert first.execute("/bin/cat", "/root/mark") == "one\n"
            assert second.execute("/bin/cat", simple.text).startswith("a text")
            alike = stored(snapshots, "default"), stored(snapshots, "two")
            assert [len(each) for each in alike] == [3, 3]
            assert all(
                not parent or parent in names for names in alike for parent in names.values()
            )
        assert listed(two) == layers
        assert first.execute("/bin/cat", "/root/mark") == "one\n"
        two.ctr("images", "rm", "--sync", reference)
        assert listed(two) == {}
        node.daemon.service.wait_until(lambda: stored(snapshots, "two") == {})
        assert stored(snapshots, "default") == alike[0]
        assert first.execute("/bin/cat", f"{simple.tree}/wide/file-2") == "2\n"
    assert listed(one) == layers
    assert one.run(reference, "next", "/bin/cat", simple.text).startswith("a text")
