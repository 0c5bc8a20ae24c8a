"""Dies at a given step of a call: run as ``python -m tests.snapshots.kill_points STATE``, with lines ``CALL STEP``.

A step is a call of the operating system or of SQLite, made by a thread of the snapshotter. Each line is carried out by
a process of its own, which SIGKILLs itself before that step; the answer is its exit status, 0 where it has fewer steps.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import trio

from fusesnap.nix.store_path import StorePath
from fusesnap.snapshots.interface import Info, Kind
from fusesnap.snapshots.snapshotter import Snapshotter
from tests.snapshots.conftest import Bench, Mounts

LABELLED = Info("written", "", Kind.ACTIVE, 0, 0, {"new": "label"})
CALLS: dict[str, Callable[[Snapshotter], Awaitable[object]]] = {
    "prepare": lambda snapshotter: snapshotter.prepare("new", "image", {}),
    "commit": lambda snapshotter: snapshotter.commit("layer", "written", {}),
    "remove": lambda snapshotter: snapshotter.remove("other"),
    "update": lambda snapshotter: snapshotter.update(LABELLED),
}


def furnish(bench: Bench) -> tuple[StorePath, StorePath]:
    """The two store paths that can be had: one that is there, one that is missing."""
    return (
        bench.path("there", {"bin": {"tool": b"tool"}}, committed=True),
        bench.path("missing", {"lib": {"so": b"so"}}),
    )


class Killer:
    """Counts steps, and dies before step ``number``, the first being 1."""

    def __init__(self, number: int) -> None:
        self._left = number

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and _is_step(argument):
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def _is_step(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    return function.__module__ == "posix" or isinstance(owner, sqlite3.Connection)


def _carry_out(state: Path, call: str, step: int) -> None:
    bench = Bench(state, Mounts(state))
    furnish(bench)
    threading.setprofile(Killer(step))  # of threads that begin from now on
    trio.run(CALLS[call], bench.snapshotter)


def _end_after(work: Callable[[], None]) -> NoReturn:
    """End this process, which has a copy of all that its parent has open, without ado."""
    try:
        work()
    except BaseException:  # noqa: BLE001  # whatever it is, this process must not go on as its parent
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    """Carry out what standard input says."""
    state = Path(sys.argv[1])
    for line in sys.stdin:
        call, step = line.split()
        child = os.fork()
        if child == 0:
            _end_after(partial(_carry_out, state, call, int(step)))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
