"""``fusesnap`` as a user runs it: the daemon for the time of a context, and the commands that end by themselves."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed.containerd import mounts_below
from testbed.cri_pull import cri_pull
from testbed.processes import Service, run, running

# Beside the interpreter that runs the test bed: the virtual environment's.
PROGRAM = Path(sys.executable).with_name("fusesnap")


@dataclass(frozen=True, slots=True)
class Source:
    """From where to fetch, and whom to trust: substituters' URLs and public keys, in order."""

    caches: Sequence[str]
    keys: Sequence[str]

    @property
    def options(self) -> list[str]:
        """The same as options of ``fusesnap``."""
        words = [word for cache in self.caches for word in ("-s", cache)]
        return words + [word for key in self.keys for word in ("--trusted-public-key", key)]


@dataclass(frozen=True, slots=True)
class FusesnapDaemon:
    """A running daemon."""

    service: Service
    state: Path
    address: Path

    def status(self) -> dict[str, Any]:
        """What ``fusesnap status --json`` says."""
        status: dict[str, Any] = json.loads(
            run([PROGRAM, "status", "--json", "--address", self.address])
        )
        return status

    def pull(self, reference: str, *, timeout: float = 60) -> str:
        """Pull an image as a kubelet does; returns its id. Its containerd is what the daemon's options say."""
        return cri_pull(self.address, reference, timeout=timeout)

    def start_report(self, *words: str | Path) -> str:
        """What ``fusesnap start-report`` prints."""
        return run([PROGRAM, "start-report", "--address", self.address, *words])


@contextlib.contextmanager
def fusesnap_daemon(
    state: Path,
    *,
    source: Source,
    address: Path | None = None,
    options: Sequence[str] = (),
    complete: bool = False,
) -> Iterator[FusesnapDaemon]:
    """Run ``fusesnap daemon`` on a state directory for the time of the context.

    The path of ``state`` must be short, for its sockets; beside it lies the log, ``<state>.log``. ``options`` are
    further options. Without ``complete`` nothing is fetched that no program asked for. What the daemon leaves mounted,
    because it was killed, is unmounted.
    """
    state.mkdir(parents=True, exist_ok=True)
    address = address or state / "fusesnap.sock"
    command: list[str | Path] = [PROGRAM, "daemon", "--root", state, "--address", address]
    command.append("--complete" if complete else "--no-complete")
    try:
        with running(
            [*command, *source.options, *options], log=state.with_name(f"{state.name}.log")
        ) as service:
            service.wait_for_line("ready")
            yield FusesnapDaemon(service, state, address)
    finally:
        for mount in reversed(mounts_below(state)):
            run(["umount", "--lazy", mount])


def prefetch(state: Path, paths: Sequence[str], *, source: Source, timeout: float = 120) -> str:
    """Run ``fusesnap prefetch`` and return what it prints; ``timeout`` in seconds."""
    return run([PROGRAM, "prefetch", "--state", state, *source.options, *paths], timeout=timeout)
