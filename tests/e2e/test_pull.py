"""A pull never lies: what cannot be had fails it, by name, and the same pull succeeds later."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from testbed.binary_cache import CacheFiles, HttpCache, http_cache
from testbed.images import Layer
from testbed.processes import CommandFailed, free_port
from testbed.synthetic import SimpleClosure

from .conftest import Node, NodeMaker

NixLayers = Callable[..., Layer]


def refused(node: Node, reference: str) -> str:
    """What a pull that must fail says."""
    with pytest.raises(CommandFailed) as caught:
        node.containerd.pull(reference)
    assert node.containerd.run_unchecked(reference, "never", "/bin/true").returncode != 0
    return str(caught.value)


def pull_again(node: Node, reference: str) -> None:
    """Pull once more after a failure.

    containerd collects what the failed pull left while this one runs, and may take a layer away between its own Stat
    and Prepare; then it says that the parent is not found, and is asked again.
    """
    for _ in range(4):
        with contextlib.suppress(CommandFailed):
            node.containerd.pull(reference)
            return
    node.containerd.pull(reference)


def test_a_path_that_no_cache_has_fails_the_pull_and_the_next_one_succeeds(
    make_node: NodeMaker,
    own_cache_files: CacheFiles,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
    work: Path,
) -> None:
    narinfo = own_cache_files.narinfo_file(simple.unused)
    aside = work / "aside"
    shutil.move(narinfo, aside)
    with http_cache(own_cache_files, work / "n") as cache:
        node = make_node(cache.url)
        reference = node.push([base_layer, nix_layers()])
        said = refused(node, reference)
        assert simple.unused.removeprefix("/nix/store/") in said
        assert cache.url in said
        assert simple.busybox.removeprefix("/nix/store/") not in said
        shutil.move(aside, narinfo)
        pull_again(node, reference)
        assert node.containerd.run(reference, "now", "/bin/cat", f"{simple.text}").startswith(
            "a text"
        )


def test_a_cache_that_is_down_fails_the_pull_and_the_next_one_succeeds(
    make_node: NodeMaker,
    cache: HttpCache,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
) -> None:
    cache.stop()
    node = make_node(cache.url)
    reference = node.push([base_layer, nix_layers()])
    said = refused(node, reference)
    assert cache.url in said
    cache.start()
    pull_again(node, reference)
    assert node.containerd.run(reference, "now", "/bin/echo", "here") == "here\n"


def test_another_cache_serves_what_the_first_has_not(
    make_node: NodeMaker,
    cache: HttpCache,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
) -> None:
    node = make_node(f"http://127.0.0.1:{free_port()}", cache.url)
    reference = node.pull([base_layer, nix_layers()])
    assert node.containerd.run(reference, "one", "/bin/echo", "here") == "here\n"
    states = {each["url"]: each for each in node.daemon.status()["caches"]}
    assert states[cache.url]["reachable"] is True


def test_an_unsigned_closure_is_refused(
    make_node: NodeMaker,
    own_cache_files: CacheFiles,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
    work: Path,
) -> None:
    narinfo = own_cache_files.narinfo_file(simple.busybox)
    lines = narinfo.read_text().splitlines(keepends=True)
    narinfo.write_text("".join(line for line in lines if not line.startswith("Sig:")))
    with http_cache(own_cache_files, work / "n") as cache:
        node = make_node(cache.url)
        said = refused(node, node.push([base_layer, nix_layers()]))
    assert simple.busybox.removeprefix("/nix/store/") in said
    assert "sign" in said


def test_a_damaged_nar_is_an_error_for_its_reader_and_no_wrong_byte(
    make_node: NodeMaker,
    own_cache_files: CacheFiles,
    cache: HttpCache,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
    work: Path,
) -> None:
    nar = own_cache_files.nar_file(simple.large)
    whole = nar.read_bytes()
    nar.write_bytes(whole[:-1000] + bytes([whole[-1000] ^ 1]) + whole[-999:])
    with http_cache(own_cache_files, work / "n") as damaged:
        node = make_node(damaged.url)
        reference = node.pull([base_layer, nix_layers()])
        with node.containerd.started(reference, "one", "/bin/sleep", "1000") as container:
            done = container.execute_unchecked("/bin/cat", f"{simple.large}/data")
            assert done.returncode != 0
            assert "Input/output error" in done.stderr
            assert done.stdout == ""
            assert simple.large.removeprefix("/nix/store/") in node.daemon.service.log_text()
            # Once the cache is mended the same reader gets it.
            nar.write_bytes(whole)
            size = container.execute("/bin/wc", "-c", f"{simple.large}/data").split()[0]
            assert size == "5000000"


@pytest.mark.parametrize(
    "labels_of",
    [
        lambda simple: {"containerd.io/snapshot/nix-closure": simple.root},
        lambda simple: {"containerd.io/snapshot/nix-closure": simple.root + "/bin"},
        lambda simple: {"containerd.io/snapshot/nix-closure": "../../etc"},
        lambda simple: {
            "containerd.io/snapshot/nix-layer": "true",
            "containerd.io/snapshot/nix-store-path.0": "/nix/store/..",
        },
    ],
)
def test_labels_that_are_wrong_are_refused_by_name(
    node: Node, simple: SimpleClosure, labels_of: Callable[[SimpleClosure], dict[str, str]]
) -> None:
    labels = labels_of(simple)
    prepare = ["snapshots", "--snapshotter", "fusesnap", "prepare", "one"]
    node.containerd.ctr(*prepare)
    label = [f"{key}={value}" for key, value in labels.items()]
    node.containerd.ctr("snapshots", "--snapshotter", "fusesnap", "label", "one", *label)
    done = node.containerd.ctr_unchecked(
        "snapshots", "--snapshotter", "fusesnap", "commit", "done", "one"
    )
    assert done.returncode != 0
    assert next(iter(labels)) in done.stderr or list(labels)[-1] in done.stderr
