"""A process that unpacks, as it is started: before there is a loop that would talk to it, if need be."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Sequence
from typing import Final

# Seconds for a process to finish the piece that it is at, and throw away the rest.
GRACE: Final = 10.0


class StartedProcess:
    """The process and our end of its stream. It ends when the stream does.

    ``command`` starts it; the number of its end of the stream is appended. It is exec'd, never only forked: a copy of
    us that holds the FUSE descriptor would turn our death into a hang.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.stream, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            descriptor = theirs.fileno()
            self.process = subprocess.Popen(
                [*command, str(descriptor)], pass_fds=[descriptor], stdin=subprocess.DEVNULL
            )

    def end(self) -> int:
        """Close the stream, if nobody has, and return what the process ended with; blocking, for :data:`GRACE`."""
        self.stream.close()
        try:
            return self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
