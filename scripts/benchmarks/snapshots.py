"""What a closure of thousands of store paths, and a thousand snapshots, cost a node."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from testbed.binary_cache import http_cache, signing_key
from testbed.containerd import Containerd, containerd
from testbed.fusesnap_daemon import FusesnapDaemon, Source, fusesnap_daemon, prefetch
from testbed.images import Layer, write_image
from testbed.workplace import run_directory

from benchmarks.large_cache import write_large_cache
from benchmarks.many_paths import SmallPath, chain_id, nix_image, ordinary_image, small_paths
from benchmarks.mounting import Mounter
from benchmarks.resident import MIB, Resident, measure
from fusesnap.nix.store_path import StoreDir
from fusesnap.services.api import snapshots_pb2 as pb
from fusesnap.services.api.snapshots_pb2_grpc import SnapshotsStub

DESCRIPTION = """\
Starts a containerd of its own with the daemon as its second snapshotter, and measures through containerd's own API what
a container start waits for: Prepare, Mounts and mount(2). Three sides in one run: an image of Nix packages in fusesnap,
an image that carries the same files in containerd's overlayfs, and that one in fusesnap; beside them as many bind
mounts as there are store paths, as a snapshotter without redirects needs them. Then many starts at once, and many
snapshots on a node.
Shows milliseconds. Exit status 1 if a warm start of the Nix image takes more than its limit.
"""
LIMIT = 0.050
CALL_SECONDS = 600
FUSESNAP, OVERLAYFS = "fusesnap", "overlayfs"
NAMESPACE = "default"


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds that the steps of one container's start took."""

    prepare: float
    mounts: float
    mount: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.prepare + self.mounts + self.mount


