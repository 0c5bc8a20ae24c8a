"""What a real start waited for, also when its container and its worker are gone."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

from testbed.binary_cache import HttpCache
from testbed.fusesnap_daemon import PROGRAM
from testbed.images import Layer
from testbed.processes import run_unchecked, wait_for_process
from testbed.synthetic import SimpleClosure

from .conftest import SHELL, NodeMaker

NixLayers = Callable[..., Layer]


def test_a_start_is_explained_when_its_container_and_its_worker_are_gone(
    make_node: NodeMaker,
    cache: HttpCache,
    simple: SimpleClosure,
    base_layer: Layer,
    nix_layers: NixLayers,
    tmp_path: Path,
) -> None:
    node = make_node(cache.url, spare=True)
    reference = node.pull([base_layer, nix_layers()])
    read = f"wc -c < {simple.large}/data; ls {simple.tree} > /dev/null"
    node.containerd.run(reference, "one", *SHELL, read)
    worker = node.daemon.status()["worker"]["pid"]
    node.daemon.start_report("one")  # what is asked for is on disk
    os.kill(worker, signal.SIGKILL)
    wait_for_process(worker, timeout=60)
    picture, page = tmp_path / "one.svg", tmp_path / "one.html"

    answer = json.loads(node.daemon.start_report("one", "--json", "--svg", picture, "--html", page))
    start = answer["start"]
    assert start["key"].endswith("/one")
    assert start["fuse"]
    assert 0 < start["prepared"] < start["chain"] + start["prepared"] <= start["seconds"]
    rows = {row["path"]: row for row in start["rows"]}
    large = rows[Path(simple.large).name]
    assert large["mine"]
    assert large["received"] > 5_000_000
    assert large["caches"] == [cache.url]
    (wait,) = [wait for wait in large["waits"] if wait["on_chain"]]
    assert wait["command"] in ("sh", "wc")
    phases = [segment["phase"] for segment in large["segments"]]
    assert [phase for phase in phases if phase in ("transfer", "verify")] == ["transfer", "verify"]
    assert Path(simple.unused).name not in rows
    assert start["bytes_by_cache"][cache.url] > 5_000_000
    for file in (picture, page):
        assert Path(simple.large).name in file.read_text()

    warm = node.containerd.run(reference, "two", *SHELL, read)
    assert warm.strip() == "5000000"
    assert "were waited for" in node.daemon.start_report("one")
    listed = node.daemon.start_report().splitlines()[1:]
    assert [line.split()[3].rpartition("/")[2] for line in listed] == ["two", "one"]
    with cache.silent(), node.containerd.started(reference, "three", *SHELL, f"ls {simple.unused}"):
        node.daemon.service.wait_until(lambda: bool(node.daemon.status()["waiting"]))
        hanging = json.loads(node.daemon.start_report("three", "--json"))["start"]
    (row,) = [row for row in hanging["rows"] if row["path"] == Path(simple.unused).name]
    assert row["waits"][-1]["error"] == "it still waits"
    assert row["waits"][-1]["on_chain"]
    unknown = run_unchecked([PROGRAM, "start-report", "--address", node.daemon.address, "none"])
    assert unknown.returncode != 0
    assert "known are, the newest first:" in unknown.stderr
    assert "/three" in unknown.stderr
