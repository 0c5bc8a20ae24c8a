"""Starts are recorded as they are, and the next start is fetched in that order before it asks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from testbed.binary_cache import CacheFiles, HttpCache, SigningKey, http_cache
from testbed.containerd import Containerd, containerd
from testbed.fusesnap_daemon import PROGRAM, FusesnapDaemon, Source, fusesnap_daemon
from testbed.images import Layer
from testbed.processes import run
from testbed.synthetic import SimpleClosure

from .conftest import NodeMaker

NixLayers = Callable[..., Layer]


def trace(state: Path, *words: str | Path) -> str:
    return run([PROGRAM, "trace", *words, "--state", state])


def recorded(daemon: FusesnapDaemon) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads(trace(daemon.state, "list", "--json"))
    return listed


def nars(cache: HttpCache, paths: Sequence[str]) -> list[str]:
    """Those of ``paths`` whose NARs were sent, in order."""
    names = {f"/{cache.files.narinfo(path)['URL']}": path for path in paths}
    return [names[each.path] for each in cache.requests() if each.path in names]


def create(client: Containerd, reference: str, name: str) -> None:
    """Create a container without starting it: nobody reads anything."""
    client.ctr("containers", "create", "--snapshotter", client.snapshotter, reference, name, "x")


def test_the_next_start_is_fetched_in_the_order_of_the_last_before_it_asks(
    make_node: NodeMaker,
    own_cache_files: CacheFiles,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
    key: SigningKey,
    work: Path,
) -> None:
    with http_cache(own_cache_files, work / "nginx") as cache:
        play(make_node, cache, simple, [base_layer, nix_layers()], key, work)


def play(
    make_node: NodeMaker,
    cache: HttpCache,
    simple: SimpleClosure,
    layers: Sequence[Layer],
    key: SigningKey,
    work: Path,
) -> None:
    # One path after another, so that nginx's log has their order.
    (work / "one.toml").write_text("[fetch]\ntransfers = 1\n")
    options = ["--config", str(work / "one.toml")]
    node = make_node(cache.url, options=options)
    reference = node.pull(layers)
    read = f"cat {simple.tree}/self; head -c 9 {simple.large}/data; cat {simple.tree}/wide/file-7"
    node.containerd.run(reference, "one", "/bin/sh", "-c", read)
    (first,) = recorded(node.daemon)
    assert first["complete"]
    assert first["program"] == "busybox/bin/busybox"
    order = [simple.root, simple.busybox, simple.tree, simple.large]
    found = json.loads(trace(node.daemon.state, "show", "busybox", "--json"))
    assert [f"/nix/store/{each['path']}" for each in found["paths"]] == order
    files = [(found["files"][each["file"]]["name"], each["offset"]) for each in found["extents"]]
    read_in_order = [name for name, _ in files if name != "bin/busybox"]
    assert read_in_order == ["self", "data", "wide/file-7"]
    assert sum(each["length"] for each in found["extents"]) < 2_000_000  # not the 5 MB beside it

    # Put into the cache, forgotten, evicted, and pulled again: when a container is created its paths come in this
    # order, and nothing runs yet.
    exported = work / "exported"
    trace(node.daemon.state, "export", "busybox", "-o", exported)
    signed: list[str | Path] = [
        "--secret-key-file",
        key.secret_file,
        "--cache",
        cache.files.directory,
    ]
    trace(node.daemon.state, "export", "busybox", *signed)
    trace(node.daemon.state, "remove", "busybox")
    node.containerd.ctr("images", "rm", "--sync", reference)
    run([PROGRAM, "store", "gc", "--state", node.daemon.state])
    node.containerd.pull(reference)
    cache.clear_requests()
    create(node.containerd, reference, "two")
    node.daemon.service.wait_until(lambda: simple.large in nars(cache, order))
    assert nars(cache, order) == order
    assert [each["origin"] for each in recorded(node.daemon)] == ["cache"]

    # And so it is on another node, to which the trace was carried. What it has fetched so is there for the one
    # after that, of which a partial trace remains.
    source = Source([cache.url], [key.public])
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(fusesnap_daemon(work / "t", source=source, options=options))
        client = stack.enter_context(containerd(work / "d", proxy=other.address))
        trace(other.state, "import", exported)
        assert json.loads(trace(other.state, "show", "busybox", "--json")) == found
        client.pull(reference)
        cache.clear_requests()
        create(client, reference, "three")
        store = other.state / "layer/.fusesnap-store"
        other.service.wait_until(lambda: all((store / Path(each).name).exists() for each in order))
        assert nars(cache, order) == order
        client.run(reference, "four", "/bin/ls", simple.unused)

        def own() -> list[dict[str, Any]]:
            return [each for each in recorded(other) if each["origin"] == "recorded"]

        other.service.wait_until(lambda: bool(own()))
        (partial,) = own()
    there = {each["path"] for each in partial["lacks"] if each["why"] == "committed"}
    assert {path.removeprefix("/nix/store/") for path in order} <= there
    assert not partial["complete"]
