"""The state directory: its file system, its sockets, and the daemon that has it."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from pathlib import Path
from typing import Final

from fusesnap.config import Settings
from fusesnap.daemon import control
from fusesnap.daemon.doctor.findings import (
    CONFIGURATION,
    DISK,
    UNAVAILABLE,
    Finding,
    Findings,
    doubtful,
    failing,
    well,
)
from fusesnap.daemon.doctor.machine import existing
from fusesnap.daemon_lock import running_daemon
from fusesnap.errors import Unavailable
from fusesnap.fuse_mount import unescaped
from fusesnap.services.daemon_service import ask_status
from fusesnap.snapshots.overlay import check_root

GIGABYTE: Final = 10**9
# One closure of some size has a gigabyte and 100,000 files.
LITTLE_SPACE, TOO_LITTLE_SPACE = 5 * GIGABYTE, GIGABYTE // 4
FEW_INODES, TOO_FEW_INODES = 200_000, 10_000
# Open files of the worker: 512 of the store (``OpenFiles``), and its databases and connections.
FEW_FILES: Final = 1024
FICLONE: Final = 0x40049409  # include/uapi/linux/fs.h
MOUNTINFO: Final = Path("/proc/self/mountinfo")
# The longest process id (PID_MAX_LIMIT of the kernel), which is in the name of a socket that is about to be renamed.
_LONGEST_SUFFIX: Final = ".4194304"


def examine_state(settings: Settings) -> list[Finding]:
    """The state directory of ``settings``."""
    findings = Findings()
    with findings.instead_of_error("root", "give another root"):
        check_root(settings.root.resolve())
        findings.append(directory(settings.root))
        findings.append(space(existing(settings.root)))
    findings.append(sockets(settings))
    with findings.instead_of_error("daemon", "run as root"):
        findings.extend(daemon(settings))
    return findings


def directory(root: Path) -> Finding:
    """Where the state is."""
    there = existing(root)
    on = f"{file_system(there)}, {reflinks(there)}" if os.access(there, os.W_OK) else ""
    if not on:
        return failing("root", f"{there}: not writable", "run as root, or give another root", DISK)
    made = "" if there == root else "not there yet, the daemon makes it; "
    return well("root", f"{root}: {made}{on}")


def file_system(directory: Path, mountinfo: Path = MOUNTINFO) -> str:
    """The kind of the file system that ``directory`` is on, by the kernel's list of mounts."""
    found, kind = -1, "unknown file system"
    resolved = directory.resolve()
    for line in mountinfo.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        words, _, rest = line.partition(" - ")
        point = Path(unescaped(words.split(" ")[4]))
        if resolved.is_relative_to(point) and len(point.parts) >= found:
            found, kind = len(point.parts), rest.split(" ")[0]
    return kind


def reflinks(directory: Path) -> str:
    """Whether files can share their blocks."""
    with (
        tempfile.TemporaryFile(dir=directory) as source,
        tempfile.TemporaryFile(dir=directory) as target,
    ):
        source.write(bytes(4096))
        source.flush()
        try:
            fcntl.ioctl(target, FICLONE, source.fileno())
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            return "without reflinks"
    return "with reflinks"


def space(directory: Path) -> Finding:
    """Free bytes and inodes."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    # Btrfs has none to count, and says 0 of 0.
    inodes = status.f_favail if status.f_files else None
    counted = "as many files as fit" if inodes is None else f"{inodes:,} inodes"
    said = f"{free / GIGABYTE:.1f} GB and {counted} free"
    mend = "make room, or put root on another file system"
    if free < TOO_LITTLE_SPACE or (inodes is not None and inodes < TOO_FEW_INODES):
        return failing("space", said, mend, DISK)
    if free < LITTLE_SPACE or (inodes is not None and inodes < FEW_INODES):
        return doubtful("space", said, mend)
    return well("space", said)


def sockets(settings: Settings) -> Finding:
    """Whether the names of the sockets are short enough for the kernel (unix(7))."""
    root = settings.root.absolute()
    names = (
        str(settings.socket),
        str(settings.socket.parent / ".12345678"),
        str(root / control.SOCKET_NAME) + _LONGEST_SUFFIX,
    )
    longest = max(names, key=lambda name: len(os.fsencode(name)))
    length = len(os.fsencode(longest))
    if length > control.MAX_SOCKET_PATH:
        return failing(
            "sockets",
            f"{longest}: {length} bytes, a socket's path has at most {control.MAX_SOCKET_PATH}",
            "give a shorter root or address",
            CONFIGURATION,
        )
    return well("sockets", f"{settings.socket}: short enough")


def daemon(settings: Settings) -> list[Finding]:
    """Who has the state directory, and whether it serves."""
    state = running_daemon(settings.root)
    if state is None:
        mend = "systemctl start fusesnap, or fusesnap daemon"
        return [doubtful("daemon", f"none runs on {settings.root}", mend)]
    if state.state == "failed":
        said = f"pid {state.pid}: its last reload failed: {state.reason}"
        return [doubtful("daemon", said, "mend that, and fusesnap daemon reload")]
    try:
        answer = ask_status(settings.socket)
    except Unavailable as error:
        mend = f"see its log; does it serve another address than {settings.socket}?"
        return [failing("daemon", f"pid {state.pid} is {state.state}: {error}", mend, UNAVAILABLE)]
    worker = answer["worker"]
    if worker["pid"] is None:
        said = f"pid {state.pid}: no worker answers: {worker['error']}"
        return [failing("daemon", said, "see its log", UNAVAILABLE)]
    return [well("daemon", f"pid {state.pid} serves {settings.socket}"), files(worker["pid"])]


def files(pid: int) -> Finding:
    """How many files the worker may have open (proc_pid_limits(5))."""
    lines = Path(f"/proc/{pid}/limits").read_text(encoding="ascii").splitlines()
    words = next(line.split() for line in lines if line.startswith("Max open files"))
    soft = words[3]
    said = f"the worker may have {soft} open"
    if soft != "unlimited" and int(soft) < FEW_FILES:
        mend = "LimitNOFILE=1048576 in the unit file, or ulimit -n before fusesnap daemon"
        return doubtful("files", said, mend)
    return well("files", said)
