"""What every process of the daemon starts with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fusesnap.load import command_of

PROGRAM = """
import gc, sys
during = gc.isenabled()
def main():
    print(sys.argv[1:], during, gc.isenabled(), gc.get_freeze_count() > 0)
"""


def test_a_module_is_imported_uncollected_and_run_with_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = command_of("some_program", "one", "two words")
    assert command[0] == sys.executable
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert said == "['one', 'two words'] False True True\n"


@pytest.mark.parametrize(
    ("program", "unwanted"),
    [
        ("fusesnap.daemon.worker", {"rich", "pygments", "click", "prometheus_client", "grpc"}),
        ("fusesnap.daemon.services", {"rich", "pygments", "click", "prometheus_client"}),
        ("fusesnap.daemon.unpack_worker", {"trio", "httpx", "pydantic", "rich", "click", "grpc"}),
    ],
)
def test_what_a_program_does_not_use_is_not_imported(program: str, unwanted: set[str]) -> None:
    told = f"""
import sys
from fusesnap.load import loaded
loaded({program!r})
print(*sys.modules)
"""
    imported = said_by(told).split()
    assert program in imported
    assert not unwanted & set(imported)


def test_a_command_imports_httpx_without_its_command_line() -> None:
    told = """
import sys
from fusesnap.cli.app import cli
cli(["status", "--help"], standalone_mode=False)
import fusesnap.daemon.status, httpx
print(*sys.modules)
assert callable(httpx.main)
"""
    imported = said_by(told).split()
    assert "httpx" in imported
    assert not {"rich", "pygments"} & set(imported)


def test_a_command_that_only_asks_needs_no_event_loop() -> None:
    imported = said_by(
        "import sys, fusesnap.cli.status, fusesnap.services.daemon_service\nprint(*sys.modules)"
    )
    assert "grpc" in imported.split()
    assert not {"trio", "httpx", "rich"} & set(imported.split())


def said_by(program: str) -> str:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
