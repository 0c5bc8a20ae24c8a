"""The state directory, on real file systems."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusesnap.config import load
from fusesnap.daemon.doctor.findings import Finding, Level
from fusesnap.daemon.doctor.state import (
    examine_state,
    file_system,
    files,
    reflinks,
    space,
)
from fusesnap.daemon_lock import DaemonLock


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    directory = tmp_path / "small disk"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory], check=True)
    yield directory
    subprocess.run(["umount", directory], check=True)


def found(root: Path) -> dict[str, Finding]:
    return {each.subject: each for each in examine_state(load(None, {"root": str(root)}))}


def test_a_directory_that_the_daemon_would_make(tmp_path: Path) -> None:
    findings = found(tmp_path / "state")
    assert findings["root"].level is Level.OK
    assert "the daemon makes it" in findings["root"].said
    assert findings["daemon"].level is Level.WARNING
    assert "fusesnap daemon" in findings["daemon"].mend
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_mounts_cannot_have(tmp_path: Path) -> None:
    finding = found(tmp_path / "a,b")["root"]
    assert (finding.level, finding.status) == (Level.FAILURE, 78)


def test_too_little_space(small: Path) -> None:
    finding = space(small)
    assert (finding.level, finding.status) == (Level.FAILURE, 74)
    assert finding.mend


def test_the_kind_of_a_file_system(small: Path) -> None:
    assert file_system(small) == "tmpfs"
    assert file_system(Path("/proc/self")) == "proc"
    assert reflinks(small) == "without reflinks"


def test_names_of_sockets_that_are_too_long(tmp_path: Path) -> None:
    longest = tmp_path / (
        "d" * (107 - len(os.fsencode(tmp_path)) - 1 - len("/control.sock.4194304"))
    )
    assert found(longest)["sockets"].level is Level.OK
    finding = found(longest.with_name(longest.name + "d"))["sockets"]
    assert finding.level is Level.FAILURE
    assert "108 bytes" in finding.said


def test_a_daemon_that_does_not_answer(tmp_path: Path) -> None:
    lock = DaemonLock.take(tmp_path)
    try:
        finding = found(tmp_path)["daemon"]
        assert finding.level is Level.FAILURE
        assert f"pid {os.getpid()} is starting" in finding.said
        lock.tell(1, "failed", "the configuration is wrong")
        finding = found(tmp_path)["daemon"]
        assert finding.level is Level.WARNING
        assert "the configuration is wrong" in finding.said
    finally:
        os.close(lock.descriptor)


def test_the_limit_of_open_files() -> None:
    with subprocess.Popen(
        ["bash", "-c", "ulimit -n 100; echo; read"], stdin=-1, stdout=-1
    ) as shell:
        assert shell.stdout is not None
        shell.stdout.readline()
        finding = files(shell.pid)
        shell.communicate(b"\n")
    assert finding.level is Level.WARNING
    assert "100 open" in finding.said
    assert "LimitNOFILE" in finding.mend
