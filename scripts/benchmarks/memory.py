"""How much memory the daemon holds after it has fetched gigabytes and served a thousand mounts."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
from testbed.binary_cache import http_cache, signing_key
from testbed.fusesnap_daemon import FusesnapDaemon, Source, fusesnap_daemon
from testbed.processes import CommandFailed
from testbed.workplace import leftovers, sweep

from benchmarks.large_cache import (
    BLOCK,
    COMPRESSORS,
    LARGE,
    SMALL,
    LargePath,
    large_paths,
    write_large_cache,
)
from benchmarks.mounting import Mounter
from benchmarks.resident import MIB, Peaks, Resident, measure, watched
from fusesnap.nix.closure_labels import LAYER_LABEL, STORE_PATH_LABEL_PREFIX
from fusesnap.nix.store_path import StoreDir
from fusesnap.services.api import snapshots_pb2 as pb
from fusesnap.services.api.snapshots_pb2_grpc import SnapshotsStub

DESCRIPTION = """\
Starts the daemon on a new state directory, with a binary cache of its own behind nginx; commits an image of Nix
packages over gRPC; prepares snapshots of it and mounts them while nothing is fetched; reads every byte of every path
through those mounts, checked, by several readers at once; unmounts and removes the snapshots. Shows what the daemon's
processes hold resident at each step. Exit status 1 if the worker or the supervisor ever held more than its limit.
"""
LIMITS = {"worker": 120 * MIB, "supervisor": 20 * MIB}
CALL_SECONDS = 120
STEP_SECONDS = 1800  # for what a minute or two should do: a daemon that hangs must not hang us
ROOM = 512 * MIB  # what databases, small files and others may need besides
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
IMAGE = "image"


class WrongBytes(Exception):
    """A reader got other bytes than the path has."""


@dataclass
class Report:
    """What was measured, step by step, in order."""

    nar_bytes: int
    paths: int
    entries: int
    mounts: int
    readers: int
    compression: str
    steps: dict[str, list[Resident]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: Peaks | None = None

    @contextlib.contextmanager
    def step(self, name: str, daemon: FusesnapDaemon, say: Callable[[str], None]) -> Iterator[None]:
        """Time what is done in the context, and measure when it is over."""
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began
        self.steps[name] = measure(daemon.service.pid, serving(daemon))
        say(f"{name} in {self.seconds[name]:.1f} s")

    def largest(self, role: str) -> int:
        """The most that any process of the role has ever held, in bytes."""
        return max(
            (each.peak for step in self.steps.values() for each in step if each.role == role),
            default=0,
        )

    def problems(self) -> list[str]:
        """Why this is no success; a line each."""
        found = []
        for role, limit in LIMITS.items():
            held = self.largest(role)
            if held > limit:
                found.append(
                    f"the {role} held {mebibytes(held)} MiB, its limit is {mebibytes(limit)} MiB"
                )
            pids = {each.pid for step in self.steps.values() for each in step if each.role == role}
            if len(pids) != 1:
                found.append(f"expected one {role} from start to end, there were {len(pids)}")
        return found

    def as_json(self) -> dict[str, Any]:
        """Everything; sizes in bytes."""
        peaks = self.peaks
        return {
            "nar_bytes": self.nar_bytes,
            "paths": self.paths,
            "entries": self.entries,
            "mounts": self.mounts,
            "readers": self.readers,
            "compression": self.compression,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "steps": {
                name: [{"role": each.role, **each.as_json()} for each in step]
                for name, step in self.steps.items()
            },
            "largest": {role: self.largest(role) for role in LIMITS},
            "limits": LIMITS,
            "sampled": None
            if peaks is None
            else {"rss": peaks.rss, "processes": peaks.processes, "total_pss": peaks.total_pss},
            "problems": self.problems(),
        }

    def as_text(self) -> str:
        """For a person."""
        lines = [
            "",
            f"{'after':<10}  {'process':<16}{'pid':>8}{'RSS':>9}{'PSS':>9}{'anonymous':>11}{'peak':>9}{'threads':>9}",
        ]
        for name, step in self.steps.items():
            for number, each in enumerate(step):
                figures = (each.rss, each.pss, each.anonymous, each.peak)
                rss, pss, anonymous, peak = map(mebibytes, figures)
                lines.append(
                    f"{'' if number else name:<10}  {each.role:<16}{each.pid:>8}"
                    f"{rss:>9}{pss:>9}{anonymous:>11}{peak:>9}{each.threads:>9}"
                )
        lines.append("\nMiB. RSS counts pages that are shared with other processes in full.")
        if self.peaks is not None:
            lines.append("Most at once, as sampled:")
            lines += [
                f"  {role} x {self.peaks.processes[role]}: {mebibytes(rss)} MiB RSS"
                for role, rss in sorted(self.peaks.rss.items())
            ]
            lines.append(f"  all together: {mebibytes(self.peaks.total_pss)} MiB PSS")
        lines += [
            f"{role}: at most {mebibytes(self.largest(role))} MiB, limit {mebibytes(limit)} MiB"
            for role, limit in LIMITS.items()
        ]
        return "\n".join([*lines, *(f"Over: {problem}" for problem in self.problems())])


class Client:
    """containerd's part: asks for snapshots, and mounts what it is told."""

    def __init__(self, channel: grpc.Channel, directory: Path) -> None:
        self._stub = SnapshotsStub(channel)
        self._directory = directory
        self._mounter = Mounter()

    @property
    def mounted(self) -> list[Path]:
        """Where snapshots are mounted."""
        return self._mounter.mounted

    def commit_image(self, paths: Sequence[LargePath], store_dir: StoreDir) -> None:
        """The image's one layer: a placeholder for each path, and labels that name them."""
        names = [path.store_path for path in paths]
        labels = {LAYER_LABEL: "true"} | {
            f"{STORE_PATH_LABEL_PREFIX}{number}": store_dir.format(name)
            for number, name in enumerate(names)
        }
        key = "extract-1 image"
        request = pb.PrepareSnapshotRequest(key=key, labels=labels)
        (mount,) = self._stub.Prepare(request, timeout=CALL_SECONDS).mounts
        for name in names:
            Path(f"{mount.source}{store_dir.format(name)}").mkdir(parents=True)
        commit = pb.CommitSnapshotRequest(name=IMAGE, key=key, labels=labels)
        self._stub.Commit(commit, timeout=CALL_SECONDS)

    def start(self, key: str) -> None:
        """Prepare a container's snapshot, and mount it."""
        request = pb.PrepareSnapshotRequest(key=key, parent=IMAGE)
        (mount,) = self._stub.Prepare(request, timeout=CALL_SECONDS).mounts
        self._mounter.mount(mount, self._directory / key)

    def end(self, target: Path) -> None:
        """Unmount a container's snapshot, and remove it."""
        self._mounter.unmount(target)
        self._stub.Remove(pb.RemoveSnapshotRequest(key=target.name), timeout=CALL_SECONDS)

    def close(self) -> None:
        """Unmount what is left, whoever uses it."""
        self._mounter.close()


