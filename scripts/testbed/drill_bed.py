"""What a drill runs on: a container started cold over a slow link, and eight readers in it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from testbed.binary_cache import (
    CacheFiles,
    HttpCache,
    SigningKey,
    http_cache,
    signing_key,
    write_cache,
)
from testbed.containerd import Container, Containerd, containerd
from testbed.drill_builder import LARGE
from testbed.drill_closure import DrillClosure, drill_closure
from testbed.drill_reader import FIRST_SLOT, PROBES, SLOT, Role, Task
from testbed.fusesnap_daemon import FusesnapDaemon, Source, fusesnap_daemon
from testbed.images import NixLayerManner, nix_layer, ordinary_layer, write_image
from testbed.link_process import RunningLink, slow_link
from testbed.nix_store import NixStore
from testbed.processes import CommandFailed

POLL = 0.005
# Nothing in a drill may take longer; what does is a hang.
HANG = 120.0
WARM = 4  # paths that are committed before a drill starts
ROLES = (*PROBES, Role.EXECUTE, Role.FIRST, Role.FIRST, Role.FIRST, Role.FIRST)
WATCHDOG = 10.0  # seconds, the daemon's default
IMAGE_FILE = bytes(range(256)) * 4096  # what image layers hold at etc/large


@dataclass(frozen=True, slots=True)
class Materials:
    """What is made once: closures in a signed cache.

    ``many`` has 150 paths of 200 to 300 KB, ``tiny`` 400 of 20 KB, ``small`` 24 of these.
    """

    store: NixStore
    many: DrillClosure
    tiny: DrillClosure
    small: DrillClosure
    files: CacheFiles
    key: SigningKey


def prepare_materials(work: Path) -> Materials:
    """Build them below ``work``, or find them again."""
    store = NixStore(work / "store")
    many = drill_closure(store, "drill-many", count=150, size=200_000)
    tiny = drill_closure(store, "drill-tiny", count=400, size=600)
    small = drill_closure(store, "drill-small", count=24, size=600)
    key = signing_key(work / "keys")
    roots = [each.closure.root for each in (many, tiny, small)]
    files = write_cache(store, roots, work / "cache-drill", compression="zstd", key=key)
    return Materials(store, many, tiny, small, files, key)


@dataclass(frozen=True, slots=True)
class Line:
    """The figures of the link to the cache: bits a second, and the round trip in seconds."""

    rate: float = 20e6
    round_trip: float = 0.08


FAST = Line(200e6, 0.01)


@dataclass(slots=True)
class DrillBed:
    """One node with its cache behind a link."""

    materials: Materials
    work: Path
    cache: HttpCache
    link: RunningLink
    daemon: FusesnapDaemon
    containerd: Containerd
    options: Sequence[str]
    stack: contextlib.ExitStack
    references: list[str] = field(default_factory=list)

    def source(self) -> Source:
        return Source([self.link.url("cache")], [self.materials.key.public])

    def image(self, closure: DrillClosure) -> str:
        """Import an image of the closure; returns its reference."""
        name = f"registry.example.org/drill:{len(self.references) + 1}"
        layers = [
            ordinary_layer({"etc/hostname": b"drill\n", "etc/large": IMAGE_FILE, "tmp/.keep": b""}),
            nix_layer(
                self.materials.store,
                closure.closure,
                NixLayerManner.PLACEHOLDERS,
                copy_to_root=True,
            ),
        ]
        archive = self.work / "image.tar"
        write_image(archive, layers, name=name, environment={"PATH": "/bin"})
        self.references.append(self.containerd.import_archive(archive))
        return self.references[-1]

    @contextlib.contextmanager
    def container(self, reference: str, name: str) -> Iterator[Container]:
        """A container that only sleeps."""
        with self.containerd.started(reference, name, "/bin/sleep", "100000") as container:
            yield container

    def restart_containerd(self) -> None:
        """Kill containerd and start it again; what it runs goes on."""
        self.containerd.restart(self.stack)

    @contextlib.contextmanager
    def daemon_again(self) -> Iterator[FusesnapDaemon]:
        """Another daemon on the same state directory, for the time of the context."""
        with fusesnap_daemon(
            self.daemon.state, source=self.source(), options=self.options
        ) as again:
            yield again


@contextlib.contextmanager
def drill_bed(
    materials: Materials, work: Path, *, line: Line, relay: str = "", watchdog: float = WATCHDOG
) -> Iterator[DrillBed]:
    """Start a node on fresh state in ``work``. ``relay`` is the daemon's option of that name, if given."""
    options = daemon_options(work, relay, watchdog)
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(http_cache(materials.files, work / "nginx"))
        link = stack.enter_context(
            slow_link({"cache": cache.port}, work, rate=line.rate, round_trip=line.round_trip)
        )
        source = Source([link.url("cache")], [materials.key.public])
        daemon = stack.enter_context(fusesnap_daemon(work / "s", source=source, options=options))
        client = stack.enter_context(containerd(work / "c", proxy=daemon.address))
        yield DrillBed(materials, work, cache, link, daemon, client, options, stack)


def daemon_options(work: Path, relay: str, watchdog: float) -> list[str]:
    """The options of a daemon with that watchdog, in seconds."""
    configuration = work / "fusesnap.toml"
    configuration.write_text(f"watchdog = {watchdog}\n")
    return ["--config", str(configuration), *(["--relay", relay] if relay else [])]


