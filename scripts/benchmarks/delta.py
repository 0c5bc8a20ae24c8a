"""What an update costs whose paths have new hash parts and hardly anything else: beside a machine that has nothing."""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from testbed.binary_cache import CacheFiles, HttpCache, http_cache, publish_cache, signing_key
from testbed.containerd import containerd
from testbed.fusesnap_daemon import Source, fusesnap_daemon, prefetch
from testbed.link_process import RunningLink, slow_link
from testbed.nix_store import NixStore
from testbed.processes import CommandFailed, run_until_output
from testbed.registry import Registry, registry
from testbed.workplace import default_work, run_directory

from benchmarks.coldstart import machine
from benchmarks.coldstart_sides import START_SECONDS, Started, drop_caches
from benchmarks.coldstart_workloads import WORKLOADS, Built, Workload

DESCRIPTION = """\
Two generations of a real closure: in the second one a byte of the C library has changed, so it and everything above it
has another hash part, as after a rebuild of nixpkgs. Both are published by fusesnap. Measured of the second generation,
over an emulated link: `fusesnap prefetch` of the whole closure, and the start of a container from its pull to its first
output with nothing fetched that no program asked for; each with nothing here, and with the first generation fetched, or
started, before. In turns. Shows medians of seconds and of all bytes over the link (narinfos, indexes and headers
included), and what part of them is left. The image itself comes from beside the link.
"""
# A package that everything in the closures needs.
REBUILT = "libc6"
NOTHING, FIRST = "nothing here", "first generation here"


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation, in a published cache and as an image of this reference."""

    built: Built
    files: CacheFiles
    reference: str


@dataclass(frozen=True, slots=True)
class Scene:
    """What all turns share: the first generation is beside the link, the second one behind it."""

    first: Generation
    second: Generation
    near: HttpCache
    link: RunningLink
    key: str

    @property
    def source(self) -> Source:
        """Both caches."""
        return Source([self.near.url, self.link.url("cache")], [self.key])


Turn = Callable[[Scene, Path, bool], Started]


def fetch_closure(scene: Scene, directory: Path, has_first: bool) -> Started:
    """Prefetch all of the second generation."""
    if has_first:
        prefetch(directory, [scene.first.built.closure.root], source=scene.source)
    drop_caches()
    crossed, began = scene.link.down(), time.monotonic()
    prefetch(
        directory, [scene.second.built.closure.root], source=scene.source, timeout=START_SECONDS
    )
    return Started(time.monotonic() - began, scene.link.down() - crossed)


def start(scene: Scene, directory: Path, has_first: bool) -> Started:
    """Start a container of the second generation."""
    with (
        fusesnap_daemon(directory / "s", source=scene.source) as daemon,
        containerd(directory / "c", proxy=daemon.address) as client,
    ):
        if has_first:
            client.pull(scene.first.reference)
            client.run(scene.first.reference, "first", timeout=START_SECONDS)
        drop_caches()
        crossed, began = scene.link.down(), time.monotonic()
        ends: list[Started] = []

        def stop() -> None:
            ends.append(Started(time.monotonic() - began, scene.link.down() - crossed))

        client.pull(scene.second.reference, timeout=START_SECONDS)
        command = client.run_command(scene.second.reference, "second")
        output = run_until_output(command, stop, timeout=START_SECONDS)
    workload = scene.second.built.workload
    if workload.output not in output.split():
        raise CommandFailed(f"{workload.name} said {output!r}, not {workload.output!r}")
    return ends[0]


TURNS: dict[str, Turn] = {"whole closure": fetch_closure, "container start": start}


@dataclass
class Row:
    """One kind of turn; what was measured by what was there before."""

    workload: str
    kind: str
    taken: dict[str, list[Started]] = field(default_factory=lambda: {NOTHING: [], FIRST: []})

    def seconds(self, side: str) -> float:
        """Median."""
        return statistics.median(each.seconds for each in self.taken[side])

    def crossed(self, side: str) -> float:
        """Median, in bytes."""
        return statistics.median(each.crossed for each in self.taken[side])

    @property
    def ratio(self) -> float:
        """The part of the bytes that is left."""
        return self.crossed(FIRST) / self.crossed(NOTHING)

    def as_json(self) -> dict[str, Any]:
        """All turns."""
        sides = {
            side: {
                "seconds": [each.seconds for each in taken],
                "crossed": [each.crossed for each in taken],
            }
            for side, taken in self.taken.items()
        }
        return {"workload": self.workload, "kind": self.kind, "ratio": self.ratio, **sides}


def measure(scene: Scene, kinds: list[str], rounds: int) -> Iterator[Row]:
    """Each kind, both sides in turns."""
    for kind in kinds:
        row = Row(scene.second.built.workload.name, kind)
        for number in range(rounds):
            for side in (NOTHING, FIRST) if number % 2 else (FIRST, NOTHING):
                with run_directory("fs-delta-") as directory:
                    taken = TURNS[kind](scene, directory, side == FIRST)
                row.taken[side].append(taken)
                print(
                    f"{number + 1}/{rounds} {row.workload} {kind}, {side}: {taken.seconds:.2f} s,"
                    f" {taken.crossed / 1e6:.3f} MB",
                    file=sys.stderr,
                    flush=True,
                )
        yield row


@contextlib.contextmanager
def scene(workload: Workload, given: argparse.Namespace, images: Registry) -> Iterator[Scene]:
    """Build and publish what is not there yet, and serve it."""
    store, key = NixStore(default_work() / "store"), signing_key(default_work() / "keys")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(run_directory("fs-delta-"))
        generations = []
        for number, rebuilt in enumerate(("", REBUILT), 1):
            built = Built.make(workload, store, rebuilt=rebuilt)
            name = f"delta-{workload.name}-{number}"
            files = publish_cache(store, [built.closure.root], default_work() / name, key)
            archive = built.nix_image(directory / f"{name}.tar")
            images.push(archive, f"{name}:latest")
            generations.append(Generation(built, files, images.reference(f"{name}:latest")))
        first, second = generations
        near = stack.enter_context(http_cache(first.files, directory / "near"))
        far = stack.enter_context(http_cache(second.files, directory / "far"))
        rate, trip = given.rate * 1e6, given.round_trip / 1e3
        ports = {"cache": far.port}
        link = stack.enter_context(slow_link(ports, directory, rate=rate, round_trip=trip))
        yield Scene(first, second, near, link, key.public)


def table(rows: list[Row], given: argparse.Namespace) -> Table:
    """For a person."""
    title = f"second generation, {given.rate:g} Mbit/s, {given.round_trip:g} ms; medians of {given.rounds}"
    shown = Table(title=title, title_justify="left")
    for column in ("", NOTHING, "", FIRST, "", "of the bytes"):
        shown.add_column(column, justify="right" if column != "" or shown.columns else "left")
    for row in rows:
        cells = [f"{row.workload}, {row.kind}"]
        for side in row.taken:
            cells += [f"{row.seconds(side):.2f} s", f"{row.crossed(side) / 1e6:.3f} MB"]
        shown.add_row(*cells, f"{100 * row.ratio:.1f} %")
    return shown


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="scripts/bench delta", description=DESCRIPTION)
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="turns of each side (5)")
    add("--workload", action="append", choices=list(WORKLOADS), help="default redis")
    add("--kind", action="append", choices=list(TURNS), help="default both")
    add("--rate", type=float, default=20, help="of the link, Mbit/s (20)")
    add("--round-trip", type=float, default=80, help="of the link, ms (80)")
    add("--json", action="store_true", help="one JSON object instead of a table")
    given = parser.parse_args()
    rows: list[Row] = []
    with run_directory("fs-delta-") as directory, registry(directory) as images:
        for name in given.workload or ["redis"]:
            with scene(WORKLOADS[name], given, images) as on:
                rows += measure(on, given.kind or list(TURNS), given.rounds)
    if given.json:
        print(json.dumps({"machine": machine(), "results": [row.as_json() for row in rows]}))
        return
    say = Console(highlight=False, soft_wrap=True)
    say.print(table(rows, given))
    say.print(", ".join(f"{key} {value}" for key, value in machine().items()))


if __name__ == "__main__":
    main()