@dataclass
class Report:
    """Figures by name, in the order in which they were measured."""

    starts: dict[str, list[Start]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    resident: list[Resident] = field(default_factory=list)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time what is done in the context."""
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began
        print(f"{name}: {self.seconds[name] * 1e3:.1f} ms", file=sys.stderr, flush=True)

    def add(self, name: str, starts: list[Start]) -> None:
        """Take the starts that were measured under one name."""
        self.starts[name] = starts
        print(_row(name, starts), file=sys.stderr, flush=True)

    def as_json(self) -> dict[str, Any]:
        """Everything, in seconds and bytes."""
        return {
            "starts": {
                name: {
                    "count": len(starts),
                    "first": starts[0].total,
                    "median": statistics.median(each.total for each in starts),
                    "maximum": max(each.total for each in starts),
                    "prepare": statistics.median(each.prepare for each in starts),
                    "mounts": statistics.median(each.mounts for each in starts),
                    "mount": statistics.median(each.mount for each in starts),
                }
                for name, starts in self.starts.items()
            },
            "seconds": self.seconds,
            "resident": {each.role: each.as_json() for each in self.resident},
        }

    def as_text(self) -> str:
        """For a person."""
        lines = [
            f"{'starts, ms':<44}{'number':>7}{'first':>9}{'median':>9}{'most':>9}"
            f"{'Prepare':>10}{'Mounts':>9}{'mount(2)':>10}"
        ]
        lines += [_row(name, starts) for name, starts in self.starts.items()]
        lines.append("\nother, ms")
        lines += [f"{name:<60}{value * 1e3:>10.1f}" for name, value in self.seconds.items()]
        lines.append("\nresident with all snapshots mounted, MiB")
        lines += [f"{each.role:<60}{each.rss / MIB:>10.1f}" for each in self.resident]
        return "\n".join(lines)


def _row(name: str, starts: Sequence[Start]) -> str:
    totals = [each.total * 1e3 for each in starts]
    steps = [
        statistics.median(getattr(each, step) * 1e3 for each in starts)
        for step in ("prepare", "mounts", "mount")
    ]
    return (
        f"{name:<44}{len(starts):>7}{totals[0]:>9.1f}{statistics.median(totals):>9.1f}{max(totals):>9.1f}"
        f"{steps[0]:>10.1f}{steps[1]:>9.1f}{steps[2]:>10.1f}"
    )


class Side:
    """Containers of one image in one snapshotter, started through containerd."""

    def __init__(
        self, channel: grpc.Channel, snapshotter: str, parent: str, directory: Path
    ) -> None:
        self._stub = SnapshotsStub(channel)
        self._snapshotter = snapshotter
        self._parent = parent
        self._directory = directory
        self.name = directory.name
        self._mounter = Mounter()
        self._keys: list[str] = []

    def start(self, key: str) -> Start:
        """What containerd and its shim do before a container's first process."""
        labels = {"containerd.io/gc.root": "2000-01-01T00:00:00Z"}  # else containerd collects it
        named = {"snapshotter": self._snapshotter, "key": key}
        prepare = pb.PrepareSnapshotRequest(parent=self._parent, labels=labels, **named)
        times = [time.perf_counter()]
        self._call(self._stub.Prepare, prepare)
        times.append(time.perf_counter())
        (mount,) = self._call(self._stub.Mounts, pb.MountsRequest(**named)).mounts
        times.append(time.perf_counter())
        self._mounter.mount(mount, self._directory / key)
        times.append(time.perf_counter())
        self._keys.append(key)
        return Start(*(after - before for before, after in itertools.pairwise(times)))

    def starts(self, prefix: str, count: int, *, at_once: int = 1) -> list[Start]:
        """Start ``count`` containers, ``at_once`` at a time."""
        keys = [f"{self.name}-{prefix}-{number}" for number in range(count)]
        with ThreadPoolExecutor(at_once) as threads:
            return list(threads.map(self.start, keys))

    def remove(self, key: str) -> None:
        """End a container."""
        self._mounter.unmount(self._directory / key)
        request = pb.RemoveSnapshotRequest(snapshotter=self._snapshotter, key=key)
        self._call(self._stub.Remove, request)
        self._keys.remove(key)

    def remove_all(self) -> None:
        """End them all."""
        for key in list(self._keys):
            self.remove(key)

    def answers(self) -> bool:
        """Whether the snapshotter can be asked now."""
        request = pb.StatSnapshotRequest(snapshotter=self._snapshotter, key=self._parent)
        try:
            self._call(self._stub.Stat, request)
        except grpc.RpcError:
            return False
        return True

    def close(self) -> None:
        """Unmount what is left."""
        self._mounter.close()

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        metadata = (("containerd-namespace", NAMESPACE),)
        return method(request, timeout=CALL_SECONDS, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured on."""

    directory: Path
    paths: list[SmallPath]
    store_dir: StoreDir
    source: Source
    daemon: FusesnapDaemon
    containerd: Containerd
    channel: grpc.Channel
    report: Report

    def side(
        self, stack: contextlib.ExitStack, snapshotter: str, layers: Sequence[Layer], name: str
    ) -> Side:
        """Import an image, which unpacks it, and give the side of its containers."""
        archive = write_image(
            self.directory / f"{name}.tar", layers, name=f"{name}-{snapshotter}:latest"
        )
        with self.report.timed(f"import and unpack {name} into {snapshotter}"):
            reference = self.containerd.import_archive(
                archive, snapshotter=snapshotter, timeout=CALL_SECONDS
            )
        side = Side(
            self.channel, snapshotter, chain_id(layers), self.directory / f"{name}-{snapshotter}"
        )
        stack.callback(self.containerd.ctr, "images", "rm", "--sync", reference)
        stack.callback(side.close)
        return side


def bind_mounts(bench: Bench, rounds: int) -> list[Start]:
    """As many bind mounts as there are paths, from where they are committed; their mount points are there already."""
    mounter, starts = Mounter(), []
    pairs = []
    real = bench.daemon.state / "layer/.fusesnap-store"
    for path in bench.paths:
        source = real / path.store_path.base_name
        target = bench.directory / "binds" / path.store_path.base_name
        target.parent.mkdir(exist_ok=True)
        target.mkdir() if source.is_dir() else target.touch()
        pairs.append((source, target))
    for _ in range(rounds):
        began = time.perf_counter()
        for source, target in pairs:
            mounter.bind_read_only(source, target)
        starts.append(Start(0, 0, time.perf_counter() - began))
        mounter.close()
    shutil.rmtree(bench.directory / "binds")
    return starts


def cold(bench: Bench, given: argparse.Namespace) -> None:
    """Nothing of the closure is there: every directory is shown by the lazy layer."""
    with contextlib.ExitStack() as stack:
        side = bench.side(
            stack, FUSESNAP, nix_image(bench.paths, bench.store_dir), "cold-nix-image"
        )
        bench.report.add(f"{len(bench.paths)} paths, cold", side.starts("cold", given.rounds))
        side.remove_all()


def warm(bench: Bench, given: argparse.Namespace) -> None:
    """Everything is there."""
    report, count = bench.report, len(bench.paths)
    with report.timed("fetch the closure"):
        names = [bench.store_dir.format(path.store_path) for path in bench.paths]
        prefetch(bench.daemon.state, names, source=bench.source, timeout=CALL_SECONDS)
    with contextlib.ExitStack() as stack:
        sides = {
            f"{count} paths, warm": bench.side(
                stack, FUSESNAP, nix_image(bench.paths, bench.store_dir), "nix-image"
            ),
            "the same files in overlayfs": bench.side(
                stack, OVERLAYFS, ordinary_image(bench.paths, bench.store_dir), "ordinary-image"
            ),
            "the same files in fusesnap": bench.side(
                stack, FUSESNAP, ordinary_image(bench.paths, bench.store_dir), "ordinary-image"
            ),
        }
        # The daemon has its own list of what the cold containers would have wanted.
        bench.daemon.service.wait_until(
            lambda: not bench.daemon.status()["fetching"], timeout=CALL_SECONDS
        )
        os.sync()  # what was unpacked is still to be written, and a Prepare waits for its own few bytes
        alone: dict[str, list[Start]] = {name: [] for name in sides}
        for number in range(given.rounds):  # in turns: what else the machine does meets all
            for name, side in sides.items():
                alone[name].append(side.start(f"{side.name}-one-{number}"))
        for name in sides:
            report.add(name, alone[name])
        report.add(f"{count} bind mounts", bind_mounts(bench, min(5, given.rounds)))
        for name, side in sides.items():
            with report.timed(f"{name}: {given.at_once} at once"):
                starts = side.starts("many", given.at_once, at_once=given.at_once)
            report.add(f"{name}, {given.at_once} at once", starts)
            side.remove_all()
        for name, side in sides.items():
            on_a_node(bench, given, name, side)


def on_a_node(bench: Bench, given: argparse.Namespace, name: str, side: Side) -> None:
    """A node full of containers: what one more costs, and what it costs to end them."""
    report, count = bench.report, given.snapshots
    report.add(f"{name}, {count} snapshots", side.starts("node", count))
    report.add(f"{name}, beside {count}", side.starts("last", given.rounds))
    if name == f"{len(bench.paths)} paths, warm":
        with report.timed(f"fusesnap status, {count} snapshots"):
            status = bench.daemon.status()
        report.resident = measure(bench.daemon.service.pid, status["worker"]["pid"])
        services = next(each.pid for each in report.resident if each.role == "services")
        with report.timed(f"services killed until they answer, {count} snapshots"):
            os.kill(services, signal.SIGKILL)
            bench.daemon.service.wait_until(side.answers)
        report.add(f"{name}, after a restart", side.starts("again", given.rounds))
    with report.timed(f"{name}: remove {count} snapshots"):
        side.remove_all()


def measure_all(given: argparse.Namespace, directory: Path) -> Report:
    """The whole measurement."""
    store_dir, paths, report = StoreDir(), small_paths(given.paths), Report()
    key = signing_key(directory / "keys", "bench-1")
    files = write_large_cache(paths, directory / "cache", key, store_dir, compression="zstd")
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(http_cache(files, directory / "nginx"))
        source = Source([cache.url], [key.public])
        daemon = stack.enter_context(fusesnap_daemon(directory / "s", source=source))
        client = stack.enter_context(containerd(directory / "c", proxy=daemon.address))
        channel = stack.enter_context(grpc.insecure_channel(f"unix:{client.address}"))
        bench = Bench(directory, paths, store_dir, source, daemon, client, channel, report)
        cold(bench, given)
        warm(bench, given)
    return report


def main() -> int:
    """Measure, print; returns the exit status."""
    given = _arguments()
    Mounter().leave_host()
    with run_directory("fs-scale-") as directory:
        report = measure_all(given, directory)
    print(json.dumps(report.as_json()) if given.json else report.as_text())
    warm_starts = report.starts[f"{given.paths} paths, warm"]
    median = statistics.median(each.total for each in warm_starts)
    if median > LIMIT:
        print(f"a warm start takes {median * 1e3:.1f} ms, its limit is {LIMIT * 1e3:.0f} ms")
        return 1
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench snapshots", description=DESCRIPTION)
    add = parser.add_argument
    add("--paths", type=int, default=2500, help="store paths in the closure (2500)")
    add("--rounds", type=int, default=20, help="starts of each kind (20)")
    add("--at-once", type=int, default=100, help="starts at once (100)")
    add("--snapshots", type=int, default=1000, help="snapshots on a node (1000)")
    add(
        "--json",
        action="store_true",
        help="one JSON object instead of tables, in seconds and bytes",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
