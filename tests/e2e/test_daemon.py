"""The daemon as a process: what it says, how it ends, what it refuses."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from testbed.binary_cache import HttpCache, SigningKey
from testbed.fusesnap_daemon import PROGRAM, Source, fusesnap_daemon
from testbed.images import Layer
from testbed.processes import run, run_unchecked, running, wait_for_process
from testbed.synthetic import SimpleClosure

from .conftest import Node

NixLayers = Callable[..., Layer]


def test_status_says_where_everything_is(
    node: Node, cache: HttpCache, simple: SimpleClosure, nix_layers: NixLayers, base_layer: Layer
) -> None:
    node.pull([base_layer, nix_layers()])
    status = node.daemon.status()
    assert Path(f"/proc/{status['worker']['pid']}").exists()
    assert status["fuse_mount"] == f"{node.daemon.state}/lazy"
    assert status["state"] == str(node.daemon.state)
    paths = status["paths"]
    assert paths["committed"] + paths["missing"] == len(simple.closure.paths)
    assert paths["valid"] <= paths["committed"]
    assert [each["url"] for each in status["caches"]] == [cache.url]
    said = run([PROGRAM, "status", "--address", node.daemon.address])
    assert f"worker pid {status['worker']['pid']}" in said


def test_without_a_daemon_status_says_so(work: Path) -> None:
    done = run_unchecked([PROGRAM, "status", "--address", work / "none.sock"])
    assert done.returncode == 69
    assert "is the daemon running" in done.stderr


def test_a_second_daemon_on_the_same_state_is_refused(
    cache: HttpCache, key: SigningKey, work: Path
) -> None:
    source = Source([cache.url], [key.public])
    with fusesnap_daemon(work / "s", source=source) as first:
        command: list[str | Path] = [
            PROGRAM,
            "daemon",
            "--root",
            work / "s",
            "--address",
            work / "other.sock",
        ]
        done = run_unchecked([*command, *source.options])
        assert done.returncode == 75
        assert f"in use by another daemon (pid {first.service.pid})" in done.stderr
        assert first.status()["fuse_mount"] == str(work / "s/lazy")


def test_it_ends_cleanly_and_leaves_nothing(cache: HttpCache, key: SigningKey, work: Path) -> None:
    with fusesnap_daemon(work / "s", source=Source([cache.url], [key.public])) as daemon:
        status = daemon.status()
        assert daemon.service.stop() == 0
        for part in ("supervisor", "worker", "services"):
            wait_for_process(status[part]["pid"])
        assert str(work) not in Path("/proc/self/mountinfo").read_text()
        assert not daemon.address.exists()


def test_a_state_directory_behind_a_link_is_left_unmounted_too(
    cache: HttpCache, key: SigningKey, work: Path
) -> None:
    (work / "real").mkdir()
    (work / "s").symlink_to("real")
    source = Source([cache.url], [key.public])
    for _ in range(2):  # the second one finds nothing in its way
        with fusesnap_daemon(work / "s", source=source) as daemon:
            assert f"{work}/real/lazy" in Path("/proc/self/mountinfo").read_text()
            assert daemon.service.stop() == 0
            assert str(work) not in Path("/proc/self/mountinfo").read_text()


def test_the_daemon_imports_nothing_from_its_working_directory(
    cache: HttpCache, key: SigningKey, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("select", "trio"):
        (work / f"{module}.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(work)
    with fusesnap_daemon(work / "s", source=Source([cache.url], [key.public])) as daemon:
        assert daemon.status()["fuse_mount"] == f"{work}/s/lazy"


def test_a_file_that_holds_an_unknown_key_is_refused_by_name(work: Path) -> None:
    (work / "fusesnap.toml").write_text('substitutors = ["https://cache.example.org"]\n')
    done = run_unchecked([PROGRAM, "daemon", "--config", work / "fusesnap.toml"])
    assert done.returncode == 78
    assert f"{work}/fusesnap.toml: unknown key 'substitutors'; known are" in done.stderr


def test_an_address_that_cannot_be_used_ends_the_daemon_with_a_reason(
    cache: HttpCache, key: SigningKey, work: Path
) -> None:
    options = [*Source([cache.url], [key.public]).options, "--address", str(work / "none/x.sock")]
    done = run_unchecked([PROGRAM, "daemon", "--root", work / "s", *options])
    assert done.returncode == 74
    assert f"cannot listen on {work}/none/x.sock: No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr
    assert str(work) not in Path("/proc/self/mountinfo").read_text()


def test_a_root_that_cannot_be_made_ends_it_with_a_reason() -> None:
    done = run_unchecked([PROGRAM, "daemon", "--root", "/dev/null/state"])
    assert done.returncode == 74
    assert (
        done.stderr == "fusesnap: /dev/null/state: cannot be the state directory: Not a directory\n"
    )


def test_a_root_that_is_too_long_for_its_sockets_ends_it_too(
    cache: HttpCache, key: SigningKey, work: Path
) -> None:
    options = [*Source([cache.url], [key.public]).options, "--address", str(work / "x.sock")]
    done = run_unchecked([PROGRAM, "daemon", "--root", work / ("r" * 100), *options])
    assert done.returncode == 78
    assert "a unix socket's path has at most 107 bytes" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_reads_its_configuration_from_a_file(
    cache: HttpCache, key: SigningKey, work: Path
) -> None:
    (work / "fusesnap.toml").write_text(
        f'root = "{work}/elsewhere"\nsubstituters = ["{cache.url}"]\n'
        f'trusted-public-keys = ["{key.public}"]\n'
    )
    (work / "elsewhere").mkdir()
    command: list[str | Path] = [PROGRAM, "daemon", "--config", work / "fusesnap.toml"]
    with running(command, log=work / "log") as service:
        service.wait_for_line("ready")
        said = run([PROGRAM, "status", "--address", work / "elsewhere/fusesnap.sock"])
    assert cache.url in said


@pytest.mark.parametrize("part", ["worker", "services"])
def test_what_dies_is_started_again(
    node: Node,
    simple: SimpleClosure,
    nix_layers: NixLayers,
    base_layer: Layer,
    part: str,
) -> None:
    reference = node.pull([base_layer, nix_layers()])
    with node.containerd.started(reference, "one", "/bin/sleep", "1000") as container:
        pid = node.daemon.status()[part]["pid"]
        os.kill(pid, signal.SIGKILL)
        assert container.execute("/bin/cat", f"{simple.tree}/wide/file-2") == "2\n"

        def replaced() -> bool:
            with contextlib.suppress(Exception):
                return bool(node.daemon.status()[part]["pid"] != pid)
            return False

        node.daemon.service.wait_until(replaced)
        # containerd's own connection waits a little before it tries again.
        listing = ("snapshots", "--snapshotter", "fusesnap", "ls")
        node.daemon.service.wait_until(
            lambda: node.containerd.ctr_unchecked(*listing).returncode == 0
        )
        assert node.containerd.run(reference, "two", "/bin/cat", simple.text).startswith("a text")


def test_help_teaches() -> None:
    for words in ([], ["daemon"], ["mount"], ["prefetch"], ["status"], ["completion"]):
        said = run([PROGRAM, *words, "--help"])
        assert said.startswith("Usage: fusesnap")
    assert run([PROGRAM, "--version"]).startswith("fusesnap, version 0.")
    assert "_FUSESNAP_COMPLETE" in run([PROGRAM, "completion", "bash"])
