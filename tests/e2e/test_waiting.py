"""Readers that wait for a cache which says nothing: they are seen, given up, cancelled, killed, handed over."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from testbed.binary_cache import HttpCache
from testbed.containerd import Container
from testbed.fusesnap_daemon import PROGRAM
from testbed.images import Layer
from testbed.processes import run, run_unchecked, wait_for_process
from testbed.synthetic import SimpleClosure

from .conftest import Node

NixLayers = Callable[..., Layer]

# The first process reads when it is told to, says how that ended, and stays.
SCRIPT = "while [ ! -e /tmp/go ]; do sleep 0.1; done; cat {file} | wc -c; echo over; sleep 1000"
SIZE = 5_000_000  # of the file that is read


@contextlib.contextmanager
def blocked(
    node: Node,
    cache: HttpCache,
    simple: SimpleClosure,
    layers: list[Layer],
    script: str = SCRIPT,
) -> Iterator[tuple[Container, contextlib.ExitStack]]:
    """A container whose first process waits for the cache, and what ends the cache's silence when it is closed."""
    reference = node.pull(layers)
    command = ("/bin/sh", "-c", script.format(file=f"{simple.large}/data"))
    with node.containerd.started(reference, "one", *command) as container:
        container.execute("/bin/true")  # busybox is here
        with contextlib.ExitStack() as silence:
            silence.enter_context(cache.silent())
            container.execute("/bin/touch", "/tmp/go")
            node.daemon.service.wait_until(lambda: bool(waits(node, simple.large)))
            yield container, silence


def waits(node: Node, path: str) -> list[dict[str, Any]]:
    return [wait for wait in node.daemon.status()["waiting"] if wait["path"] == path]


def wait_for_the_end(node: Node, container: Container) -> str:
    """What the first process said, once its read has ended."""
    node.daemon.service.wait_until(lambda: "over" in container.log_text(), timeout=120)
    return container.log_text()


def cancel(node: Node, target: str) -> str:
    return run([PROGRAM, "cancel", "--address", node.daemon.address, target])


@pytest.fixture
def layers(base_layer: Layer, nix_layers: NixLayers) -> list[Layer]:
    return [base_layer, nix_layers()]


def test_status_shows_who_waits_for_what_and_cancel_ends_it(
    node: Node, cache: HttpCache, simple: SimpleClosure, layers: list[Layer]
) -> None:
    with blocked(node, cache, simple, layers) as (container, _):
        status = node.daemon.status()
        (wait,) = waits(node, simple.large)
        (reader,) = wait["probable_readers"]
        assert (wait["file"], wait["asked"], reader["command"]) == ("data", True, "cat")
        assert Path(f"/proc/{reader['pid']}").exists()
        assert wait["for"] in ("narinfo", "transfer")
        (key,) = wait["snapshots"]
        assert key.endswith("/one")
        assert status["depend_on_fuse"] == [key]
        said = run([PROGRAM, "status", "--address", node.daemon.address])
        assert re.search(
            rf"cat \({reader['pid']}\) in {key} .* {re.escape(simple.large)}/data$", said, re.M
        )
        assert "\x1b" not in said
        assert cancel(node, f"{simple.large}/data") == "1 waiting request answered with EIO\n"
        assert "Input/output error" in wait_for_the_end(node, container)
        (error,) = node.daemon.status()["errors"]
        assert (error["kind"], error["count"]) == ("released", 1)
        assert simple.large.rpartition("/")[2] in error["last"]
        assert "when somebody cancelled it" in node.daemon.service.log_text()
        again = run_unchecked([PROGRAM, "cancel", "--address", node.daemon.address, simple.large])
        assert again.returncode == 1
        assert "no request waits" in again.stderr
    # Nothing was remembered that is not so: the next reader gets the file.
    reference = node.pull(layers)
    counted = node.containerd.run(reference, "two", "/bin/sh", "-c", f"wc -c < {simple.large}/data")
    assert counted.strip() == str(SIZE)


@pytest.mark.parametrize("by", ["snapshot", "end of snapshot", "process"])
def test_a_wait_is_cancelled_by_container_or_process(
    node: Node, cache: HttpCache, simple: SimpleClosure, layers: list[Layer], by: str
) -> None:
    with blocked(node, cache, simple, layers) as (container, _):
        (wait,) = waits(node, simple.large)
        key, pid = wait["snapshots"][0], wait["probable_readers"][0]["pid"]
        target = {"snapshot": key, "end of snapshot": "one", "process": str(pid)}[by]
        assert cancel(node, target) == "1 waiting request answered with EIO\n"
        assert "Input/output error" in wait_for_the_end(node, container)