# --------------------------------------------------------------------------------------- processes


def children(pid: int) -> list[int]:
    """The children of a process; none if it is gone."""
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def part(supervisor: int, name: str) -> int | None:
    """The process id of the supervisor's worker or services; None while there is none.

    Of several workers the oldest is the one that serves: the others load, or wait for their turn.
    """
    for pid in children(supervisor):
        with contextlib.suppress(OSError):
            if f"fusesnap.daemon.{name}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    return None


def wait_for(condition: Callable[[], object], what: str, *, timeout: float = HANG) -> None:
    """Wait until ``condition()`` holds. Raises CommandFailed after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise CommandFailed(f"{what} did not happen within {timeout:g} s")
        time.sleep(POLL)


def next_part(supervisor: int, name: str, before: int | None) -> int:
    """Wait for a worker (or services) that is not ``before``; its process id."""
    found: list[int] = []

    def there() -> bool:
        pid = part(supervisor, name)
        if pid is not None and pid != before:
            found.append(pid)
        return bool(found)

    wait_for(there, f"a new {name} of supervisor {supervisor}")
    return found[0]


# ----------------------------------------------------------------------------------------- readers


@dataclass(frozen=True, slots=True)
class Access:
    """One access that took long, or failed; times of the monotonic clock."""

    role: Role
    what: str
    path: str
    start: float
    end: float
    error: str


@dataclass(slots=True)
class Readers:
    """Eight readers in a container, which run until :meth:`stop`."""

    directory: Path
    tasks: list[Task]
    processes: list[subprocess.Popen[bytes]]
    board: Path

    def counts(self) -> list[int]:
        """How many accesses each has ended so far."""
        return [self._slot(task)[0] for task in self.tasks]

    def probes(self) -> list[int]:
        """The same of those that read committed paths past the page cache."""
        return [self._slot(task)[0] for task in self.tasks if task.role in PROBES]

    @property
    def through(self) -> bool:
        """Whether no path is left that nobody has read."""
        return all(self._slot(task)[2] for task in self.tasks if task.role is Role.FIRST)

    def _slot(self, task: Task) -> tuple[int, float, float]:
        with self.board.open("rb") as file:
            file.seek(FIRST_SLOT + task.slot * SLOT.size)
            count, in_flight, through = SLOT.unpack(file.read(SLOT.size))
        return count, in_flight, through

    def dead(self) -> list[str]:
        """Readers that have ended although nobody stopped them: SIGBUS, say."""
        return [
            f"reader {task.role} ended with {process.poll()}"
            for task, process in zip(self.tasks, self.processes, strict=True)
            if process.poll() is not None
        ]

    def wait_for_progress(self, *, timeout: float = HANG) -> None:
        """Wait until each reader has ended an access that it began after now. Raises CommandFailed for a hang."""
        before = self.counts()

        def all_went_on() -> bool:
            pairs = zip(self.counts(), before, self.processes, strict=True)
            return all(now > then + 1 or process.poll() is not None for now, then, process in pairs)

        wait_for(all_went_on, f"progress of all readers ({self})", timeout=timeout)

    def stop(self) -> list[str]:
        """Have them end; what is wrong with them, a line each."""
        wrong = self.dead()
        with self.board.open("r+b") as file:
            file.write(b"\1")
        for task, process in zip(self.tasks, self.processes, strict=True):
            try:
                process.wait(HANG)
            except subprocess.TimeoutExpired:
                wrong.append(f"reader {task.role} hangs")
                process.kill()
        return wrong

    def accesses(self) -> list[Access]:
        """What they have noted, in no order."""
        return [
            Access(task.role, **json.loads(line))
            for task in self.tasks
            for line in Path(task.report).read_text().splitlines()
        ]

    def __str__(self) -> str:
        now = time.monotonic()
        slots = ((task.role, self._slot(task)) for task in self.tasks)
        return "; ".join(
            f"{role}: {count}" + (f", in flight for {now - since:.1f} s" if since else "")
            for role, (count, since, _) in slots
        )


@contextlib.contextmanager
def readers(
    bed: DrillBed, closure: DrillClosure, container: Container, seed: int
) -> Iterator[Readers]:
    """Start readers in a container of ``closure`` of which nothing has been read yet, for the time of the context."""
    directory = bed.work / f"readers-{container.name}"
    directory.mkdir()
    board = directory / "board"
    board.write_bytes(bytes(4096))
    names = sorted(closure.paths.items())
    warm, cold = names[:WARM], names[WARM:]
    root = container.root()
    for _, path in warm:
        (root / path.lstrip("/") / LARGE).read_bytes()
    tasks = [
        Task(
            role, slot, seed + slot, str(root), str(board), str(directory / f"report-{slot}"),
            closure.size, cold[slot - 4 :: 4] if role is Role.FIRST else warm,
        )
        for slot, role in enumerate(ROLES)
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    processes: list[subprocess.Popen[bytes]] = []
    group = Readers(directory, tasks, processes, board)
    try:
        for task in tasks:
            command = [sys.executable, "-m", "testbed.drill_reader", task.to_json()]
            log = Path(f"{task.report}.log").open("wb")  # noqa: SIM115 - closed below
            with log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        wait_for(lambda: all(count > 0 for count in group.counts()[:4]), "a first access of each")
        yield group
    finally:
        group.stop()


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
