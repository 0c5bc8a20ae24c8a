"""Garbage of a node: what an image stands for stays as long as the image does, and goes when there is need."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from testbed.binary_cache import HttpCache, SigningKey
from testbed.containerd import Container
from testbed.fusesnap_daemon import PROGRAM, Source, prefetch
from testbed.images import Layer
from testbed.nix_store import CONFIGURATION
from testbed.processes import run, running
from testbed.synthetic import SimpleClosure

from .conftest import Node, NodeMaker

NixLayers = Callable[..., Layer]


def collect(node: Node, *options: str) -> dict[str, Any]:
    """What ``fusesnap store gc --json`` says it did."""
    command: list[str | Path] = [
        PROGRAM,
        "store",
        "gc",
        "--json",
        "--state",
        node.daemon.state,
        *options,
    ]
    report: dict[str, Any] = json.loads(run(command))
    return report


def committed(node: Node) -> set[str]:
    names = (path.name for path in (node.daemon.state / "layer/.fusesnap-store").iterdir())
    return {f"/nix/store/{name}" for name in names if not name.endswith((".links", ".lock"))}


def nix(node: Node, *words: str) -> set[str]:
    state = node.daemon.state.resolve()
    url = f"local?store=/nix/store&real={state}/layer/.fusesnap-store&state={state}/nix"
    said = run(["nix-store", "--store", f"{url}&log={state}/log", *words], env=CONFIGURATION)
    return set(said.split())


def read(container: Container, path: str) -> str:
    """A file as the container sees it."""
    return (container.root() / path.removeprefix("/")).read_text()


def remove_image(node: Node, reference: str) -> None:
    """Remove an image; containerd collects its snapshots then."""
    node.containerd.ctr("images", "rm", "--sync", reference)


def test_an_image_keeps_its_closure_until_it_is_deleted(
    make_node: NodeMaker,
    cache: HttpCache,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
    key: SigningKey,
    work: Path,
) -> None:
    (work / "often.toml").write_text("[store]\ncheck-every = 0.1\n")
    node = make_node(cache.url, options=["--config", str(work / "often.toml")])
    closure = set(simple.closure.paths)
    other, reference = node.pull([base_layer]), node.pull([base_layer, nix_layers()])
    # Cold: what is committed is not valid, and real Nix collects nothing of it either.
    with node.containerd.started(reference, "cold", "/bin/sleep", "1000") as cold:
        read(cold, f"{simple.tree}/self")
        before = committed(node)
        assert before < closure
        assert collect(node)["removed"] == []
        nix(node, "--gc")
        assert before <= committed(node) < closure
        assert read(cold, f"{simple.tree}/wide/file-7") == "7\n"
    prefetch(node.daemon.state, [simple.root], source=Source([cache.url], [key.public]))
    assert collect(node)["removed"] == []
    with node.containerd.started(reference, "warm", "/bin/sleep", "1000") as warm:
        remove_image(node, reference)  # the container's snapshot needs it still
        assert collect(node)["removed"] == []
        assert closure <= nix(node, "--gc", "--print-live")
        assert read(warm, simple.text) == "a text that is its own address\n"
    remove_image(node, other)  # containerd collects what the container has left, too
    node.daemon.service.wait_until(lambda: collect(node, "--dry-run")["freed"] > 0)
    would = collect(node, "--dry-run")
    assert set(would["removed"]) == committed(node) == closure
    status = node.daemon.status()["store"]
    assert (status["size"], status["collectable_size"]) == (would["size"], would["freed"])
    assert "paths not in use" in run([PROGRAM, "status", "--address", node.daemon.address])
    partly = collect(node, "--max-size", str(would["size"] - 1))
    assert 0 < partly["freed"] < would["freed"]
    nix(node, "--verify", "--check-contents")
    assert partly["freed"] + collect(node)["freed"] == would["freed"]
    assert committed(node) == set()
    # And all over again: nothing of what was known stands in the way.
    again = node.pull([base_layer, nix_layers()])
    assert node.containerd.run(again, "again", "/bin/cat", simple.text).startswith("a text")


def test_the_daemon_keeps_the_store_within_its_limit(
    make_node: NodeMaker,
    cache: HttpCache,
    simple: SimpleClosure,
    list_path: str,
    nix_layers: NixLayers,
    base_layer: Layer,
    key: SigningKey,
    work: Path,
) -> None:
    configuration = work / "limits.toml"
    configuration.write_text('[store]\nmax-size = "1M"\ncheck-every = 0.1\n')
    node = make_node(cache.url, options=["--config", str(configuration)])
    reference = node.pull([base_layer, nix_layers()])
    with node.containerd.started(reference, "one", "/bin/sleep", "1000") as container:
        # In use, it may be beyond the limit; what nobody needs goes, while the container reads.
        assert (container.root() / simple.large[1:] / "data").stat().st_size == 5_000_000
        prefetch(node.daemon.state, [list_path], source=Source([cache.url], [key.public]))
        assert simple.large in committed(node)
        node.daemon.service.wait_until(lambda: list_path not in committed(node))
        assert simple.large in committed(node)
        assert read(container, f"{simple.tree}/wide/file-7") == "7\n"
    node.daemon.service.wait_until(
        lambda: "all that is left is in use" in node.daemon.service.log_text()
    )
    remove_image(node, reference)
    node.daemon.service.wait_until(lambda: node.daemon.status()["store"]["size"] <= 1 << 20)


def test_a_path_that_vanishes_under_a_cold_container_is_fetched_again(
    node: Node, simple: SimpleClosure, nix_layers: NixLayers, base_layer: Layer
) -> None:
    reference = node.pull([base_layer, nix_layers()])
    with node.containerd.started(reference, "one", "/bin/sleep", "1000") as container:
        assert read(container, f"{simple.tree}/self").startswith("this path is")
        name = Path(simple.tree).name
        run(["rm", "-r", node.daemon.state / "layer/.fusesnap-store" / name])
        assert read(container, f"{simple.tree}/wide/file-7") == "7\n"
        assert simple.tree in committed(node)


def test_a_standalone_mount_keeps_what_it_shows(
    work: Path, cache: HttpCache, simple: SimpleClosure, key: SigningKey
) -> None:
    source = Source([cache.url], [key.public])
    (work / "m").mkdir()
    command: Sequence[str | Path] = [PROGRAM, "mount", "--state", work / "s", *source.options]
    gc: Sequence[str | Path] = [PROGRAM, "store", "gc", "--state", work / "s"]
    with running([*command, simple.root, work / "m"], log=work / "log") as mount:
        mount.wait_for_line(f"{simple.root} is mounted")
        file = work / "m" / simple.tree.removeprefix("/") / "wide/file-7"
        assert file.read_text() == "7\n"
        assert "freed: 0 B in 0 paths" in run(gc)
        assert mount.stop() == 0
    freed = run(gc)  # what it refers to may have been fetched ahead
    assert "in 0 paths" not in freed.partition("left:")[0]
    assert "left: 0 B in 0 paths" in freed
