"""What the daemon's processes hold in memory, as the kernel counts it."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

SAMPLE_SECONDS = 0.25
MIB = 1024 * 1024
STANDBY = "standby worker"
_GONE = (FileNotFoundError, ProcessLookupError)


@dataclass(frozen=True, slots=True)
class Resident:
    """One process, sizes in bytes (proc(5), ``smaps_rollup`` and ``status``).

    ``rss`` counts pages shared with other processes in full, ``pss`` by its part; ``anonymous`` is what no file backs.
    ``peak`` is the largest ``rss`` of its life so far.
    """

    role: str
    pid: int
    rss: int
    pss: int
    anonymous: int
    peak: int
    threads: int

    def as_json(self) -> dict[str, int]:
        """Without the name."""
        return {key: value for key, value in asdict(self).items() if key != "role"}


def measure(supervisor: int, worker: int) -> list[Resident]:
    """The daemon's processes of this moment, the supervisor first, each with the role that its module has.

    ``worker`` is the process that serves; any other worker stands by to take over.
    """
    found = [_resident(pid) for pid in _family(supervisor)]
    return [
        replace(each, role=STANDBY) if each.role == "worker" and each.pid != worker else each
        for each in found
        if each is not None
    ]


def _resident(pid: int) -> Resident | None:
    """One process; None if it is gone, or has not become a program of ours yet."""
    process = Path(f"/proc/{pid}")
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
        memory = _fields(process / "smaps_rollup")
        status = _fields(process / "status")
    except _GONE:
        return None
    if b"-m" not in words or "VmHWM" not in status:
        return None
    module = words[words.index(b"-m") + 1].decode()
    return Resident(
        module.rpartition(".")[2],
        pid,
        memory["Rss"],
        memory["Pss"],
        memory["Anonymous"],
        status["VmHWM"],
        status["Threads"],
    )


def _fields(file: Path) -> dict[str, int]:
    """The lines of the form ``Name:  number [kB]``; kilobytes are given as bytes."""
    found = {}
    for line in file.read_text().splitlines():
        words = line.split()
        if len(words) in {2, 3} and words[1].isdigit():
            found[words[0].rstrip(":")] = int(words[1]) * (1024 if words[-1] == "kB" else 1)
    return found


def _family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children = defaultdict(list)
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(*_GONE):
            # The command is in parentheses and may hold anything.
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            children[int(fields[1])].append(int(process.name))
    family = [pid]
    for member in family:
        family += sorted(children[member])
    return family


class Peaks:
    """The most that each role was seen to hold, all its processes together, and how many they were."""

    def __init__(self, supervisor: int, worker: int) -> None:
        self._supervisor, self._worker = supervisor, worker
        self.rss: dict[str, int] = {}
        self.processes: dict[str, int] = {}
        self.total_pss = 0

    def sample(self) -> None:
        """Look once."""
        now = measure(self._supervisor, self._worker)
        for role in {each.role for each in now}:
            mine = [each for each in now if each.role == role]
            self.rss[role] = max(self.rss.get(role, 0), sum(each.rss for each in mine))
            self.processes[role] = max(self.processes.get(role, 0), len(mine))
        self.total_pss = max(self.total_pss, sum(each.pss for each in now))


@contextlib.contextmanager
def watched(supervisor: int, worker: int) -> Iterator[Peaks]:
    """Sample the daemon for the time of the context, from a thread."""
    peaks = Peaks(supervisor, worker)
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            peaks.sample()

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()
