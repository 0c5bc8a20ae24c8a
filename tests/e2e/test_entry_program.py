"""What an image's configuration names is fetched when the image is pulled, before a container of it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from testbed.binary_cache import HttpCache, SigningKey
from testbed.images import Layer
from testbed.synthetic import SimpleClosure

from .conftest import NodeMaker

NixLayers = Callable[..., Layer]


@pytest.mark.parametrize("complete", [True, False])
def test_the_program_of_an_image_is_fetched_when_it_is_pulled(
    make_node: NodeMaker,
    work: Path,
    cache: HttpCache,
    simple: SimpleClosure,
    key: SigningKey,
    nix_layers: NixLayers,
    base_layer: Layer,
    complete: bool,
) -> None:
    settings = work / "fusesnap.toml"
    settings.write_text(f'containerd-address = "{work}/c/containerd.sock"\n')
    options = ["--config", str(settings), "--complete" if complete else "--no-complete"]
    node = make_node(cache.url, keys=[key.public], options=options)
    assert node.containerd.address == work / "c" / "containerd.sock"
    paths = simple.closure.paths
    node.pull([base_layer, nix_layers()], [f"{simple.root}/bin/echo", "hello"])
    if complete:
        node.daemon.service.wait_until(
            lambda: cache.requested_nars(paths) >= {simple.root, simple.busybox}
        )
    # Where bytes may cost something, nothing is fetched for a container that perhaps nobody starts.
    reference = node.pull([base_layer, nix_layers()], ["/nowhere"])
    assert cache.requested_nars(paths) == ({simple.root, simple.busybox} if complete else set())
    assert node.containerd.run(reference, "one", f"{simple.root}/bin/echo", "hello") == "hello\n"
