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
