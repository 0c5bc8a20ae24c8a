"""All our processes die at once: what each kind of container sees, and that the next daemon recovers."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import subprocess
import sys
from pathlib import Path

from testbed.containerd import Container
from testbed.drill_bed import (
    IMAGE_FILE,
    DrillBed,
    Line,
    Materials,
    drill_bed,
    kill,
    readers,
    wait_for,
)
from testbed.drill_builder import LARGE, large_file
from testbed.drill_closure import DrillClosure
from testbed.drill_outcome import FIRST_ACCESS, Outcome
from testbed.drills import Events, account
from testbed.fusesnap_daemon import prefetch
from testbed.processes import CommandFailed
from testbed.workplace import processes_naming, run_directory

ANSWER_WITHIN = 20.0  # seconds; whoever gets no answer by then hangs
GONE = ("ENOTCONN", "ECONNABORTED")

# Reads a file past the page cache and prints the SHA-256 of it, or the name of the error. "mapped" says that it waits
# for a line after it has mapped the file, and reads then.
READ = """
import errno, hashlib, mmap, os, sys
path, manner = sys.argv[1:]
try:
    with open(path, "rb", buffering=0) as file:
        if manner == "mapped":
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
                pages[0]
                print("mapped", flush=True)
                sys.stdin.readline()
                pages.madvise(mmap.MADV_DONTNEED)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                data = pages[:]
        else:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            data = file.readall()
    print(hashlib.sha256(data).hexdigest())
except OSError as error:
    print(errno.errorcode[error.errno])
