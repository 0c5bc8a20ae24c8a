"""Waits until what was started has nothing more to do by itself, as on a machine that has been up for a while."""

from __future__ import annotations

import time
from pathlib import Path

TICKS = 0.01  # seconds of a clock tick, in which /proc counts (USER_HZ)
LOOK_EVERY = 0.5  # seconds
AT_MOST = 2  # ticks that all of it may take between two looks


def settle(directory: Path, *, timeout: float = 60) -> None:
    """Return as soon as the processes that name ``directory`` hardly take a processor. Raises TimeoutError.

    A daemon goes on loading its spare worker when it serves already.
    """
    deadline = time.monotonic() + timeout
    before = processor_ticks(directory)
    while True:
        time.sleep(LOOK_EVERY)
        after = processor_ticks(directory)
        if after - before <= AT_MOST:
            return
        if time.monotonic() > deadline:
            taken = (after - before) * TICKS
            raise TimeoutError(f"{directory}: took {taken:.2f} s of a processor in {LOOK_EVERY} s")
        before = after


def processor_ticks(directory: Path) -> int:
    """What the living processes with ``directory`` in their command lines have taken of processors, in ticks."""
    named, ticks = str(directory).encode(), 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if named in (process / "cmdline").read_bytes():
                # The name, in parentheses, may have blanks; utime and stime are fields 14 and 15 (proc(5)).
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return ticks
