"""containerd's own suite for snapshotters, and its overlayfs beside ours: the Go program of ``tests/conformance``.

``python -m testbed.conformance`` builds it, so that it is there when the tests ask for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from testbed.fusesnap_daemon import FusesnapDaemon
from testbed.processes import CommandFailed, run, run_unchecked
from testbed.workplace import default_work

SOURCE = Path(__file__).parents[2] / "tests" / "conformance"
# The toolchain of the virtual environment, and no other that it might fetch; the modules of go.sum, and no others.
GO = Path(sys.executable).with_name("go")
GO_ENVIRONMENT = {"GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly", "GOWORK": "off"}
# Without optimisation it takes a fifth less time to compile.
FLAGS = ("-vet=off", "-gcflags=all=-N -l", "-ldflags=-s -w")
GO_TRIES = 3  # modules come over the network
BUILD_SECONDS = 600
TEST_SECONDS = 120


@dataclass(frozen=True)
class Suite:
    """The built program, which runs the tests it is told to."""

    program: Path

    def run(
        self, pattern: str, daemon: FusesnapDaemon | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the tests that ``pattern`` names, one after another, against the daemon."""
        options = [f"-test.run={pattern}", "-test.v", "-test.parallel=1", "-test.count=1"]
        environment = {"FUSESNAP_ADDRESS": "", "FUSESNAP_STATE": ""}
        if daemon is not None:
            environment["FUSESNAP_ADDRESS"] = str(daemon.address)
            environment["FUSESNAP_STATE"] = str(daemon.state)
        return run_unchecked(
            [self.program, *options], env=environment, cwd=SOURCE, timeout=TEST_SECONDS
        )


def built_suite(work: Path) -> Suite:
    """The suite below ``work``, built once for each version of the toolchain, of the modules and of our part."""
    facts = [run([GO, "version"], env=GO_ENVIRONMENT).encode(), " ".join(FLAGS).encode()]
    facts += [
        file.read_bytes() for file in sorted(SOURCE.glob("go.*")) + sorted(SOURCE.glob("*.go"))
    ]
    identity = hashlib.sha256(b"\0".join(facts)).hexdigest()[:16]
    directory = work / "conformance"
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / f"suite-{identity}"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be building it
        if not program.exists():
            unfinished = directory / "unfinished"
            _build(unfinished)
            unfinished.rename(program)
    return Suite(program)


def _build(program: Path) -> None:
    """Compile the suite. Raises CommandFailed with what the compiler said."""
    command: list[str | Path] = [GO, "test", "-c", *FLAGS, "-o", program, "."]
    for attempt in range(1, GO_TRIES + 1):
        try:
            run(command, env=GO_ENVIRONMENT, cwd=SOURCE, timeout=BUILD_SECONDS)
        except CommandFailed:
            if attempt == GO_TRIES:
                raise
        else:
            return


if __name__ == "__main__":
    built_suite(default_work())