"""


class Attempt:
    """One attempt to read a file, in a process of its own that may hang or die."""

    def __init__(self, path: Path, manner: str = "read") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", READ, str(path), manner],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if manner == "mapped" and self._process.stdout is not None:
            self._process.stdout.readline()

    def result(self) -> str:
        """The SHA-256 of what was read, the name of an error or of a signal, or "hangs"."""
        try:
            said, _ = self._process.communicate("\n", timeout=ANSWER_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return "hangs"
        if self._process.returncode < 0:
            return signal.Signals(-self._process.returncode).name
        return said.strip()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def outage(materials: Materials, *, seed: int, line: Line) -> Outcome:
    """Kill everything of ours, look at a complete and a cold container, and start again."""
    outcome = Outcome("kill -9 of all processes together", seed)
    with run_directory("fd-") as work, drill_bed(materials, work, line=line) as bed:
        try:
            Outage(bed, outcome, seed).run()
        except CommandFailed as failure:
            outcome.wrong.append(str(failure))
    return outcome


class Outage:
    """The steps. ``committed`` was fetched before the cold container started, ``read`` in it, ``missing`` not."""

    def __init__(self, bed: DrillBed, outcome: Outcome, seed: int) -> None:
        self._bed = bed
        self._outcome = outcome
        self._seed = seed
        self._many: DrillClosure = bed.materials.many
        names = sorted(self._many.paths)
        self._committed, self._read, self._missing, self._in_flight = names[:4]

    def run(self) -> None:
        bed, small = self._bed, self._bed.materials.small
        many_image, small_image = bed.image(self._many), bed.image(small)
        prefetch(bed.daemon.state, [small.closure.root], source=bed.source())
        bed.containerd.run(many_image, "first", "/bin/cat", self._file(self._committed))
        with (
            bed.container(small_image, "complete") as complete,
            bed.container(many_image, "cold") as cold,
            readers(bed, small, complete, self._seed) as group,
        ):
            self._check("FUSE in the complete container", self._lazy(complete), expected=False)
            self._check("FUSE in the cold container", self._lazy(cold), expected=True)
            events = Events()
            self._die(cold, events)
            group.wait_for_progress()
            self._check("exec in the complete one", self._says(complete), expected="hello\n")
            with bed.daemon_again():
                self._recovered(complete, cold)
                group.wait_for_progress()
            self._outcome.wrong += group.stop()
            account(self._outcome, group, events)
            self._outcome.times.pop(FIRST_ACCESS, None)  # from the disk: this closure is complete

    def _die(self, cold: Container, events: Events) -> None:
        """Kill everything while readers of the cold container wait, and look what it still has."""
        root = cold.root()
        mapped = Attempt(root / self._file(self._read)[1:], "mapped")
        with self._bed.cache.silent():
            in_flight = Attempt(root / self._file(self._in_flight)[1:])
            wait_for(lambda: self._fetching(self._in_flight), "a fetch in flight")
            events.now()
            self._kill_all()
            self._check("a read in flight", in_flight.result(), *GONE)
        self._check("a read of a missing path", self._reads(root, self._missing), *GONE)
        self._check("an uncached page of a mapped file", mapped.result(), "SIGBUS")
        self._check(
            "a committed path", self._reads(root, self._committed), self._hash(self._committed)
        )
        image_file = Attempt(root / "etc/large").result()
        self._check("an image layer", image_file, sha256(IMAGE_FILE))
        self._check("exec of a committed program", self._says(cold), "hello\n")

    def _recovered(self, complete: Container, cold: Container) -> None:
        """After the next daemon's start: one mount, and both containers start again on the same snapshots."""
        lazy = self._bed.daemon.state.resolve() / "lazy"
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        self._check("FUSE mounts on the host", str(mounts.count(str(lazy))), "1")
        old = cold.root()
        self._check("the cold container's old mount", self._reads(old, self._missing), *GONE)
        self._check(
            "a committed path in it", self._reads(old, self._committed), self._hash(self._committed)
        )
        # containerd's own connection waits a little before it tries again.
        listing = ("snapshots", "--snapshotter", "fusesnap", "ls")
        wait_for(
            lambda: self._bed.containerd.ctr_unchecked(*listing).returncode == 0,
            "containerd's connection to the next daemon",
        )
        again = self._bed.containerd.restart_task(cold.name)
        for name in (self._committed, self._read, self._missing, self._in_flight):
            found = self._reads(again.root(), name)
            self._check("a read after the container's restart", found, self._hash(name))
        self._check("exec in the complete one", self._says(complete), "hello\n")

    def _check(self, what: str, found: object, *allowed: object, expected: object = None) -> None:
        self._outcome.accesses += 1
        choices = allowed or (expected,)
        if found not in choices:
            self._outcome.wrong.append(
                f"{what}: {found}, expected {' or '.join(map(str, choices))}"
            )

    def _kill_all(self) -> None:
        """SIGKILL to every process of the daemon, and wait until they are gone."""

        def ours() -> list[int]:
            naming = processes_naming(self._bed.daemon.state)
            return [pid for pid, command in naming.items() if "fusesnap." in command]

        for pid in ours():
            kill(pid)
        with contextlib.suppress(ProcessLookupError):
            self._bed.daemon.service.kill()
        wait_for(lambda: not ours(), "the end of all processes")

    def _fetching(self, name: str) -> bool:
        path = self._many.paths[name]
        return any(each["path"] == path for each in self._bed.daemon.status()["fetching"])

    def _lazy(self, container: Container) -> bool:
        lines = container.mounts().splitlines()
        root = next(line for line in lines if line.split()[4] == "/")
        return f"{self._bed.daemon.state.name}/lazy" in root

    def _file(self, name: str) -> str:
        return f"{self._many.paths[name]}/{LARGE}"

    def _hash(self, name: str) -> str:
        return sha256(large_file(name, self._many.size))

    def _reads(self, root: Path, name: str) -> str:
        return Attempt(root / self._file(name)[1:]).result()

    @staticmethod
    def _says(container: Container) -> str:
        done = container.execute_unchecked("/bin/echo", "hello", timeout=ANSWER_WITHIN)
        return done.stdout or done.stderr
