"""Images pulled as Kubernetes pulls them: containerd's CRI hands the layers' annotations on as labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from testbed.binary_cache import HttpCache, hash_part
from testbed.images import Layer, NixLayerManner
from testbed.synthetic import SimpleClosure

from .conftest import Node, NodeMaker
from .cri import cri_pull

NixLayers = Callable[..., Layer]


@pytest.fixture
def kubelet_node(make_node: NodeMaker, cache: HttpCache, work: Path) -> Node:
    """A node on which nothing but labels says what a Nix layer is."""
    (work / "fusesnap.toml").write_text(
        f'recognise-by-content = false\ncontainerd-address = "{work}/c/containerd.sock"\n'
    )
    return make_node(cache.url, cri=True, options=["--config", str(work / "fusesnap.toml")])


@pytest.mark.parametrize("manner", [NixLayerManner.CLOSURE, NixLayerManner.PATHS])
def test_labels_say_what_a_nix_layer_stands_for(
    kubelet_node: Node,
    cache: HttpCache,
    simple: SimpleClosure,
    list_path: str,
    nix_layers: NixLayers,
    base_layer: Layer,
    manner: NixLayerManner,
) -> None:
    reference = kubelet_node.push([base_layer, nix_layers(manner)])
    cri_pull(kubelet_node, reference)
    listed = {list_path} if manner is NixLayerManner.CLOSURE else set()
    assert cache.requested_nars([*simple.closure.paths, list_path]) == listed
    said = kubelet_node.containerd.run(reference, "one", f"{simple.root}/bin/echo", "hello")
    assert said == "hello\n"


@pytest.mark.parametrize("manner", [NixLayerManner.CLOSURE, NixLayerManner.PATHS])
def test_caches_are_asked_before_any_layer_is_fetched(
    kubelet_node: Node,
    cache: HttpCache,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
    manner: NixLayerManner,
) -> None:
    """The manifest says what the image shows; of its layers none can be had."""
    reference = kubelet_node.push([base_layer, nix_layers(manner)])
    with kubelet_node.registry.without_layers(reference):
        with pytest.raises(grpc.RpcError):
            cri_pull(kubelet_node, reference)
        wanted = {f"/{hash_part(path)}.narinfo" for path in simple.closure.paths}
        kubelet_node.daemon.service.wait_until(
            lambda: wanted <= {each.path for each in cache.requests()}
        )


def test_a_closure_path_without_its_list_fails_the_pull(
    kubelet_node: Node, simple: SimpleClosure, nix_layers: NixLayers, base_layer: Layer
) -> None:
    layer = nix_layers(NixLayerManner.CLOSURE)
    wrong = Layer(layer.tar, {"containerd.io/snapshot/nix-closure": simple.tree})
    with pytest.raises(grpc.RpcError) as caught:
        cri_pull(kubelet_node, kubelet_node.push([base_layer, wrong]))
    assert "expected a file store-paths in it" in str(caught.value)
    assert simple.tree in str(caught.value)


def test_without_labels_and_without_looking_at_content_it_is_an_ordinary_layer(
    kubelet_node: Node, nix_layers: NixLayers, base_layer: Layer
) -> None:
    reference = kubelet_node.push([base_layer, nix_layers(NixLayerManner.PLACEHOLDERS)])
    cri_pull(kubelet_node, reference)
    assert kubelet_node.daemon.status()["paths"]["missing"] == 0
