"""A program that is run to its end, with all that it starts: how long it took, and what it took."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.processes import CommandFailed

SAMPLE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Taken:
    """``seconds`` from start to end; ``cpu`` in seconds, of all its processes; ``memory`` in bytes.

    ``memory`` is the most that all its processes together were seen to hold, pages that several share counted once
    (proc(5), ``Pss`` in ``smaps_rollup``).
    """

    seconds: float
    cpu: float
    memory: int


def run_measured(
    argv: Sequence[str | Path], *, env: Mapping[str, str], timeout: float = 600
) -> Taken:
    """Run a program. Raises CommandFailed with what it said unless it ends with 0 in time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, **env},
        start_new_session=True,
    )
    memory = _Memory(process.pid)
    try:
        _, said = process.communicate(timeout=timeout)
        seconds = time.perf_counter() - began
    except subprocess.TimeoutExpired:
        raise CommandFailed(f"{argv[0]} did not end within {timeout:g} s") from None
    finally:
        memory.stop()
        if process.returncode is None:
            os.killpg(process.pid, 9)
            process.wait()
    if process.returncode != 0:
        raise CommandFailed(f"{argv[0]} ended with {process.returncode}: {said.decode()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Taken(seconds, cpu, memory.most)


class _Memory:
    """Looks at a session's processes now and then, from a thread."""

    def __init__(self, session: int) -> None:
        self.most = 0
        self._session = session
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            held = sum(_pss(pid) for pid in _members(self._session))
            self.most = max(self.most, held)


def _members(session: int) -> list[int]:
    """The processes of a session (proc(5): ``stat``, the sixth field)."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == session:
                found.append(int(name))
    return found


def _pss(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0
