"""The process that holds the mount: it opens /dev/fuse, mounts, starts the others and restarts what dies.

It is meant to be read in one sitting, and to survive what kills its children: standard library only, no thread, and
it never opens a file below the mount (a thread that waits for its own children's answer cannot be killed).

Started as ``python -m fusesnap.supervisor SETTINGS`` where SETTINGS is the JSON object that ``fusesnap daemon`` made
from its checked configuration; it is handed on to the children as it is.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

# ------------------------------------------------------------- FUSE_INIT (include/uapi/linux/fuse.h)

IN_HEADER = struct.Struct("<IIQQIIIHH")  # len opcode unique nodeid uid gid pid total_extlen padding
INIT_IN = struct.Struct("<IIII")  # major minor max_readahead flags; then flags2, unused[11]
# major minor max_readahead flags max_background congestion_threshold max_write time_gran max_pages map_alignment
# flags2 max_stack_depth request_timeout; then unused[11]
INIT_OUT = struct.Struct("<IIIIHHIIHHIIH22x")
OUT_HEADER = struct.Struct("<IiQ")  # len error unique
FUSE_INIT = 26
ASYNC_READ, BIG_WRITES, DO_READDIRPLUS = 1 << 0, 1 << 5, 1 << 13
PARALLEL_DIROPS, MAX_PAGES, CACHE_SYMLINKS, INIT_EXT = 1 << 18, 1 << 22, 1 << 23, 1 << 30
HAS_RESEND, ALLOW_IDMAP = 1 << (39 - 32), 1 << (40 - 32)  # in flags2
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
MAX_TRANSFER = 128 * 1024  # of one read
MAX_PAGES_PER_REQUEST = MAX_TRANSFER // 4096

MS_RDONLY, MS_NOSUID, MS_NODEV, MNT_DETACH = 1, 2, 4, 2

# A child that dies within this many seconds of its start is dying young, and waits before it is started again.
YOUNG = 5.0
LONGEST_WAIT = 10.0
# A child that is told to stop has this many seconds. A worker that hangs must not keep the node from stopping.
GRACE = 10.0

READY = 3  # children say that they serve by writing a line to this descriptor


def fail(message: str, status: int = 1) -> NoReturn:
    """Say why, and end."""
    sys.stderr.write(f"fusesnap: {message}\n")
    raise SystemExit(status)


# ------------------------------------------------------------------------------------------ the mount


def system_call(name: str, *arguments: object) -> None:
    """Call the C library's ``name``; raises ``OSError``."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def mount_points() -> set[str]:
    """Where something is mounted, by the kernel's own list."""
    lines = (
        Path("/proc/self/mountinfo")
        .read_text(encoding="utf-8", errors="surrogateescape")
        .splitlines()
    )
    return {unescaped(line.split(" ")[4]) for line in lines}


def unescaped(name: str) -> str:
    """Space, tab, newline and backslash are octal in mountinfo (proc_pid_mountinfo(5))."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), name)


def detach(mountpoint: Path) -> None:
    """Take away every mount at ``mountpoint``, also while somebody still uses it."""
    while str(mountpoint) in mount_points():
        system_call("umount2", os.fsencode(mountpoint), MNT_DETACH)


def mount(mountpoint: Path, readahead: int) -> tuple[int, bytes]:
    """Mount FUSE there. Returns the connection's descriptor and the kernel's FUSE_INIT request, answered."""
    try:
        fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        fail(f"/dev/fuse: {error.strerror}: load the kernel's FUSE module (modprobe fuse)", 69)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read={MAX_TRANSFER}"
    try:
        system_call(
            "mount", b"fusesnap", os.fsencode(mountpoint), b"fuse.fusesnap",
            ctypes.c_ulong(MS_RDONLY | MS_NOSUID | MS_NODEV), options.encode(),
        )  # fmt: skip
    except OSError as error:
        fail(
            f"{mountpoint}: the FUSE mount was refused: {error.strerror}: is this root, with CAP_SYS_ADMIN?",
            77,
        )
    request = os.read(fuse, 1 << 18)
    os.write(fuse, answer_init(request, readahead))
    return fuse, request


def answer_init(request: bytes, readahead: int) -> bytes:
    """The answer to the kernel's FUSE_INIT: what we want of what it has. ``readahead`` in bytes."""
    _, opcode, unique, *_ = IN_HEADER.unpack_from(request)
    if opcode != FUSE_INIT:
        fail(f"the kernel's first FUSE request has opcode {opcode}, not {FUSE_INIT} (FUSE_INIT)")
    _, minor, offered_readahead, flags = INIT_IN.unpack_from(request, IN_HEADER.size)
    flags2_at = IN_HEADER.size + INIT_IN.size
    flags2 = struct.unpack_from("<I", request, flags2_at)[0] if len(request) >= flags2_at + 4 else 0
    body = INIT_OUT.pack(
        7, min(minor, PROTOCOL_MINOR), min(readahead, offered_readahead), FLAGS & flags, 64, 48, MAX_TRANSFER, 1,
        MAX_PAGES_PER_REQUEST, 0, FLAGS2 & flags2, 0, 0,
    )  # fmt: skip
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body


