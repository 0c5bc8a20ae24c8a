"""The worker runs before others, unless somebody chose otherwise; what unpacks for it runs behind it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from fusesnap.daemon.niceness import before_others, behind_readers
os.setpriority(os.PRIO_PROCESS, 0, int(sys.argv[1]))
{"before": before_others, "behind": behind_readers}[sys.argv[2]]()
print(os.getpriority(os.PRIO_PROCESS, 0))
"""


@pytest.mark.parametrize(
    ("niceness", "what", "then"),
    [
        ("0", "before", "-10"),
        ("5", "before", "5"),
        ("-10", "behind", "0"),
        ("0", "behind", "5"),
        ("5", "behind", "10"),
    ],
)
def test_niceness(niceness: str, what: str, then: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, niceness, what], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == then


def test_whoever_may_not_goes_on_as_he_is() -> None:
    program = f"import os; os.setgid(65534); os.setuid(65534)\n{PROGRAM}"
    done = subprocess.run(
        [sys.executable, "-c", program, "0", "before"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.stdout.strip() == "0"
