"""What holds for every test."""

from __future__ import annotations

import compileall
from pathlib import Path

import pytest

import fusesnap

# Each takes longer than all that may be left for another process at the end: they begin.
LONGEST = {"test_drills.py"}


def pytest_configure(config: pytest.Config) -> None:
    """Compile the package, once for all processes of a run.

    Tests start it hundreds of times, and the environment may forbid Python to keep what it has compiled.
    """
    if not hasattr(config, "workerinput"):  # a process of xdist's
        compileall.compile_dir(Path(fusesnap.__file__).parent, quiet=1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No process is to be left with a long test when the others have nothing more to do."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
