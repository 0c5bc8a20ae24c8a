"""A reader below the daemon's mount, who asks what only a worker can say."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 150.0  # seconds for anything to happen on a machine that is busy

# Looks up names that are not there, which only a worker can say, and counts. Any other answer ends it.
READER = """
import os, sys
directory = os.open(sys.argv[1], os.O_RDONLY)
while True:
    for number in range(10):
        try:
            os.stat(f"none-{os.urandom(8).hex()}", dir_fd=directory)
        except FileNotFoundError:
            pass
    os.write(1, b".")
"""


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


@dataclass
class Reader:
    """A process that reads below the mount."""

    process: subprocess.Popen[bytes]
    said: Path
    log: Path  # of the daemon

    def goes_on(self) -> None:
        """Wait until it has had answers from now on."""
        before = self.said.stat().st_size
        wait_until(lambda: self.ended or self.said.stat().st_size > before + 2)
        errors = self.said.with_suffix(".errors").read_text()
        assert not self.ended, f"{errors}\n{self.log.read_text()}"

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def is_told_of_the_end(self) -> None:
        """Wait until it got an error: ECONNABORTED for a request that was under way, ENOTCONN for a later one."""
        assert self.process.wait(PATIENCE) == 1
        errors = self.said.with_suffix(".errors").read_text()
        assert "[Errno 103]" in errors or "[Errno 107]" in errors

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def reading(
    mountpoint: Path, said: Path, *, inside: Sequence[str | Path] = (), log: Path | None = None
) -> Iterator[Reader]:
    """Read below a mount for the time of the context; ``inside`` are the words of a command that runs the reader."""
    command = [*inside, sys.executable, "-c", READER, mountpoint / "layer"]
    with said.open("wb") as output, said.with_suffix(".errors").open("wb") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors)
    reader = Reader(process, said, log or mountpoint.parent.with_suffix(".log"))
    try:
        yield reader
    finally:
        reader.end()