def check_path(path: LargePath, root: bytes) -> None:
    """Read everything that a path holds, below ``root``. Raises WrongBytes."""
    with open(root + b"/" + LARGE, "rb", buffering=0) as file:  # noqa: PTH123 - bytes
        for index in range(path.blocks):
            _check(file.read(BLOCK), path.block(index), file.name)
        _check(file.read(1), b"", file.name)
    small = root + b"/" + SMALL
    names = sorted(os.listdir(small))
    if names != [path.small_name(index) for index in range(path.files)]:
        raise WrongBytes(f"{os.fsdecode(small)}: {len(names)} names, not those of its NAR")
    for index, name in enumerate(names):
        with open(small + b"/" + name, "rb", buffering=0) as file:  # noqa: PTH123 - bytes
            _check(file.read(BLOCK), path.small(index), file.name)


def _check(found: bytes | None, expected: bytes, name: object) -> None:
    if found != expected:
        raise WrongBytes(f"{name!r}: other bytes than its NAR has")


def read_all(client: Client, paths: Sequence[LargePath], store_dir: StoreDir, readers: int) -> None:
    """Every path, each through a mount of its own, by ``readers`` threads."""
    roots = [
        os.fsencode(
            f"{client.mounted[number % len(client.mounted)]}{store_dir.format(path.store_path)}"
        )
        for number, path in enumerate(paths)
    ]
    with ThreadPoolExecutor(readers) as threads:
        try:
            for _ in threads.map(check_path, paths, roots):
                pass
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def start_all(client: Client, count: int, store_dir: StoreDir) -> None:
    """Mount ``count`` snapshots, and do what a container does first: list the store, look at every path in it."""
    for number in range(count):
        client.start(f"container-{number}")
    for target in client.mounted:
        for entry in os.scandir(f"{target}{store_dir.path}"):
            entry.stat()


def end_all(client: Client) -> None:
    """Unmount and remove every snapshot."""
    for target in list(client.mounted):
        client.end(target)


def run_steps(
    daemon: FusesnapDaemon,
    client: Client,
    paths: Sequence[LargePath],
    report: Report,
    say: Callable[[str], None],
) -> None:
    """The life of a busy node, measured at each step."""
    store_dir = StoreDir()
    with report.step("start", daemon, say):
        client.commit_image(paths, store_dir)
    with report.step("mounts", daemon, say):
        in_thread(lambda: start_all(client, report.mounts, store_dir))
    with (
        report.step("fetches", daemon, say),
        watched(daemon.service.pid, serving(daemon)) as report.peaks,
    ):
        in_thread(lambda: read_all(client, paths, store_dir, report.readers))
    with report.step("unmounts", daemon, say):
        in_thread(lambda: end_all(client))


def serving(daemon: FusesnapDaemon) -> int:
    """The worker that serves; another may stand by."""
    pid: int = daemon.status()["worker"]["pid"]
    return pid


