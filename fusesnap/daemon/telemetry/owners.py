"""In which container a reader is."""

from __future__ import annotations

from pathlib import Path

from fusesnap.daemon.readers import PROC
from fusesnap.errors import StorageFailure
from fusesnap.snapshots.mountinfo import root_upper


def upper_of_reader(pid: int, proc: Path = PROC) -> str | None:
    """The upper directory of the container that ``pid`` has as its root; ``None`` where it is in none, or gone.

    To be asked while it is blocked: who waits for us cannot go. A process that shares our own mount namespace is in no
    container, and its list of mounts may have thousands of lines.
    """
    try:
        if (proc / str(pid) / "ns/mnt").readlink() == (proc / "self/ns/mnt").readlink():
            return None
        return root_upper(proc / str(pid) / "mountinfo")
    except (OSError, StorageFailure):
        return None
