"""What a startup trace saves over a link, and what recording one costs a read."""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import trio
from rich.console import Console
from rich.table import Table
from testbed.binary_cache import signing_key
from testbed.fusesnap_daemon import PROGRAM
from testbed.nix_store import NixStore
from testbed.processes import run
from testbed.registry import registry
from testbed.synthetic import simple_closure
from testbed.workplace import default_work, run_directory

from benchmarks import relay
from benchmarks.coldstart import PROFILES, machine, make_ready, scene
from benchmarks.coldstart_goals import Profile
from benchmarks.coldstart_sides import Fusesnap, Scene, Started, start
from benchmarks.coldstart_workloads import WORKLOADS
from fusesnap.daemon import control
from fusesnap.fetch.traces.recorder import Bounds, Recorder
from fusesnap.fetch.traces.recording import Conditions, Recording, Start
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.store_path import StoreDir, StorePath

DESCRIPTION = """\
Starts a real container on machines that have nothing yet, with a trace of an earlier start and without, over an
emulated link, on a stock cache and on a published one, in turns; takes the time from the pull to the first output. Then
reads 4 KiB at random places of a file through the mount, past the page cache, while a start is recorded and while none
is, in turns. Ratios are of medians.
"""
STOCK, PUBLISHED, TRACED = "stock cache", "published cache", ", with the trace"


TURNS = 20
SETTLE = 0.3  # seconds


class Traced(Fusesnap):
    """Ours, with the trace in ``file`` imported before."""

    def __init__(self, name: str, cache: str, file: Path) -> None:
        super().__init__(name, cache)
        self._file = file

    @contextlib.contextmanager
    def machine(self, scene: Scene, directory: Path) -> Iterator[Callable[[], list[str]]]:
        """See Side."""
        with super().machine(scene, directory) as prepare:
            run([PROGRAM, "trace", "import", "--state", directory / "s", self._file])
            yield prepare


def main() -> int:
    """Measure, print; returns the exit status."""
    given = _arguments()
    with run_directory("fs-trace-") as directory, registry(directory) as images:
        key = signing_key(given.work / "keys")
        profile = Profile(given.profile, *PROFILES[given.profile])
        ready = make_ready(WORKLOADS[given.workload], given.work, key, images, directory)
        (trace,) = (ready.caches["traced"].directory / "trace").iterdir()
        starts: dict[str, list[Started]] = {}
        for number in range(given.rounds):
            for pair in pairs(trace):
                for side in pair if number % 2 else reversed(pair):
                    with (
                        run_directory("fs-trace-") as place,
                        scene(ready, profile, key, images, place) as on,
                    ):
                        taken = start(side, on, place / "m")
                    starts.setdefault(side.name, []).append(taken)
                    tell(f"{number + 1}/{given.rounds} {side.name}: {taken.seconds:.2f} s")
        results = summary(starts)
        shown = json.loads(run([PROGRAM, "trace", "show", "--json", trace]))
        results["trace"] = {key: shown[key] for key in ("size", "file_count", "path_count")}
        results["read"] = reads(directory / "reads", given.reads)
        results["call"] = call_cost()
    results["machine"] = {**machine(), "workload": given.workload, "profile": given.profile}
    show(results, as_json=given.json)
    return 0


def pairs(trace: Path) -> list[tuple[Fusesnap, Fusesnap]]:
    """Ways to start without a trace and with one: brought to the node, and found in the cache."""
    return [
        (Fusesnap(STOCK, "stock"), Traced(f"{STOCK}{TRACED}", "stock", trace)),
        (Fusesnap(PUBLISHED, "published"), Fusesnap(f"{PUBLISHED}{TRACED}", "traced")),
    ]


def reads(work: Path, count: int) -> dict[str, float]:
    """Microseconds of a read, of one worker that records and does not in turns."""
    work.mkdir()
    path = simple_closure(NixStore(default_work() / "store")).large
    worker = work / "reads" / "s" / control.SOCKET_NAME
    times: dict[str, list[float]] = {"quiet": [], "recording": []}
    choice = random.Random(1)  # noqa: S311 - the same places in every run
    with relay.served(work, "direct", "reads") as descriptor, mmap.mmap(-1, relay.PAGE) as page:
        pages = os.fstat(descriptor).st_size // relay.PAGE
        for turn in range(1 + TURNS):
            offsets = [choice.randrange(pages) * relay.PAGE for _ in range(count)]
            for kind, taken in times.items():
                trio.run(tell_worker, worker, path, kind)
                measured = [relay.timed_read(descriptor, page, offset) for offset in offsets]
                if turn:  # the first one warms up
                    taken.extend(measured)
    results = {kind: relay.summary(each)["median"] for kind, each in times.items()}
    return {**results, "ratio": results["recording"] / results["quiet"]}