# --------------------------------------------------------------------------------------- the children


@dataclass
class Child:
    """A process that is to be there as long as we are."""

    name: str
    command: list[str]
    descriptors: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    ready: int = -1  # read end of the pipe on which it says that it serves
    started: float = 0.0
    wait: float = 0.0
    due: float = 0.0
    serves: bool = False

    def start(self) -> None:
        """Exec it, never only fork: a copy of us that holds the FUSE descriptor would turn its death into a hang."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        self.process = subprocess.Popen(
            [*self.command, str(writing)],
            pass_fds=(*self.descriptors, writing),
            stdin=subprocess.DEVNULL,
        )
        os.close(writing)
        self.ready, self.started = reading, time.monotonic()

    def note_ready(self) -> None:
        """The pipe has something to say: a line, or its end."""
        self.serves = bool(os.read(self.ready, 64)) or self.serves
        os.close(self.ready)
        self.ready = -1

    def buried(self) -> bool:
        """Whether it was running and is not any more; then it is due again, later if it died young."""
        if self.process is None or self.process.poll() is None:
            return False
        lived = time.monotonic() - self.started
        self.wait = min(max(2 * self.wait, 0.1), LONGEST_WAIT) if lived < YOUNG else 0.0
        self.due = time.monotonic() + self.wait
        log(
            f"{self.name} (pid {self.process.pid}) ended with {self.process.returncode} after {lived:.1f} s; "
            f"starting it again in {self.wait:.1f} s"
        )
        self.process = None
        if self.ready >= 0:
            os.close(self.ready)
            self.ready = -1
        return True

    def stop(self) -> None:
        """Ask it to end; kill it when it does not."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            log(f"{self.name} (pid {self.process.pid}) did not stop within {GRACE:.0f} s: killed")
            self.process.kill()
            self.process.wait()


def log(message: str) -> None:
    """A line for the journal."""
    sys.stderr.write(f"fusesnap supervisor: {message}\n")
    sys.stderr.flush()


# ---------------------------------------------------------------------------------------- the work


class Supervisor:
    """Holds the descriptor of the mount and keeps its children alive."""

    def __init__(self, settings: str) -> None:
        given = json.loads(settings)
        self.root = Path(given["root"]).resolve()  # as the kernel's list of mounts names it
        self.mountpoint = self.root / "lazy"
        self.readahead = int(given["readahead"])
        self.address = str(given["address"])
        self.settings = settings
        self.children: list[Child] = []
        self.announced = False

    def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        wake, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_write)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        lock = self.lock()
        detach(self.mountpoint)  # of a daemon that is dead: we hold its lock
        self.mountpoint.mkdir(exist_ok=True)
        fuse, request = mount(self.mountpoint, self.readahead)
        try:
            self.children = [
                Child("worker", self.command("worker", str(fuse), request.hex()), (fuse,)),
                Child("services", self.command("services")),
            ]
            self.watch(wake)
        finally:
            for child in reversed(self.children):
                child.stop()
            os.close(fuse)  # before the unmount: nobody answers any more
            detach(self.mountpoint)
            os.close(lock)

    def command(self, room: str, *arguments: str) -> list[str]:
        """How a child is started; the descriptor for its readiness is appended."""
        # -P: the working directory is no place to import from.
        return [sys.executable, "-P", "-m", f"fusesnap.daemon.{room}", self.settings, *arguments]

    def lock(self) -> int:
        """The proof that we are the only daemon on this state directory; the kernel drops it when we die."""
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(
            self.root / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            fail(
                f"{self.root}: in use by another daemon (pid {holder}): stop it, or give another --root",
                75,
            )
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return descriptor

    def watch(self, wake: int) -> None:
        """Start what is due, bury what died, until told to stop."""
        while True:
            now = time.monotonic()
            for child in self.children:
                if child.process is None and child.due <= now:
                    child.start()
            if self.wait(wake):
                return
            for child in self.children:
                child.buried()

    def wait(self, wake: int) -> bool:
        """Until something happens; true when it is the signal to stop."""
        due = [child.due for child in self.children if child.process is None]
        timeout = max(0.0, min(due) - time.monotonic()) if due else None
        speaking = {child.ready: child for child in self.children if child.ready >= 0}
        readable, _, _ = select.select([wake, *speaking], [], [], timeout)
        for descriptor in readable:
            if descriptor != wake:
                speaking[descriptor].note_ready()
        self.announce()
        signals = os.read(wake, 64) if wake in readable else b""
        return signal.SIGTERM in signals or signal.SIGINT in signals

    def announce(self) -> None:
        """Say once that everything serves."""
        if not self.announced and all(child.serves for child in self.children):
            self.announced = True
            sys.stdout.write(f"ready: serving {self.address} from {self.root}\n")
            sys.stdout.flush()


def main() -> None:
    """Run with the settings given as the only argument."""
    Supervisor(sys.argv[1]).run()


if __name__ == "__main__":
    main()