def in_thread(function: Callable[[], None]) -> None:
    """Call what looks into mounts. A thread that waits for a file system cannot be interrupted: we can, and end the
    daemon, which releases the thread.
    """
    ended: Future[None] = Future()

    def work() -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            ended.set_exception(error)
        else:
            ended.set_result(None)

    threading.Thread(target=work, daemon=True).start()
    ended.result(STEP_SECONDS)


def bench(
    arguments: argparse.Namespace, directory: Path, ports: list[int], say: Callable[[str], None]
) -> Report:
    """The whole measurement; what listens meanwhile is added to ``ports``."""
    paths = large_paths(arguments.megabytes * 10**6, arguments.paths, arguments.files)
    began = time.monotonic()
    key = signing_key(directory / "keys", "bench-1")
    files = write_large_cache(
        paths, directory / "cache", key, StoreDir(), compression=arguments.compression
    )
    names = [StoreDir().format(path.store_path) for path in paths]
    nar_bytes = sum(int(files.narinfo(name)["NarSize"]) for name in names)
    took = time.monotonic() - began
    compressed = f"{files.compressed_size(names) / 1e6:.0f} MB with {arguments.compression}"
    say(f"made {len(paths)} NARs of {nar_bytes / 1e6:.0f} MB, {compressed}, in {took:.1f} s")
    report = Report(
        nar_bytes,
        len(paths),
        sum(path.files + 3 for path in paths),
        arguments.mounts,
        arguments.readers,
        arguments.compression,
    )
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(http_cache(files, directory / "nginx"))
        ports.append(cache.port)
        source = Source([cache.url], [key.public])
        options = ["--relay", arguments.relay]
        daemon = stack.enter_context(
            fusesnap_daemon(directory / "s", source=source, options=options)
        )
        channel = stack.enter_context(grpc.insecure_channel(f"unix:{daemon.address}"))
        client = Client(channel, directory / "m")
        stack.callback(client.close)
        run_steps(daemon, client, paths, report, say)
    return report


def room_needed(arguments: argparse.Namespace) -> int:
    """How many bytes of disk this takes: the cache, and what is unpacked."""
    small: int = arguments.paths * arguments.files * 4096
    large: int = arguments.megabytes * 10**6
    return large * 3 // 2 + small + ROOM


def mebibytes(size: int) -> str:
    return f"{size / MIB:.1f}"


def main() -> int:
    """The command line; returns the exit status."""
    arguments = _arguments()

    def say(text: str) -> None:
        print(text, file=sys.stderr if arguments.json else sys.stdout, flush=True)

    free, needed = shutil.disk_usage(arguments.work).free, room_needed(arguments)
    if free < needed:
        say(
            f"{arguments.work}: {needed / 1e9:.1f} GB of room is needed, {free / 1e9:.1f} GB is free"
        )
        return 1
    _interrupt_once()
    ports: list[int] = []
    status = 1
    report: Report | None = None
    # A short path, for unix sockets.
    directory = Path(tempfile.mkdtemp(prefix="fusesnap-bench-", dir=arguments.work))
    try:
        report = bench(arguments, directory, ports, say)
        status = 1 if report.problems() else 0
    except KeyboardInterrupt:
        say("Stopped.")
        status = 128 + signal.SIGINT
    except (CommandFailed, WrongBytes, OSError, grpc.RpcError) as failure:
        say(f"The measurement failed: {failure}\n{_log_of(directory)}")
    finally:
        _ignore_interrupts()
        sweep(directory)
    if report is not None:
        print(json.dumps(report.as_json()) if arguments.json else report.as_text())
    left = leftovers(directory, ports)
    for line in left:
        say(f"Left behind: {line}")
    return 1 if left else status


def _log_of(directory: Path) -> str:
    log = directory / "s.log"
    return log.read_text(errors="replace")[-4000:] if log.exists() else ""


def _interrupt_once() -> None:
    """Make SIGTERM and a closed terminal what Ctrl-C is, and let none of them disturb the cleaning up."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        _ignore_interrupts()
        raise KeyboardInterrupt

    for each in INTERRUPTS:
        signal.signal(each, interrupt)


def _ignore_interrupts() -> None:
    for each in INTERRUPTS:
        signal.signal(each, signal.SIG_IGN)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench memory", description=DESCRIPTION)
    add = parser.add_argument
    add("--megabytes", type=_positive, default=2000, help="size of all NARs, in 10^6 bytes (2000)")
    add("--paths", type=_positive, default=40, help="how many store paths that is (40)")
    add(
        "--files",
        type=_positive,
        default=500,
        help="small files in each, besides a large one (500)",
    )
    add("--mounts", type=_positive, default=1000, help="snapshots mounted at once (1000)")
    add("--readers", type=_positive, default=8, help="readers at once (8)")
    add("--compression", choices=COMPRESSORS, default="zstd", help="of the NARs (zstd)")
    add("--relay", choices=("never", "always"), default="never", help="relay mode (never)")
    add("--work", type=Path, default=Path(tempfile.gettempdir()), help="where there is room for it")
    add("--json", action="store_true", help="print one JSON object, sizes in bytes")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