async def tell_worker(worker: Path, path: str, kind: str) -> None:
    """Tell a worker that a container starts which shows ``path``, or that it is gone."""
    if kind == "recording":
        await control.ask(worker, "start", key="bench", upper="/nowhere", there=[], lazy=[path])
    else:
        await control.ask(worker, "end", key="bench")
    await trio.sleep(SETTLE)  # it answers before it has begun


def call_cost(calls: int = 200_000) -> dict[str, float]:
    """Nanoseconds that a read spends in the recorder, in turns, nothing new being read: the shortest of five times."""
    path = StorePath("0" * 32, "path")
    quiet, busy = (Recorder({1: path}.get, time.monotonic, Bounds()) for _ in range(2))
    closure = ClosureDigest.of([path], StoreDir())
    start = Start("bench", None, closure, frozenset({path}), frozenset({path}))
    busy.add(Recording(start, Conditions(0, "0", 0, {}), time.monotonic))
    taken: dict[str, list[float]] = {"quiet": [], "recording": []}
    for _ in range(6):
        for kind, recorder in (("quiet", quiet), ("recording", busy)):
            begin = time.perf_counter()
            for number in range(calls):
                recorder.read(1, 2, number % 1000 * 4096, 4096)
            taken[kind].append((time.perf_counter() - begin) / calls * 1e9)
    return {kind: min(each[1:]) for kind, each in taken.items()}


def summary(starts: dict[str, list[Started]]) -> dict[str, Any]:
    """Medians of each side, and the ratio of those with a trace to those without."""
    results: dict[str, Any] = {
        side: {
            "seconds": [each.seconds for each in taken],
            "median": statistics.median(each.seconds for each in taken),
            "crossed": statistics.median(each.crossed for each in taken),
        }
        for side, taken in starts.items()
    }
    for side in (STOCK, PUBLISHED):
        traced = results[f"{side}{TRACED}"]
        traced["ratio"] = traced["median"] / results[side]["median"]
    return results


def show(results: dict[str, Any], *, as_json: bool) -> None:
    """Print."""
    if as_json:
        print(json.dumps(results))
        return
    say = Console(highlight=False, soft_wrap=True)
    table = Table()
    for column in ("start", "median s", "least", "most", "MB over the link", "with / without"):
        table.add_column(column, justify="left" if column == "start" else "right")
    for side, each in results.items():
        if "seconds" in each:
            figures = [each["median"], min(each["seconds"]), max(each["seconds"])]
            cells = [f"{figure:.2f}" for figure in (*figures, each["crossed"] / 1e6)]
            table.add_row(side, *cells, f"{each['ratio']:.2f}" if "ratio" in each else "")
    say.print(table)
    trace, read = results["trace"], results["read"]
    say.print(
        f"the trace: {trace['size'] / 1e6:.1f} MB in {trace['file_count']} files of {trace['path_count']} paths"
    )
    say.print(
        f"a read of 4 KiB: {read['quiet']:.1f} us, recorded {read['recording']:.1f} us: {read['ratio']:.3f}"
    )
    call = results["call"]
    say.print(
        f"of that in the recorder: {call['quiet']:.0f} ns, recorded {call['recording']:.0f} ns"
    )
    say.print(", ".join(f"{key} {value}" for key, value in results["machine"].items()))


def tell(line: str) -> None:
    """How far it is."""
    print(line, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench traces", description=DESCRIPTION)
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="starts of each side (5)")
    add("--reads", type=int, default=500, help="reads a turn, of 20 turns (500)")
    add("--workload", choices=list(WORKLOADS), default="redis", help="what is started (redis)")
    add("--profile", choices=list(PROFILES), default="20", help="Mbit/s of the link (20)")
    add("--json", action="store_true", help="print JSON, in seconds and bytes")
    add("--work", type=Path, default=default_work(), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
