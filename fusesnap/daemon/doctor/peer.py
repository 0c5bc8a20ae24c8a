"""Which process serves a unix socket."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid
CONNECT_WITHIN: Final = 5.0  # seconds
_CONFIGURATION_OPTIONS: Final = ("--config", "-c", "-config")


@dataclass(frozen=True, slots=True)
class Peer:
    """A process: ``words`` is its command line, ``program`` a path by which its program can be run again."""

    words: tuple[str, ...]
    program: Path

    @property
    def configuration(self) -> Path | None:
        """The file that it was told to read, if its command line says so."""
        for number, word in enumerate(self.words):
            option, _, value = word.partition("=")
            if option in _CONFIGURATION_OPTIONS:
                given = value or "".join(self.words[number + 1 : number + 2])
                return Path(given) if given else None
        return None


def peer(address: Path) -> Peer | None:
    """The process that listens at ``address``, as far as the kernel says who.

    It may not: a service manager may have made the socket, or the process be in another process id namespace. One of
    another user is not named either, because its program is going to be run.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(CONNECT_WITHIN)
        try:
            connection.connect(os.fspath(address))
            found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid, uid, _ = _CREDENTIALS.unpack(found)
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
        except OSError:
            return None
    named = tuple(map(os.fsdecode, words))
    if uid != os.geteuid() or not named or "containerd" not in Path(named[0]).name:
        return None
    return Peer(named, Path(f"/proc/{pid}/exe"))
