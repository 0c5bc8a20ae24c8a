"""The kernel, and overlayfs tried on file systems that are fit for it and that are not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusesnap.daemon.doctor.findings import Level
from fusesnap.daemon.doctor.machine import (
    examine_machine,
    existing,
    fuse,
    overlay,
    probe,
    request_timeouts,
)

EXAMINE = """
import sys
from pathlib import Path
from fusesnap.daemon.doctor.machine import examine_machine
for each in examine_machine(Path(sys.argv[1]), 120):
    print(each.said, each.status, each.mend, sep="|")
"""


@pytest.fixture
def without_attributes(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system that has no extended attributes at all."""
    directory = tmp_path / "ramfs"
    directory.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "ramfs", directory], check=True)
    yield directory
    subprocess.run(["umount", directory], check=True)


@pytest.fixture
def on_overlay(tmp_path: Path) -> Iterator[Path]:
    """A directory on an overlay, as root's is in many a container."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    layers = ",".join(f"{name}dir={tmp_path}/{name}" for name in ("lower", "upper", "work"))
    merged = tmp_path / "merged"
    subprocess.run(["mount", "-t", "overlay", "-o", layers, "overlay", merged], check=True)
    yield merged
    subprocess.run(["umount", merged], check=True)


def test_this_machine_is_fit_and_nothing_stays(tmp_path: Path) -> None:
    findings = examine_machine(tmp_path / "not" / "there", stall_timeout=120)
    assert {each.subject for each in findings} == {"kernel", "fuse", "overlay"}
    assert Level.FAILURE not in {each.level for each in findings}
    assert os.uname().release in findings[0].said
    assert str(tmp_path) in findings[-1].said
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def test_a_file_system_without_attributes_is_refused(without_attributes: Path) -> None:
    found = probe(without_attributes)
    assert found["overlay"]["step"] == "trusted attributes"
    finding = overlay(found["overlay"], without_attributes)
    assert finding.level is Level.FAILURE
    assert str(without_attributes) in finding.said
    assert "ext4" in finding.mend
    assert list(without_attributes.iterdir()) == []


def test_an_overlay_on_an_overlay_is_refused(on_overlay: Path) -> None:
    found = probe(on_overlay)
    assert found["fuse"]["error"] is None
    finding = overlay(found["overlay"], on_overlay)
    assert finding.level is Level.FAILURE
    assert finding.status == 69
    assert "not on an overlay" in finding.mend


def test_mounts_that_are_not_allowed_are_one_line(tmp_path: Path) -> None:
    """As in a container that is not privileged."""
    words: list[str | Path] = ["setpriv", "--bounding-set=-sys_admin", sys.executable, "-P"]
    done = subprocess.run(
        [*words, "-c", EXAMINE, tmp_path], capture_output=True, text=True, check=True
    )
    said, status, mend = done.stdout.splitlines()[1].split("|")
    assert said.startswith("cannot be tried: ")
    assert "Operation not permitted" in said
    assert (status, "CAP_SYS_ADMIN" in mend) == ("69", True)


def test_what_the_kernels_fuse_lacks_is_said() -> None:
    found = {"error": None, "resend": False, "idmap": False}
    first, second = fuse(found)
    assert "relays" in first.said
    assert (second.level, "6.12" in second.mend) == (Level.WARNING, True)
    (refused,) = fuse({"error": "/dev/fuse: No such file or directory"})
    assert (refused.level, "modprobe fuse" in refused.mend) == (Level.FAILURE, True)


def test_a_kernel_that_aborts_slow_mounts_is_refused(tmp_path: Path) -> None:
    assert request_timeouts(120, tmp_path) == []
    (tmp_path / "default_request_timeout").write_text("0\n")
    (tmp_path / "max_request_timeout").write_text("30\n")
    (finding,) = request_timeouts(120, tmp_path)
    assert finding.level is Level.FAILURE
    assert "30 s (fs.fuse.max_request_timeout)" in finding.said
    assert "sysctl -w fs.fuse.max_request_timeout=0" in finding.mend


def test_the_nearest_directory_that_is_there(tmp_path: Path) -> None:
    assert existing(tmp_path / "a" / "b") == tmp_path
    assert existing(tmp_path) == tmp_path
