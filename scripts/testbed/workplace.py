"""Where the test bed keeps what it builds, where it runs, and what a run has left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from testbed.containerd import CGROUPS, end_containers, mounts_below
from testbed.processes import kill_group, listens, run, wait_for_process


def default_work() -> Path:
    """The directory for what is built once: ``fusesnap-testbed`` in the user's cache directory."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "fusesnap-testbed"


@contextlib.contextmanager
def run_directory(prefix: str = "fusesnap-") -> Iterator[Path]:
    """A new directory for one run, with a path short enough for unix sockets, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def leftovers(directory: Path, ports: Iterable[int] = ()) -> list[str]:
    """What a run in ``directory`` has left: mounts, processes, ports that still listen, cgroups, files; a line each."""
    found = [f"mounted: {point}" for point in mounts_below(directory)]
    found += [f"running: {pid} {command}" for pid, command in processes_naming(directory).items()]
    found += [f"listening: 127.0.0.1:{port}" for port in ports if listens(port)]
    found += [f"cgroup: {path}" for path in CGROUPS.glob(f"**/*{directory.name}*")]
    if directory.exists():
        found.append(f"directory: {directory}")
    return found


def sweep(directory: Path) -> None:
    """Remove the directory of a run, and by force what the run has left if its cleaning up was interrupted."""
    _kill(processes_naming(directory))
    for mount in reversed(
        mounts_below(directory)
    ):  # whose server is dead, and which no search survives
        run(["umount", "--lazy", mount])
    for configuration in (
        *directory.glob("*/containerd.toml"),
        *directory.glob("*/*/containerd.toml"),
    ):
        end_containers(configuration.parent)
    shutil.rmtree(directory, ignore_errors=True)


def processes_naming(directory: Path) -> dict[int, str]:
    """Processes, without this one, whose command line names ``directory`` or something below it; id to command."""
    needle = os.fsencode(directory)
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            command = (process / "cmdline").read_bytes()
            if needle in command and int(process.name) != os.getpid():
                words = command.decode(errors="replace").split("\0")
                found[int(process.name)] = " ".join(words).strip()
    return found


def _kill(pids: Iterable[int]) -> None:
    """End processes, and the groups of those that lead one: not every process names its directory."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        kill_group(pid)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        wait_for_process(pid)
