"""Containers on a cache that ``fusesnap publish`` has written: the unit of laziness is a chunk."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from testbed.binary_cache import CacheFiles, HttpCache, Request, SigningKey, http_cache
from testbed.containerd import Container
from testbed.fusesnap_daemon import Source, prefetch
from testbed.images import Layer
from testbed.nix_store import CONFIGURATION, NixStore
from testbed.processes import run
from testbed.synthetic import SimpleClosure

from .conftest import Node, NodeMaker

NixLayers = Callable[..., Layer]
KIB = 1024


@pytest.fixture
def published_cache(published: CacheFiles, tmp_path: Path) -> Iterator[HttpCache]:
    with http_cache(published, tmp_path / "published-nginx") as running:
        yield running


@pytest.fixture
def container(
    make_node: NodeMaker,
    published_cache: HttpCache,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
) -> Iterator[tuple[Node, Container]]:
    node = make_node(published_cache.url, spare=True)
    reference = node.pull([base_layer, nix_layers()])
    with node.containerd.started(reference, "one", f"{simple.root}/bin/sleep", "1000") as started:
        yield node, started


def of_path(cache: HttpCache, path: str) -> list[Request]:
    """The requests for a path's NAR."""
    name = "/" + cache.files.narinfo(path)["URL"]
    return [request for request in cache.requests() if request.path == name]


def large_file(store: NixStore, simple: SimpleClosure) -> tuple[str, bytes]:
    (file,) = store.real(simple.large).rglob("*")
    return f"{simple.large}/{file.name}", file.read_bytes()


def test_a_few_kilobytes_of_a_large_path_are_all_that_is_fetched(
    container: tuple[Node, Container],
    published_cache: HttpCache,
    nix_store: NixStore,
    simple: SimpleClosure,
    key: SigningKey,
) -> None:
    node, one = container
    name, contents = large_file(nix_store, simple)
    assert len(contents) == 5_000_000
    # Names, kinds and sizes come from the index; of single files too.
    assert one.execute("/bin/stat", "-c", "%s", name).strip() == "5000000"
    for path in (simple.large, simple.file, simple.tree, simple.unused):
        assert of_path(published_cache, path) == []
    middle = ["/bin/dd", f"if={name}", "bs=4096", "skip=700", "count=2"]
    digest = one.execute("/bin/sh", "-c", " ".join(middle) + " 2>/dev/null | sha256sum")
    assert digest.split()[0] == sha256(contents[700 * 4096 : 702 * 4096])
    asked = of_path(published_cache, simple.large)
    assert {request.status for request in asked} == {206}
    assert 8 * KIB <= sum(request.size for request in asked) <= 600 * KIB
    assert not (node.daemon.state / "layer/.fusesnap-store" / Path(simple.large).name).exists()

    # What is there survives the process, and the cache is not asked for it again.
    published_cache.clear_requests()
    os.kill(worker_of(node), signal.SIGKILL)
    again = one.execute("/bin/sh", "-c", " ".join(middle) + " 2>/dev/null | sha256sum")
    assert again == digest
    assert of_path(published_cache, simple.large) == []

    # Somebody else commits it meanwhile: then it is a path as any other.
    prefetch(node.daemon.state, [simple.root], source=Source([published_cache.url], [key.public]))
    whole = one.execute("/bin/sha256sum", name).split()[0]
    assert whole == sha256(contents)
    url = (
        f"local?store=/nix/store&real={node.daemon.state}/layer/.fusesnap-store"
        f"&state={node.daemon.state}/nix&log={node.daemon.state}/log"
    )
    run(["nix-store", "--store", url, "--verify", "--check-contents"], env=CONFIGURATION)
    valid = run(
        ["nix-store", "--store", url, "--query", "--requisites", simple.root], env=CONFIGURATION
    )
    assert set(valid.split()) == set(simple.closure.paths)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def worker_of(node: Node) -> int:
    """The process that answers the kernel."""
    program = Path(sys.executable).with_name("fusesnap")
    status = run([program, "status", "--json", "--address", node.daemon.address])
    return int(json.loads(status)["worker"]["pid"])
