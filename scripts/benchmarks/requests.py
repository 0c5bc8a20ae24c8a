"""What nodes ask of a binary cache: the objects of a closure, and the requests of one start of each kind."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from testbed.binary_cache import CacheFiles, Request, signing_key
from testbed.fusesnap_daemon import prefetch
from testbed.registry import registry
from testbed.workplace import default_work, run_directory

from benchmarks.coldstart import PROFILES, Ready, machine, make_ready, scene, sides
from benchmarks.coldstart_goals import Profile
from benchmarks.coldstart_sides import START_SECONDS, Fusesnap, Scene, start
from benchmarks.coldstart_workloads import WORKLOADS

DESCRIPTION = """\
Starts a real container once for each kind of cache, on a machine that has nothing, over an emulated link, and counts
from nginx's log what it asked the cache until its first output; then `fusesnap prefetch` of the whole closure. Counts,
too, what objects the cache has. With --nodes it says what so many starts ask of a cache, and of what is behind it.
"""
OTHER = "others"
WIDTH = 150  # of the widest table
KINDS = {  # in this order, by what a name begins or ends with
    "nix-cache-info": ("nix-cache-info", ""),
    "narinfo": ("", ".narinfo"),
    "NAR index": ("nar/", ".narindex"),
    "NAR": ("nar/", ""),
    "listing": ("", ".ls"),
    "trace": ("trace/", ""),
    "bundle": ("bundle/", ""),
}


@dataclass(frozen=True, slots=True)
class Objects:
    """The files of one kind in a cache; bytes."""

    kind: str
    count: int
    size: int
    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Asked:
    """The requests of one kind of one start; ``absent``: those answered with 404."""

    kind: str
    requests: int
    absent: int


@dataclass(frozen=True, slots=True)
class Start:
    """What one start asked.

    ``names``: how many objects it asked for. ``named``: the bytes of these objects, whole. ``crossed``: bytes that came
    over the link, with headers.
    """

    name: str
    asked: list[Asked]
    names: int
    crossed: int
    named: int

    @property
    def requests(self) -> int:
        return sum(each.requests for each in self.asked)


def kind_of(name: str) -> str:
    """What sort of object a name of a cache is."""
    for kind, (begin, end) in KINDS.items():
        if name.startswith(begin) and name.endswith(end):
            return kind
    return OTHER


def objects(cache: CacheFiles) -> list[Objects]:
    """What a cache has."""
    sizes: dict[str, list[int]] = {}
    for file in sorted(cache.directory.rglob("*")):
        if file.is_file():
            name = str(file.relative_to(cache.directory))
            sizes.setdefault(kind_of(name), []).append(file.stat().st_size)
    return [
        Objects(kind, len(each), sum(each), min(each), max(each))
        for kind in (*KINDS, OTHER)
        if (each := sizes.get(kind))
    ]


def asked(requests: Iterable[Request]) -> list[Asked]:
    """Requests by kind; of the NARs those for a part apart from those for the whole."""
    sorts: dict[str, list[Request]] = {}
    for request in requests:
        kind = kind_of(request.path.lstrip("/"))
        sorts.setdefault(f"{kind}, a range" if request.range else kind, []).append(request)
    return [
        Asked(
            kind,
            len(each),
            sum(request.status == 404 for request in each),
        )
        for kind, each in sorted(sorts.items())
    ]


class Log:
    """What one cache is asked, and what of it crosses the link, from now on."""

    def __init__(self, scene: Scene, cache: str) -> None:
        self._cache, self._link, self._name = scene.caches[cache], scene.link, cache
        self._cache.clear_requests()
        self._before = self._link.traffic()[cache].down

    def so_far(self, name: str) -> Start:
        """The start called ``name``, as far as it has come."""
        crossed = self._link.traffic()[self._name].down - self._before
        requests = self._cache.requests()
        there = {request.path.lstrip("/") for request in requests if request.status < 400}
        named = sum((self._cache.files.directory / each).stat().st_size for each in there)
        names = len({request.path for request in requests})
        return Start(name, asked(requests), names, crossed, named)


class Counting(Fusesnap):
    """A start whose requests are counted when its first output is there."""

    def __init__(self, side: Fusesnap, log: Log) -> None:
        super().__init__(side.name, side.cache)
        self._log = log
        self.counted: list[Start] = []

    def first_output(self) -> None:
        """See Side."""
        self.counted.append(self._log.so_far(self.name))


def all_starts(ready: Ready, scene: Scene, directory: Path) -> Iterator[Start]:
    """One start of each kind, then the whole closure from each cache."""
    for side in (side for side in sides() if isinstance(side, Fusesnap)):
        counting = Counting(side, Log(scene, side.cache))
        start(counting, scene, directory / f"m-{side.cache}")
        yield from counting.counted
    for name in ("stock", "published"):
        log = Log(scene, name)
        roots = [ready.built.closure.root]
        prefetch(directory / f"w-{name}", roots, source=scene.source(name), timeout=START_SECONDS)
        yield log.so_far(f"the whole closure, {name} cache")


def objects_table(name: str, kinds: Sequence[Objects]) -> Table:
    """For a person."""
    table = Table(title=name, title_justify="left")
    for column in ("object", "count", "bytes", "smallest", "largest"):
        table.add_column(column, justify="left" if column == "object" else "right")
    for each in kinds:
        table.add_row(
            each.kind, *(f"{n:,}" for n in (each.count, each.size, each.least, each.most))
        )
    return table


def starts_table(found: Sequence[Start]) -> Table:
    """For a person: the requests of each start, by kind."""
    kinds = list(dict.fromkeys(each.kind for taken in found for each in taken.asked))
    table = Table(title="requests of one start, until its first output", title_justify="left")
    table.add_column("start")
    for column in (*kinds, "all", "objects", "404", "MB over the link"):
        table.add_column(column, justify="right")
    for taken in found:
        counts = {each.kind: each.requests for each in taken.asked}
        absent = sum(each.absent for each in taken.asked)
        figures = (*(counts.get(kind, 0) for kind in kinds), taken.requests, taken.names, absent)
        table.add_row(taken.name, *(f"{n:,}" for n in figures), f"{taken.crossed / 1e6:.2f}")
    return table


def nodes_table(found: Sequence[Start], nodes: int) -> Table:
    """For a person: so many starts, and what is left for the origin behind one cache that keeps what it is sent."""
    table = Table(title=f"{nodes:,} nodes", title_justify="left")
    for column in ("start", "requests", "GB", "origin: names", "origin: MB"):
        table.add_column(column, justify="left" if column == "start" else "right")
    for each in found:
        crossed = f"{each.crossed * nodes / 1e9:,.1f}"
        origin = (f"{each.names:,}", f"{each.named / 1e6:,.2f}")
        table.add_row(each.name, f"{each.requests * nodes:,}", crossed, *origin)
    return table


def main() -> int:
    """Measure, print; returns the exit status."""
    given = _arguments()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(run_directory("fs-asked-"))
        images = stack.enter_context(registry(directory))
        key = signing_key(given.work / "keys")
        ready = make_ready(WORKLOADS[given.workload], given.work, key, images, directory)
        profile = Profile(given.profile, *PROFILES[given.profile])
        have = {name: objects(cache) for name, cache in ready.caches.items()}
        on = stack.enter_context(scene(ready, profile, key, images, directory))
        found = []
        for each in all_starts(ready, on, directory):
            found.append(each)
            print(f"{each.name}: {each.requests} requests", file=sys.stderr, flush=True)
    where = {**machine(), "workload": given.workload, "profile": given.profile}
    if given.json:
        print(json.dumps(as_json(have, found, where)))
        return 0
    say = Console(highlight=False, soft_wrap=True)
    say.width = max(say.width, WIDTH)
    say.print(f"{len(ready.built.closure.paths)} store paths")
    for name, kinds in have.items():
        say.print(objects_table(name, kinds))
    say.print(starts_table(found))
    say.print(nodes_table(found, given.nodes))
    say.print(", ".join(f"{key} {value}" for key, value in where.items()))
    return 0


def as_json(
    have: dict[str, list[Objects]], found: Sequence[Start], where: dict[str, str]
) -> dict[str, Any]:
    """Everything."""
    return {
        "machine": where,
        "objects": {name: [asdict(each) for each in kinds] for name, kinds in have.items()},
        "starts": [{**asdict(each), "requests": each.requests} for each in found],
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench requests", description=DESCRIPTION)
    add = parser.add_argument
    add("--workload", choices=list(WORKLOADS), default="redis", help="what is started (redis)")
    add("--profile", choices=list(PROFILES), default="20", help="Mbit/s of the link (20)")
    add("--nodes", type=int, default=10_000, help="how many start (10000)")
    add("--json", action="store_true", help="print JSON")
    add("--work", type=Path, default=default_work(), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
