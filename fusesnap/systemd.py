"""systemd's side of the supervisor: sd_notify(3), and its file descriptor store, by their documented protocols."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping

FIRST_DESCRIPTOR = 3  # sd_listen_fds(3)
FUSE, STATE = "fuse", "fusesnap-state"


class ServiceManager:
    """Speaks to the service manager, if there is one; otherwise says nothing to nobody."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        store = environment.get("FDSTORE", "0")
        # systemd 254 and later says how many descriptors it stores; the unit file says it to earlier ones.
        self.keeps = bool(self._address) and store.isdigit() and int(store) > 1
        period = environment.get("WATCHDOG_USEC", "")
        self.watchdog = int(period) / 2e6 if period.isdigit() else 0.0  # seconds, half of the limit
        self._next_beat = 0.0

    def say(self, *lines: str, descriptors: tuple[int, ...] = ()) -> None:
        """One message. That nobody listens is not an error of ours."""
        if not self._address:
            return
        # "@" stands for the abstract namespace's NUL.
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        with socket.socket(socket.AF_UNIX, kind) as to, contextlib.suppress(OSError):
            to.connect(address)
            socket.send_fds(to, ["\n".join(lines).encode()], descriptors)

    def beat(self, now: float) -> None:
        """The sign of life that the unit's WatchdogSec asks for."""
        if self.watchdog and now >= self._next_beat:
            self._next_beat = now + self.watchdog
            self.say("WATCHDOG=1")

    def reloading(self) -> None:
        """From here until READY=1."""
        self.say("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def store(self, fuse: int, state: int) -> None:
        """Have the descriptors kept while no process of ours runs, instead of any before."""
        if self.keeps:
            self.forget()
            self.say("FDSTORE=1", f"FDNAME={FUSE}", descriptors=(fuse,))
            self.say("FDSTORE=1", f"FDNAME={STATE}", descriptors=(state,))

    def forget(self) -> None:
        """Drop what is kept."""
        if self.keeps:
            for name in (FUSE, STATE):
                self.say("FDSTOREREMOVE=1", f"FDNAME={name}")


def stored(environment: MutableMapping[str, str]) -> dict[str, int]:
    """The descriptors that the service manager gives back, by name; to be asked once."""
    count = environment.pop("LISTEN_FDS", "0")
    process = environment.pop("LISTEN_PID", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if process != str(os.getpid()) or not count.isdigit():
        return {}
    numbers = range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(count))
    for number in numbers:
        os.set_inheritable(number, False)
    return dict(zip(names, numbers, strict=False))
