"""What was tried against the overlay of redirects, in real containers, cold and warm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from testbed.binary_cache import HttpCache, SigningKey
from testbed.fusesnap_daemon import Source, prefetch
from testbed.images import (
    Directory,
    File,
    Layer,
    NixLayerManner,
    nix_layer,
    opaque,
    ordinary_layer,
    whiteout,
)
from testbed.nix_store import NixStore
from testbed.synthetic import SimpleClosure

from .conftest import Node

NixLayers = Callable[..., Layer]
Warm = Callable[[Node], None]


@pytest.fixture(params=["cold", "warm"])
def warm(
    request: pytest.FixtureRequest, cache: HttpCache, simple: SimpleClosure, key: SigningKey
) -> Warm:
    """Called before the first start: does nothing, or completes the closure."""

    def make(node: Node) -> None:
        if request.param == "warm":
            prefetch(node.daemon.state, [simple.root], source=Source([cache.url], [key.public]))

    return make


@pytest.mark.parametrize("above", [False, True])
def test_an_image_cannot_reach_into_store_paths(
    node: Node,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
    warm: Warm,
    above: bool,
) -> None:
    name = simple.tree.removeprefix("/nix/store/")
    hostile = ordinary_layer(
        {
            f"{reserved}/{name}/{file}": b"evil\n"
            for reserved in (".fusesnap-store", ".fusesnap-lazy")
            for file in ("evil", "self", "links/evil")
        }
    )
    nix = nix_layers()
    layers = [base_layer, nix, hostile] if above else [base_layer, hostile, nix]
    reference = node.pull(layers)
    warm(node)
    script = f"ls {simple.tree} {simple.tree}/links; cat {simple.tree}/self; ls -a /"
    said = node.containerd.run(reference, "one", "/bin/sh", "-c", script)
    assert "evil" not in said
    assert f"this path is {simple.tree}" in said
    assert ".fusesnap-store" not in said
    if node.daemon.status()["paths"]["missing"]:
        assert ".fusesnap-lazy" not in said


def test_two_nix_layers_in_one_chain(
    node: Node, nix_store: NixStore, simple: SimpleClosure, base_layer: Layer, warm: Warm
) -> None:
    lower = nix_layer(
        nix_store, nix_store.closure(simple.busybox), NixLayerManner.PLACEHOLDERS, copy_to_root=True
    )
    upper = nix_layer(nix_store, nix_store.closure(simple.tree), NixLayerManner.PLACEHOLDERS)
    reference = node.pull([lower, base_layer, upper])
    warm(node)
    script = f"cat {simple.tree}/wide/file-9 {simple.file}; ls /nix/store | wc -l"
    said = node.containerd.run(reference, "one", "/bin/sh", "-c", script)
    assert said == "9\na store path that is a file\n3\n"


def test_mounts_may_be_asked_again_while_a_container_runs(
    node: Node, simple: SimpleClosure, nix_layers: NixLayers, base_layer: Layer
) -> None:
    reference = node.pull([base_layer, nix_layers()])
    with node.containerd.started(reference, "one", "/bin/sleep", "1000") as container:
        ask = ("snapshots", "--snapshotter", "fusesnap", "mounts", "/mnt", "one")
        first = node.containerd.ctr(*ask)
        container.execute("/bin/cat", f"{simple.large}/data", timeout=60)
        assert node.containerd.ctr(*ask) == first
        assert container.execute("/bin/cat", f"{simple.tree}/wide/file-3") == "3\n"
        diff = node.containerd.ctr("snapshots", "--snapshotter", "fusesnap", "info", "one")
        assert '"Active"' in diff


def test_layers_above_a_nix_layer_keep_their_order(
    node: Node, simple: SimpleClosure, nix_layers: NixLayers, base_layer: Layer, warm: Warm
) -> None:
    tree, large, unused, file = (
        path.lstrip("/") for path in (simple.tree, simple.large, simple.unused, simple.file)
    )
    above = ordinary_layer(
        {
            f"{tree}/added": b"added\n",
            f"{tree}/links/added": b"added below\n",
            whiteout(f"{tree}/self"): File(),
            f"{tree}/executable": b"replaced\n",
            whiteout(unused): File(),
            large: Directory(mode=0o700),
            opaque(large): File(),
            f"{large}/mine": b"mine\n",
            file: b"replaced\n",
        }
    )
    reference = node.pull([base_layer, nix_layers(), above])
    warm(node)
    script = f"""
        cd {simple.tree}
        cat added links/added executable wide/file-5 links/to-file 2>&1
        ls self {simple.unused} 2>/dev/null
        ls {simple.large}
        cat {simple.file}
    """
    said = node.containerd.run(reference, "one", "/bin/sh", "-c", script)
    lines = said.splitlines()
    assert lines[:4] == ["added", "added below", "replaced", "5"]
    assert "No such file" in lines[4]  # links/to-file leads to self, which is whited out
    assert lines[5:] == ["mine", "replaced"]


def test_directories_look_as_the_image_has_them(
    node: Node, simple: SimpleClosure, nix_layers: NixLayers, warm: Warm
) -> None:
    base = ordinary_layer(
        {
            "nix": Directory(mode=0o750, uid=5, gid=6, mtime=77),
            "nix/store": Directory(mode=0o1775, uid=0, gid=30000, mtime=88),
            "etc/hostname": b"test\n",
        }
    )
    # The image's own word on these directories comes last.
    reference = node.pull([nix_layers(), base])
    warm(node)
    script = f"stat -c '%a %u %g %Y' /nix /nix/store {simple.busybox}"
    said = node.containerd.run(reference, "one", "/bin/sh", "-c", script)
    assert said.splitlines() == ["750 5 6 77", "1775 0 30000 88", "555 0 0 1"]


def test_a_container_writes_where_it_likes(
    node: Node, simple: SimpleClosure, nix_layers: NixLayers, base_layer: Layer, warm: Warm
) -> None:
    reference = node.pull([base_layer, nix_layers()])
    warm(node)
    script = f"""
        cd {simple.tree} && chmod u+w . wide && echo new > wide/new && rm wide/file-1 && mv self other
        cat wide/new other; ls wide | wc -l
        echo mine > /nix/store/mine && cat /nix/store/mine
        rm -rf {simple.unused} && ls {simple.unused} 2>&1 | grep -c 'No such'
        mkdir /.fusesnap-store && ls -A /.fusesnap-store | wc -l
    """
    said = node.containerd.run(reference, "one", "/bin/sh", "-c", script)
    expected = ["new", f"this path is {simple.tree}", "1000", "mine", "1", "0"]
    assert said.splitlines() == expected
    again = node.containerd.run(reference, "two", "/bin/cat", f"{simple.tree}/wide/file-1")
    assert again == "1\n"
