"""Containers with user namespaces: whose files are, what is fetched, what is written, and what is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from testbed.binary_cache import HttpCache, SigningKey
from testbed.containerd import mounts_below
from testbed.debian import containerd_release
from testbed.fusesnap_daemon import Source, fusesnap_daemon, prefetch
from testbed.images import Layer
from testbed.processes import run
from testbed.synthetic import SimpleClosure

from .conftest import Node, NodeMaker

NixLayers = Callable[..., Layer]
MAPPING = ("--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536")


def run_mapped(node: Node, reference: str, name: str, script: str, *options: str) -> list[str]:
    """Run a shell in a container with a user namespace; returns the lines that it prints."""
    return run_shell(node, reference, name, script, *MAPPING, *options)


def run_shell(node: Node, reference: str, name: str, script: str, *options: str) -> list[str]:
    """Run a shell in a container; returns the lines that it prints.

    They go to a file: ``ctr`` may end before it has opened the other end of a pipe that was written to.
    """
    log = node.work / f"{name}.log"
    own = ("--rm", "--log-uri", f"file://{log}", *options)
    run(node.containerd.run_command(reference, name, "/bin/sh", "-c", script, options=own))
    return log.read_text().splitlines()


def check_container(node: Node, simple: SimpleClosure, said: Sequence[str]) -> None:
    """What :func:`look_and_write` says."""
    assert said[:7] == ["0:0"] * 7
    assert said[7:] == [
        f"this path is {simple.tree}",
        "a store path that is a file",
        "100000 65536",
        "200000 65536",
        "0:0 /new",
        f"0:0 {simple.tree}/new",
        f"1000:7 {simple.tree}/self",
        "changed",
    ]


def look_and_write(simple: SimpleClosure) -> str:
    """Look at the image's files and the store's, and change some."""
    return f"""
        stat -c %u:%g / /etc/hostname /nix /nix/store {simple.tree} {simple.tree}/self {simple.file}
        cat {simple.tree}/self {simple.file}
        awk '{{ print $2, $3 }}' /proc/self/uid_map /proc/self/gid_map
        echo new > /new && chmod u+w {simple.tree} && echo new > {simple.tree}/new
        chown 1000:7 {simple.tree}/self && chmod u+w {simple.file} && echo changed > {simple.file}
        stat -c '%u:%g %n' /new {simple.tree}/new {simple.tree}/self
        cat {simple.file}
    """


def idmapped(node: Node) -> list[Path]:
    """Where snapshots have idmapped mounts. containerd removes snapshots when it collects: it is made to."""
    node.containerd.ctr("content", "prune", "references")
    return list((node.daemon.state / "idmapped").glob("*"))


def test_containerd_2_has_the_layers_mapped_cold_and_warm(
    make_node: NodeMaker,
    cache: HttpCache,
    key: SigningKey,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
) -> None:
    node = make_node(cache.url, release=containerd_release("2"), remap_ids=True)
    node.work.chmod(0o711)  # runc goes to the container's root as the container's root
    reference = node.pull([base_layer, nix_layers()])
    script = look_and_write(simple)
    check_container(node, simple, run_mapped(node, reference, "cold", script, "--remap-labels"))
    assert not cache.requested_nars([simple.large, simple.unused])
    assert not idmapped(node)

    ask = ("snapshots", "--snapshotter", "fusesnap", "mounts", "/mnt")
    options = ("--detach", *MAPPING, "--remap-labels")
    argv = ("/bin/sleep", "1000")
    run(node.containerd.run_command(reference, "still-cold", *argv, options=options))
    (place,) = idmapped(node)
    assert f"{place}/lazy/layer" in node.containerd.ctr(*ask, "still-cold")
    assert len(node.daemon.status()["depend_on_fuse"]) == 1

    prefetch(node.daemon.state, [simple.root], source=Source([cache.url], [key.public]))
    check_container(node, simple, run_mapped(node, reference, "warm", script, "--remap-labels"))
    run(node.containerd.run_command(reference, "still-warm", *argv, options=options))
    said = node.containerd.ctr(*ask, "still-warm")
    assert "uidmap=0:100000:65536,gidmap=0:200000:65536" in said
    assert "lazy" not in said
    assert len(node.daemon.status()["depend_on_fuse"]) == 1
    # Without a user namespace the same files are the host's root's.
    stat = f"stat -c %u:%g /etc/hostname {simple.tree}"
    assert run_shell(node, reference, "plain", stat) == ["0:0", "0:0"]

    for name in ("still-cold", "still-warm"):
        node.containerd.remove(name)
    assert not idmapped(node)


def test_a_cold_one_starts_again_after_the_daemon(
    make_node: NodeMaker,
    cache: HttpCache,
    key: SigningKey,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
) -> None:
    node = make_node(cache.url, release=containerd_release("2"), remap_ids=True)
    node.work.chmod(0o711)
    reference = node.pull([base_layer, nix_layers()])
    options = ("--detach", *MAPPING, "--remap-labels")
    run(node.containerd.run_command(reference, "one", "/bin/sleep", "1000", options=options))
    (place,) = idmapped(node)
    assert mounts_below(place) == [f"{place}/state", f"{place}/lazy"]
    assert node.daemon.service.stop() == 0
    assert not mounts_below(node.daemon.state)
    with fusesnap_daemon(node.daemon.state, source=Source([cache.url], [key.public])):
        assert mounts_below(place) == [f"{place}/state", f"{place}/lazy"]
        container = node.containerd.restart_task("one")
        stat = f"stat -c %u:%g {simple.tree}/wide/file-9 > /said"
        container.execute("/bin/sh", "-c", stat)
        assert (container.root() / "said").read_text() == "0:0\n"
        node.containerd.remove("one")
        assert not idmapped(node)


@pytest.mark.parametrize("version", ["1.6", "1.7", "2"])
def test_an_image_that_containerd_rewrites_is_not_fetched_for_it(
    make_node: NodeMaker,
    cache: HttpCache,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
    version: str,
) -> None:
    node = make_node(cache.url, release=containerd_release(version))
    node.work.chmod(0o711)
    reference = node.pull([base_layer, nix_layers()])
    for name in ("first", "second"):
        check_container(node, simple, run_mapped(node, reference, name, look_and_write(simple)))
    assert not cache.requested_nars([simple.large, simple.unused])
    assert not idmapped(node)