def test_what_names_nothing_is_refused(node: Node, simple: SimpleClosure) -> None:
    for target, said in (("no-such", "active snapshot"), ("/etc/passwd", "a path in /nix/store")):
        done = run_unchecked([PROGRAM, "cancel", "--address", node.daemon.address, target])
        assert done.returncode != 0
        assert said in done.stderr
    done = run_unchecked([PROGRAM, "cancel", "--address", node.daemon.address, str(os.getpid())])
    assert done.returncode == 1


def test_a_container_that_waits_is_killed_and_deleted(
    node: Node, cache: HttpCache, simple: SimpleClosure, layers: list[Layer]
) -> None:
    # exec: it is the first process itself that waits, and that containerd waits for.
    script = "while [ ! -e /tmp/go ]; do sleep 0.1; done; exec cat {file}"
    with blocked(node, cache, simple, layers, script) as (container, _):
        pid = container.pid
        node.containerd.ctr("tasks", "kill", "--signal", "KILL", "one")
        wait_for_process(pid, timeout=60)  # its shim reaps it
        node.containerd.ctr("tasks", "delete", "--force", "one")
        node.containerd.ctr("containers", "delete", "one")
        assert not waits(node, simple.large)
        assert "its reader was killed" in node.daemon.service.log_text()
        # The snapshot is gone as well, and with it the last user of FUSE.
        keys = node.containerd.ctr("snapshots", "--snapshotter", "fusesnap", "ls")
        assert "one" not in [line.split()[0] for line in keys.splitlines()]
        assert node.daemon.status()["depend_on_fuse"] == []


def test_without_progress_a_reader_gets_an_error_that_says_why(
    make_node: Callable[..., Node],
    cache: HttpCache,
    simple: SimpleClosure,
    layers: list[Layer],
    tmp_path: Path,
) -> None:
    (tmp_path / "fusesnap.toml").write_text("[fetch]\nstall-timeout = 3\n")
    node = make_node(cache.url, options=["--config", str(tmp_path / "fusesnap.toml")])
    with blocked(node, cache, simple, layers) as (container, _):
        assert "Input/output error" in wait_for_the_end(node, container)
        (error,) = node.daemon.status()["errors"]
        assert (error["kind"], error["cache"], error["count"]) == ("deadline", cache.url, 1)
        assert "no progress for 3 s: 0 of " in error["last"]
        assert error["last"] in node.daemon.service.log_text()


@pytest.mark.parametrize("relay", ["never", "always"])
def test_a_worker_that_is_told_to_stop_leaves_its_readers_to_the_next(
    make_node: Callable[..., Node],
    cache: HttpCache,
    simple: SimpleClosure,
    layers: list[Layer],
    relay: str,
) -> None:
    node = make_node(cache.url, spare=True, options=["--relay", relay])
    with blocked(node, cache, simple, layers) as (container, silence):
        worker = node.daemon.status()["worker"]["pid"]
        os.kill(worker, signal.SIGTERM)
        wait_for_process(worker, timeout=60)

        def waits_again() -> bool:
            status = node.daemon.status()
            return status["worker"]["pid"] not in (None, worker) and bool(waits(node, simple.large))

        node.daemon.service.wait_until(waits_again, timeout=60)
        silence.close()
        assert wait_for_the_end(node, container).split() == [str(SIZE), "over"]


def test_status_answers_while_the_worker_does_not(
    make_node: Callable[..., Node], cache: HttpCache, layers: list[Layer], tmp_path: Path
) -> None:
    (tmp_path / "fusesnap.toml").write_text("watchdog = 0\n")  # nobody replaces it
    node = make_node(cache.url, options=["--config", str(tmp_path / "fusesnap.toml")])
    reference = node.pull(layers)
    with node.containerd.started(reference, "one", "/bin/sleep", "1000"):
        worker = node.daemon.status()["worker"]["pid"]
        os.kill(worker, signal.SIGSTOP)
        try:
            status = node.daemon.status()
            said = run([PROGRAM, "status", "--address", node.daemon.address])
        finally:
            os.kill(worker, signal.SIGCONT)
        assert status["worker"]["pid"] is None
        assert "no answer to 'status'" in status["worker"]["error"]
        assert [key.rpartition("/")[2] for key in status["depend_on_fuse"]] == ["one"]
        assert status["paths"]["missing"] > 0
        assert "no worker answers" in said
