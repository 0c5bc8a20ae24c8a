"""What /proc says of those who read (proc(5)). A process that is gone says nothing; nothing here waits for a reader.

Only files are read that the kernel answers without the process's memory lock: a reader that is stopped in a page fault
on our own mount holds it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from fusesnap.errors import StorageFailure
from fusesnap.fetch.flight import Reader
from fusesnap.snapshots.mountinfo import root_upper

log = logging.getLogger(__name__)

PROC = Path("/proc")
SIGKILL_PENDING = 1 << (9 - 1)


def identify(pid: int, proc: Path = PROC) -> Reader:
    """The thread or process ``pid`` as the kernel names it; one that is gone has no name."""
    try:
        command = (proc / str(pid) / "comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        command = "?"
    return Reader(pid, command)


def is_dying(pid: int, proc: Path = PROC) -> bool:
    """Whether a thread is gone or has a SIGKILL that it does not follow, because it waits for us."""
    try:
        lines = (proc / str(pid) / "status").read_bytes().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
    pending = [line.split()[1] for line in lines if line.startswith((b"SigPnd:", b"ShdPnd:"))]
    return any(int(mask, 16) & SIGKILL_PENDING for mask in pending)


def is_thread_of(thread: int, process: int, proc: Path = PROC) -> bool:
    """Whether ``thread`` is ``process`` or one of its threads."""
    return thread == process or (proc / str(process) / "task" / str(thread)).exists()


def container_of(pid: int, proc: Path = PROC) -> str | None:
    """The upper directory of the root that a thread has; ``None`` where it has none, or is gone."""
    try:
        return root_upper(proc / str(pid) / "mountinfo")
    except StorageFailure:
        return None


def snapshots_of(
    pids: Iterable[int], uppers: Mapping[str, str], proc: Path = PROC
) -> dict[int, str]:
    """The snapshot that each process has as its root, where it has one; ``uppers`` are their upper directories."""
    found = {}
    for pid in set(pids):
        upper = container_of(pid, proc)
        if upper is not None and upper in uppers:
            found[pid] = uppers[upper]
    return found
