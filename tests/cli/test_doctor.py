"""The doctor's lines as a person reads them, and what it ends with."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import click
import pytest
from testbed.fusesnap_daemon import PROGRAM

from fusesnap.cli.doctor import can_show, lines
from fusesnap.daemon.doctor.examination import Examination, Section
from fusesnap.daemon.doctor.findings import doubtful, failing, well

EXAMINATION = Examination(
    (
        Section("machine", (well("kernel", "Linux"), doubtful("clock", "slow", "wind it up"))),
        Section("caches", (failing("https://cache.example.org", "gone", "find it", 69),)),
        Section("containerd", (failing("plugin", "none", "add it", 78),)),
    )
)


def test_each_line_that_is_not_well_has_its_mend() -> None:
    assert [click.unstyle(line) for line in lines(EXAMINATION)] == [
        "machine",
        "  ✓ kernel  Linux",
        "  ! clock   slow",
        "            → wind it up",
        "caches",
        "  ✗ https://cache.example.org  gone",
        "                      → find it",
        "containerd",
        "  ✗ plugin  none",
        "            → add it",
        "2 failing, 1 doubtful",
    ]


def test_a_terminal_without_the_signs_gets_others() -> None:
    assert (can_show("utf-8"), can_show("latin-1"), can_show("ascii")) == (True, False, False)
    said = "\n".join(lines(EXAMINATION, can_show=False))
    said.encode("ascii")
    assert "x" in said


def test_the_first_failure_gives_the_exit_code() -> None:
    assert EXAMINATION.status == 69
    assert Examination((Section("machine", (doubtful("a", "b", "c"),)),)).status == 0
    assert EXAMINATION.as_json()["status"] == 69
    assert EXAMINATION.as_json()["findings"][2] == {
        "section": "caches",
        "subject": "https://cache.example.org",
        "level": "failure",
        "said": "gone",
        "mend": "find it",
    }


def test_a_configuration_that_cannot_be_used_is_a_failing_line(tmp_path: Path) -> None:
    file = tmp_path / "fusesnap.toml"
    file.write_text('trusted-public-keys = ["half"]\nspeed = 3\n')
    done = subprocess.run(
        [PROGRAM, "doctor", "--config", file], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (78, "")
    assert f"✗ configuration  {file}: unknown key 'speed'" in done.stdout
    assert "trusted-public-keys" in done.stdout
    assert "✓ overlay" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("version", ["2", "3"])
def test_what_is_printed_for_containerd_names_this_daemon(version: str, tmp_path: Path) -> None:
    file = tmp_path / "fusesnap.toml"
    file.write_text(f"root = {json.dumps(str(tmp_path))}\n")
    words: list[str | Path] = [
        PROGRAM,
        "daemon",
        "--config",
        file,
        "--print-containerd-config",
        version,
    ]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert f"\nversion = {version}\n" in said
    assert f'address = "{tmp_path}/fusesnap.sock"' in said
