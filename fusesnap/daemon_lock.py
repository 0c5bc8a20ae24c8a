"""The lock file of a state directory: one daemon at a time, who it is, and how it is."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

NAME = "daemon.lock"


class Unusable(Exception):
    """The state directory cannot be had."""

    status = 74  # sysexits.h: EX_IOERR


class InUse(Exception):
    """Another daemon has the state directory; ``status`` is the exit code to end with (EX_TEMPFAIL of sysexits.h)."""

    status = 75


@dataclass(frozen=True, slots=True)
class DaemonState:
    """What a running daemon says of itself: ``state`` is starting, serving, reloading or failed (with the reason)."""

    pid: int
    reloads: int  # how many were asked for
    state: str
    reason: str


class DaemonLock:
    """The lock, held; the kernel drops it when the last process that has ``descriptor`` ends."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._told = b""

    @classmethod
    def take(cls, root: Path) -> DaemonLock:
        """Make the directory and be its only daemon. Raises ``InUse`` with the other's process id."""
        try:
            root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(root / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Unusable(f"{root}: cannot be the state directory: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").partition("\n")[0].strip()
            os.close(descriptor)
            raise InUse(
                f"{root}: in use by another daemon (pid {holder or 'unknown'}): stop it, or give another --root"
            ) from None
        lock = cls(descriptor)
        lock.tell(0, "starting")
        return lock

    def tell(self, reloads: int, state: str, reason: str = "") -> None:
        """Write how we are. The first line is the process id alone."""
        said = json.dumps(asdict(DaemonState(os.getpid(), reloads, state, reason)))
        told = f"{os.getpid()}\n{said}\n".encode()
        if told != self._told:
            with suppress(
                OSError
            ):  # on a full disk: the lock holds all the same, this is only for people
                os.pwrite(self.descriptor, told, 0)
                os.truncate(self.descriptor, len(told))
            self._told = told


def running_daemon(root: Path) -> DaemonState | None:
    """The daemon that holds the lock of ``root``, if one does."""
    try:
        descriptor = os.open(root / NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _parse(os.read(descriptor, 1 << 16))
    finally:
        os.close(descriptor)
    return None


def _parse(said: bytes) -> DaemonState:
    """A file that is just being written, or that an earlier version wrote, tells the process id only."""
    first, _, rest = said.partition(b"\n")
    try:
        return DaemonState(**json.loads(rest))
    except (ValueError, TypeError):
        return DaemonState(int(first), 0, "starting", "")
