"""A container's closure is completed behind its back, and what is started then has no FUSE in it."""

from __future__ import annotations

from collections.abc import Callable

from testbed.binary_cache import HttpCache
from testbed.images import Layer
from testbed.synthetic import SimpleClosure

from .conftest import Node


def test_a_closure_leaves_fuse(
    make_node: Callable[..., Node],
    cache: HttpCache,
    simple: SimpleClosure,
    nix_layers: Callable[..., Layer],
    base_layer: Layer,
) -> None:
    node = make_node(cache.url, options=["--complete"])
    reference = node.pull([base_layer, nix_layers()])
    # Nobody runs it: of an image alone nothing is fetched.
    assert node.daemon.status()["paths"]["missing"] == len(simple.closure.paths)
    with node.containerd.started(reference, "one", "/bin/sleep", "1000"):
        (on_fuse,) = node.daemon.status()["depend_on_fuse"]
        assert on_fuse.endswith("/one")
        node.daemon.service.wait_until(lambda: node.daemon.status()["paths"]["missing"] == 0)
        assert cache.requested_nars(simple.closure.paths) == set(simple.closure.paths)
        with node.containerd.started(reference, "two", "/bin/sleep", "1000") as two:
            assert node.daemon.status()["depend_on_fuse"] == [on_fuse]
            root = next(line for line in two.mounts().splitlines() if line.split()[4] == "/")
            assert "/lazy/" not in root
