"""What was started is waited for until it is idle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from testbed.settling import processor_ticks, settle

BUSY = "import sys, time\nwhile {condition}: pass\nprint('idle', flush=True)\ntime.sleep(600)"


def started(directory: Path, condition: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUSY.format(condition=condition), str(directory)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_what_works_is_waited_for(tmp_path: Path) -> None:
    with started(tmp_path, "time.process_time() < 1") as working:
        assert working.stdout is not None
        settle(tmp_path)
        assert working.poll() is None
        assert processor_ticks(tmp_path) >= 90
        working.kill()


def test_what_works_for_ever_is_told(tmp_path: Path) -> None:
    with started(tmp_path, "True") as working:
        with pytest.raises(TimeoutError, match="of a processor"):
            settle(tmp_path, timeout=0.1)
        working.kill()
