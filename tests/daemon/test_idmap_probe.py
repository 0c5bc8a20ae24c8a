"""Whether containers with user namespaces can have their layers mapped: tried for real."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusesnap.daemon.idmap_probe import Idmapping, idmapping


def mounts_below(directory: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if str(directory) in line]


def test_this_machine_can(tmp_path: Path) -> None:
    assert idmapping(tmp_path / "not/there/yet") == Idmapping("", "")
    assert idmapping(tmp_path).remap_ids
    assert not list(tmp_path.iterdir())
    assert not mounts_below(tmp_path)


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """A file system that cannot be mounted idmapped."""
    for name in ("lower", "upper", "work", "state"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    place = tmp_path / "state"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "none", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_file_system_that_cannot_says_so(overlay: Path) -> None:
    found = idmapping(overlay)
    assert not found.remap_ids
    assert found.state.startswith(f"{overlay}/idmap-")
    assert "cannot be mounted idmapped: Invalid argument" in found.state
    assert not found.fuse
    assert not list(overlay.iterdir())


def test_a_directory_that_cannot_be_written_to_says_so() -> None:
    assert idmapping(Path("/proc")).state.startswith("cannot write in /proc: ")
