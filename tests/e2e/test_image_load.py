"""Images brought to a node, and their closures, before somebody needs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from testbed.binary_cache import HttpCache, SigningKey
from testbed.processes import CommandFailed, run
from testbed.synthetic import SimpleClosure

from .conftest import Node, NodeMaker

LOGGED = "fusesnap fusesnap.daemon.preload: "
FUSESNAP = Path(sys.executable).with_name("fusesnap")


def fusesnap(*arguments: object) -> str:
    """Run a command of ours and return what it says. Raises CommandFailed."""
    return run([str(word) for word in (FUSESNAP, *arguments)])


def test_loaded_and_prefetched(
    node: Node, cache: HttpCache, simple: SimpleClosure, key: SigningKey, work: Path
) -> None:
    source = ["-s", cache.url, "--trusted-public-key", key.public]
    place = [*source, "--state", node.daemon.state, "--address", node.daemon.address]
    place += ["--containerd-address", node.containerd.address]
    archive = work / "a.tar"
    own = ["--state", work / "b", *source, "-t", "registry.example/loaded:1"]
    fusesnap("image", "build", simple.script, "-o", archive, *own)
    said = fusesnap("image", "load", archive, *place)
    assert said.startswith("registry.example/loaded:1@sha256:")
    assert node.containerd.run("registry.example/loaded:1", "one") == "hello from a store path\n"
    # A package of which no image was ever made, under a short name.
    fusesnap("image", "load", f"nix:0{simple.busybox}", "busybox", *place)
    command = [f"{simple.busybox}/bin/echo", "from a package"]
    said = node.containerd.run("docker.io/library/busybox:latest", "two", *command)
    assert said == "from a package\n"
    leases = node.containerd.ctr("leases", "ls", "--quiet")
    assert leases.strip() == ""
    # An image that containerd has; the closure is complete then.
    settings = work / "containerd.toml"
    settings.write_text(f'containerd-address = "{node.containerd.address}"\n')
    name = "registry.example/loaded:1"
    said = fusesnap("prefetch", name, archive, "--config", settings, "--state", work / "p", *source)
    assert said.endswith("2 fetched, the rest was there\n")
    for wrong, reason in (
        ("registry.example/absent:1", "containerd has no such image"),
        ("NO SUCH", "expected a store path, an image's file, or its name"),
    ):
        with pytest.raises(CommandFailed, match=reason):
            fusesnap("prefetch", wrong, "--config", settings, "--state", work / "p", *source)


def test_preloaded_at_start(
    make_node: NodeMaker, cache: HttpCache, simple: SimpleClosure, work: Path
) -> None:
    settings = work / "preload.toml"
    reference = f"nix:0{simple.script}:latest"
    settings.write_text(f'[preload]\npaths = ["{reference}"]\n')
    node = make_node(cache.url, options=["--config", str(settings)])
    node.daemon.service.wait_for_line(f"{LOGGED}preload: {reference}: 2 paths")
    cache.clear_requests()
    # What is preloaded stays as long as the daemon runs.
    fusesnap("store", "gc", "--state", node.daemon.state)
    said = fusesnap("prefetch", simple.script, "--state", node.daemon.state, "-s", cache.url)
    assert said.endswith("0 fetched, the rest was there\n")
    assert cache.requests() == []


def test_without_containerd_it_says_so(simple: SimpleClosure, work: Path) -> None:
    command = [FUSESNAP, "image", "load", work / "absent.tar", "x", "--state", work / "s"]
    done = subprocess.run(
        [*map(str, command), "--containerd-address", str(work / "absent.sock")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 74
    assert "absent.tar: No such file or directory" in done.stderr
