"""A real container starts lazily from a real signed binary cache."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from testbed.binary_cache import HttpCache, SigningKey
from testbed.containerd import Container
from testbed.fusesnap_daemon import Source, prefetch
from testbed.images import Layer, NixLayerManner
from testbed.nix_store import CONFIGURATION, NixStore
from testbed.processes import run
from testbed.synthetic import SimpleClosure

from fusesnap.nix.tree import STORE_MTIME_NS

from .conftest import Node
from .reading import fingerprint, restored, without_times

NixLayers = Callable[..., Layer]


def overlay_line(container: Container) -> str:
    """The line of the container's root in its mount table."""
    return next(line for line in container.mounts().splitlines() if line.split()[4] == "/")


@pytest.mark.parametrize("manner", NixLayerManner)
def test_a_cold_start_fetches_only_what_it_touches(
    node: Node,
    cache: HttpCache,
    simple: SimpleClosure,
    list_path: str,
    nix_layers: NixLayers,
    base_layer: Layer,
    manner: NixLayerManner,
) -> None:
    # ctr of containerd 1.6 passes no annotations on, so all three are recognised by content there.
    reference = node.pull([base_layer, nix_layers(manner)])
    assert cache.requested_nars([*simple.closure.paths, list_path]) == set()
    said = node.containerd.run(reference, "one", f"{simple.root}/bin/echo", "hello")
    assert said == "hello\n"
    # Single files are on their way from the start: nothing can be said of one, not even its kind, before it is there.
    files = {simple.file, simple.script, simple.empty, simple.text}
    assert cache.requested_nars(simple.closure.paths) - files == {simple.root, simple.busybox}


def test_what_one_container_fetched_the_next_one_has(
    node: Node, cache: HttpCache, simple: SimpleClosure, nix_layers: NixLayers, base_layer: Layer
) -> None:
    reference = node.pull([base_layer, nix_layers()])
    with node.containerd.started(reference, "one", "/bin/sleep", "1000") as one:
        first = one.execute("/bin/cat", f"{simple.tree}/self")
        cache.clear_requests()
        with node.containerd.started(reference, "two", "/bin/sleep", "1000") as two:
            assert two.execute("/bin/cat", f"{simple.tree}/self") == first
        assert one.execute("/bin/cat", f"{simple.tree}/self") == first
    assert cache.requested_nars(simple.closure.paths) == set()


def test_a_complete_closure_has_no_fuse_and_asks_nothing(
    node: Node,
    cache: HttpCache,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
    key: SigningKey,
) -> None:
    reference = node.pull([base_layer, nix_layers()])
    with node.containerd.started(reference, "cold", "/bin/sleep", "1000") as cold:
        assert f"{node.daemon.state}/lazy" in overlay_line(cold)
    prefetch(node.daemon.state, [simple.root], source=Source([cache.url], [key.public]))
    cache.clear_requests()
    with node.containerd.started(reference, "warm", "/bin/sleep", "1000") as warm:
        assert f"{node.daemon.state}/lazy" not in overlay_line(warm)
        assert warm.execute("/bin/cat", simple.text) == "a text that is its own address\n"
    assert cache.requests() == []


def test_without_the_cache_what_is_complete_still_starts(
    node: Node,
    cache: HttpCache,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
    key: SigningKey,
) -> None:
    reference = node.pull([base_layer, nix_layers()])
    prefetch(node.daemon.state, [simple.root], source=Source([cache.url], [key.public]))
    cache.stop()
    said = node.containerd.run(reference, "one", "/bin/sh", "-c", f"{simple.script}; echo done")
    assert said == "hello from a store path\ndone\n"
    # Another image of the same closure needs no cache either.
    other = node.pull([nix_layers(), base_layer])
    assert node.containerd.run(other, "two", "/bin/echo", "again") == "again\n"


def test_a_cold_container_reads_the_same_as_nix_restores(
    node: Node,
    nix_store: NixStore,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
    tmp_path: Path,
) -> None:
    reference = node.pull([base_layer, nix_layers()])
    with node.containerd.started(reference, "one", "/bin/sleep", "1000") as container:
        for path in simple.closure.paths:
            expected = fingerprint(restored(nix_store, path, tmp_path), "/.")
            found = fingerprint(container.root(), path)
            assert without_times(found) == without_times(expected), path
            assert all(
                entry[-1] == STORE_MTIME_NS for entry in found.values() if entry[0] == stat.S_IFDIR
            )


def test_after_a_lazy_run_real_nix_finds_the_store_clean(
    node: Node,
    cache: HttpCache,
    nix_store: NixStore,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
    key: SigningKey,
) -> None:
    reference = node.pull([base_layer, nix_layers()])
    node.containerd.run(reference, "one", "/bin/sh", "-c", f"cat {simple.large}/data | sha256sum")
    ours = store_url(node.daemon.state)
    verify(ours)
    prefetch(node.daemon.state, [simple.root], source=Source([cache.url], [key.public]))
    verify(ours)
    for question in ("--references", "--requisites", "--deriver", "--hash", "--size"):
        for path in simple.closure.paths:
            assert query(ours, question, path) == query(nix_store.uri, question, path)


def store_url(state: Path) -> str:
    """The URL by which real Nix opens our store."""
    real = state.resolve()
    return (
        f"local?store=/nix/store&real={real}/layer/.fusesnap-store&state={real}/nix&log={real}/log"
    )


def verify(url: str) -> None:
    run(["nix-store", "--store", url, "--verify", "--check-contents"], env=CONFIGURATION)


def query(url: str, question: str, path: str) -> list[str]:
    return sorted(
        run(["nix-store", "--store", url, "-q", question, path], env=CONFIGURATION).splitlines()
    )
