"""The FUSE mount as the supervisor makes it: mount(2), the kernel's FUSE_INIT, and how it is taken away.

Standard library only, and no file below the mount is ever opened: a thread that waits for its own children's answer
cannot be killed.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import struct
from dataclasses import dataclass
from pathlib import Path

# include/uapi/linux/fuse.h
IN_HEADER = struct.Struct("<IIQQIIIHH")  # len opcode unique nodeid uid gid pid total_extlen padding
INIT_IN = struct.Struct("<IIII")  # major minor max_readahead flags; then flags2, unused[11]
# major minor max_readahead flags max_background congestion_threshold max_write time_gran max_pages map_alignment
# flags2 max_stack_depth request_timeout; then unused[11]
INIT_OUT = struct.Struct("<IIIIHHIIHHIIH22x")
OUT_HEADER = struct.Struct("<IiQ")  # len error unique
FUSE_INIT = 26
NOTIFY_RESEND = struct.pack("<IiQ", 16, 7, 0)  # a notification has unique 0 and its code in error
ASYNC_READ, BIG_WRITES, DO_READDIRPLUS = 1 << 0, 1 << 5, 1 << 13
PARALLEL_DIROPS, MAX_PAGES, CACHE_SYMLINKS, INIT_EXT = 1 << 18, 1 << 22, 1 << 23, 1 << 30
# In flags2. Without the mount's default_permissions the kernel refuses ALLOW_IDMAP: only it knows both ids of a caller.
HAS_RESEND, ALLOW_IDMAP = 1 << (39 - 32), 1 << (40 - 32)
# READDIRPLUS_AUTO is left out: with it the kernel sends plain readdir, which pyfuse3 answers with ENOSYS.
FLAGS = (
    ASYNC_READ
    | BIG_WRITES
    | DO_READDIRPLUS
    | PARALLEL_DIROPS
    | MAX_PAGES
    | CACHE_SYMLINKS
    | INIT_EXT
)
FLAGS2 = HAS_RESEND | ALLOW_IDMAP
PROTOCOL_MINOR = 40  # the newest layout of INIT_OUT that is written here
MAX_TRANSFER = 128 * 1024  # of one read or write
MAX_PAGES_PER_REQUEST = MAX_TRANSFER // 4096
# A read of /dev/fuse with less room than a write request and 4 KiB of headers is refused with EINVAL.
REQUEST_ROOM = 2 * MAX_TRANSFER

MS_RDONLY, MS_NOSUID, MS_NODEV, MNT_FORCE, MNT_DETACH = 1, 2, 4, 1, 2
EX_UNAVAILABLE, EX_NOPERM = 69, 77  # sysexits.h


class MountFailure(Exception):
    """The mount cannot be had; ``status`` is the exit code to end with."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Connection:
    """A mount's connection to the kernel: its descriptor, the request that began it, and its device number."""

    fuse: int
    init_request: bytes
    device: str

    @property
    def can_resend(self) -> bool:
        """Whether the kernel can send again what a dead worker had taken (Linux 6.9)."""
        return bool(_flags2(self.init_request) & HAS_RESEND)

    @property
    def can_idmap(self) -> bool:
        """Whether the mount can be mounted idmapped, for containers with user namespaces (Linux 6.12)."""
        return bool(_flags2(self.init_request) & ALLOW_IDMAP)

    def resend(self) -> None:
        """Ask the kernel to send again what was taken and not answered, if it can."""
        if self.can_resend:
            os.write(self.fuse, NOTIFY_RESEND)

    @property
    def lost(self) -> bool:
        """Whether the kernel has ended it, because the mount is gone or was aborted."""
        poll = select.poll()
        poll.register(self.fuse, 0)
        return bool(poll.poll(0))


def system_call(name: str, *arguments: object) -> None:
    """Call the C library's ``name``; raises ``OSError``."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def mounts() -> dict[str, str]:
    """Where something is mounted, and the device number of what is on top there, by the kernel's own list."""
    lines = (
        Path("/proc/self/mountinfo")
        .read_text(encoding="utf-8", errors="surrogateescape")
        .splitlines()
    )
    words = (line.split(" ") for line in lines)
    return {unescaped(each[4]): each[2] for each in words}


def unescaped(name: str) -> str:
    """Space, tab, newline and backslash are octal in mountinfo (proc_pid_mountinfo(5))."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), name)


def mount_points() -> set[str]:
    """Where something is mounted."""
    return set(mounts())


def detach(mountpoint: Path, *, abort: bool = False) -> None:
    """Take away every mount at ``mountpoint``, also while somebody still uses it.

    ``abort``: whoever uses it, now or later, gets ENOTCONN, whatever process still holds the connection.
    """
    while str(mountpoint) in mount_points():
        flags = MNT_DETACH | (MNT_FORCE if abort else 0)
        system_call("umount2", os.fsencode(mountpoint), flags)


def detach_below(directory: Path) -> None:
    """Take away every mount below ``directory``. Who uses one goes on."""
    for point in mount_points():
        if point.startswith(f"{directory}/"):
            detach(Path(point))


def mount(mountpoint: Path, readahead: int) -> Connection:
    """Mount FUSE there, and answer the kernel's FUSE_INIT. Raises ``MountFailure``."""
    try:
        fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MountFailure(
            f"/dev/fuse: {error.strerror}: load the kernel's FUSE module (modprobe fuse)",
            EX_UNAVAILABLE,
        ) from error
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read={MAX_TRANSFER}"
    try:
        system_call(
            "mount", b"fusesnap", os.fsencode(mountpoint), b"fuse.fusesnap",
            ctypes.c_ulong(MS_RDONLY | MS_NOSUID | MS_NODEV), options.encode(),
        )  # fmt: skip
    except OSError as error:
        os.close(fuse)
        raise MountFailure(
            f"{mountpoint}: the FUSE mount was refused: {error.strerror}: is this root, with CAP_SYS_ADMIN?",
            EX_NOPERM,
        ) from error
    request = os.read(fuse, REQUEST_ROOM)
    os.write(fuse, answer_init(request, readahead))
    return Connection(fuse, request, mounts()[str(mountpoint)])


def answer_init(request: bytes, readahead: int) -> bytes:
    """The answer to the kernel's FUSE_INIT: what we want of what it has. ``readahead`` in bytes."""
    _, opcode, unique, *_ = IN_HEADER.unpack_from(request)
    if opcode != FUSE_INIT:
        raise MountFailure(
            f"the kernel's first FUSE request has opcode {opcode}, not {FUSE_INIT} (FUSE_INIT)"
        )
    _, minor, offered_readahead, flags = INIT_IN.unpack_from(request, IN_HEADER.size)
    body = INIT_OUT.pack(
        7, min(minor, PROTOCOL_MINOR), min(readahead, offered_readahead), FLAGS & flags, 64, 48, MAX_TRANSFER, 1,
        MAX_PAGES_PER_REQUEST, 0, FLAGS2 & _flags2(request), 0, 0,
    )  # fmt: skip
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body


def _flags2(request: bytes) -> int:
    at = IN_HEADER.size + INIT_IN.size
    flags2: int = struct.unpack_from("<I", request, at)[0] if len(request) >= at + 4 else 0
    return flags2
