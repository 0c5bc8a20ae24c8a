"""Images brought to a node, and their closures, before somebody needs them."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from testbed.binary_cache import CacheFiles, HttpCache, SigningKey
from testbed.processes import CommandFailed, run
from testbed.synthetic import SimpleClosure

from .commands import fusesnap
from .conftest import Node, NodeMaker

LOGGED = "fusesnap fusesnap.daemon.preload: "
FUSESNAP = Path(sys.executable).with_name("fusesnap")


@pytest.fixture
def shell(
    node: Node, cache: HttpCache, simple: SimpleClosure, key: SigningKey, work: Path
) -> Callable[[str], str]:
    """Runs commands of docs/images.md: on this node, with its registry, and with a store path that its cache has."""
    settings = work / "fusesnap.toml"
    settings.write_text(
        f'root = "{node.daemon.state}"\naddress = "{node.daemon.address}"\n'
        f'containerd-address = "{node.containerd.address}"\n'
        f'substituters = ["{cache.url}"]\ntrusted-public-keys = ["{key.public}"]\n'
    )
    programs = work / "bin"
    programs.mkdir()
    run_words = shlex.join(node.containerd.run_command("IMAGE", "NAME")[1:-2])
    for name, command in (
        ("fusesnap", f'exec {FUSESNAP} "$@" --config {settings}'),
        ("ctr", f'shift 4; exec {node.containerd.command()[0]} {run_words} "$@"'),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{command}\n")
        (programs / name).chmod(0o755)
    host = node.registry.reference("x").partition("/")[0]

    def run_shell(text: str) -> str:
        words = text.replace("STORE_PATH", simple.busybox).replace("registry.example.org", host)
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
        return run(["sh", "-exc", words], env=environment, cwd=work, timeout=120)

    return run_shell


def test_what_the_documentation_says_works(
    node: Node, cache: HttpCache, shell: Callable[[str], str]
) -> None:
    text = (Path(__file__).parents[2] / "docs/images.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    said = [shell(block) for block in blocks]
    assert [block.split()[:3] for block in blocks] == [
        ["fusesnap", "image", "build"],
        ["fusesnap", "image", "build"],
        ["fusesnap", "image", "inspect"],
        ["fusesnap", "image", "push"],
        ["fusesnap", "image", "load"],
        ["fusesnap", "prefetch", "STORE_PATH"],
    ]
    assert "1 store paths" in said[2]
    assert "3 blobs with" not in said[3]
    assert f"{node.registry.reference('app:1')}@sha256:" in said[4]
    assert said[5].endswith("the rest was there\n")
    assert node.containerd.ctr("leases", "ls", "--quiet").strip() == ""
    for wrong, reason in (
        ("registry.example.org/absent:1", "containerd has no such image"),
        ("'NO SUCH'", "expected a store path, an image's file, or its name"),
    ):
        with pytest.raises(CommandFailed, match=reason):
            shell(f"fusesnap prefetch {wrong}")
    # A package of which no image was ever made, under a short name.
    shell("fusesnap image load nix:0STORE_PATH busybox")
    assert "docker.io/library/busybox:latest" in node.containerd.images()


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


def test_what_no_cache_has_is_built(
    make_node: NodeMaker,
    cache_files: CacheFiles,
    simple: SimpleClosure,
    key: SigningKey,
    work: Path,
) -> None:
    """A package of which no image was ever made, and which no cache of the node has."""
    empty = work / "empty"
    empty.mkdir()
    (empty / "nix-cache-info").write_text("StoreDir: /nix/store\n")
    script = (
        "exec nix --extra-experimental-features nix-command copy --no-check-sigs"
        f' --from file://{cache_files.directory} --to "$FUSESNAP_STORE" "$1"'
    )
    settings = work / "builder.toml"
    settings.write_text(f"[builder]\ncommand = {json.dumps(['sh', '-c', script, 'builder'])}\n")
    node = make_node(f"file://{empty}", options=["--config", str(settings)])
    place = ["--state", node.daemon.state, "--address", node.daemon.address]
    place += ["--containerd-address", node.containerd.address, "--config", settings]
    place += ["-s", f"file://{empty}", "--trusted-public-key", key.public]
    fusesnap("image", "load", f"nix:0{simple.script}", "built", *place)
    said = node.containerd.run("docker.io/library/built:latest", "one")
    assert said == "hello from a store path\n"
    with pytest.raises(CommandFailed) as caught:
        fusesnap("prefetch", f"/nix/store/{'0' * 32}-absent", *place[:2], *place[6:])
    assert "no substituter has it" in str(caught.value)
    assert "; builder sh -c " in str(caught.value)


def test_what_is_said_where_nothing_can_be_loaded(work: Path) -> None:
    place = ["--state", work / "s", "--containerd-address", work / "absent.sock"]
    with pytest.raises(CommandFailed, match=r"74: .*absent.tar: No such file or directory"):
        fusesnap("image", "load", work / "absent.tar", "x", *place)
