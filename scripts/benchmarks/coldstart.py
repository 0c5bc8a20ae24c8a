"""Cold starts over a link: fusesnap beside what realises or pulls everything first, and beside the least possible."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from testbed.binary_cache import (
    CacheFiles,
    SigningKey,
    http_cache,
    publish_cache,
    signing_key,
    write_cache,
)
from testbed.containerd_configuration import Release
from testbed.fusesnap_daemon import PROGRAM, Source
from testbed.link_process import slow_link
from testbed.nix_store import NixStore, image_path
from testbed.processes import run
from testbed.registry import Registry, registry
from testbed.workplace import default_work, run_directory

from benchmarks.charts import Group, bar_chart, sides_of
from benchmarks.coldstart_goals import (
    BUNDLED,
    PUBLISHED,
    STOCK,
    TRACED,
    Bars,
    Goal,
    Profile,
    goals,
)
from benchmarks.coldstart_peers import NixSnapshotter
from benchmarks.coldstart_sides import (
    START_SECONDS,
    Before,
    Eager,
    Fusesnap,
    Named,
    Ordinary,
    Scene,
    Side,
    Started,
    Updated,
    Warm,
    WarmNamed,
    start,
)
from benchmarks.coldstart_workloads import WORKLOADS, Built, Workload
from benchmarks.touched_pages import PAGE, Footprint, touched

DESCRIPTION = """\
Starts real containers through containerd and runc on machines that have nothing yet, over an emulated link, and takes
the time from the pull, as a kubelet has it done, to the first output. All sides take turns, each with fresh state and
cold caches of the kernel.
The limit is what no way of fetching can save: two round trips, the pages that the start touches as one zstd stream of
the highest level over the link, and the same start with everything local and warm.

What is asked of our starts is said to be met or not, as far as the sides that ran can say it: a stock cache takes at
most 0.9 of what realising the closure takes, and half where half of its bytes are of store paths that the start reads
nothing of; a published cache at most 1.5 of what an optimised eStargz would (two round trips, the files that the start
reads as zstd -9, the warm start); with a trace or a bundle 1.3 of that limit, and an image
that its store path alone names, with a bundle, 1.3 of the limit with such a pull. Over 1000 Mbit/s and 1 ms it is
instead that each takes no more than the quickest OCI pull.

One round of the shell with all sides takes 50 s over 1000 Mbit/s, 55 s over 100, 80 s over 20 and 170 s over 5, with
what is built for it on two processors (the closure is kept); larger closures take longer.
Choose with --workload, --profile, --side and --rounds. With --nix-snapshotter, a program as `go install
github.com/pdtpartners/nix-snapshotter@v0.4.0` makes it, that is a side too.
"""
ROUNDING = 16 * 1024  # bytes; as startup traces round extents
PROFILES = {"5": (5e6, 0.2), "20": (20e6, 0.08), "100": (100e6, 0.02), "1000": (1e9, 0.001)}
KINDS = ("nix", "gzip", "zstd")
# A package that everything in the closures needs, so that all its paths have other names.
REBUILT = "libc6"
BEFORE = "before"


@dataclass
class Result:
    """What was measured of one workload over one link; figures by side, in the order of the rounds."""

    workload: str
    profile: Profile
    footprint: Footprint
    untouched: float  # see Bars
    starts: dict[str, list[Started]] = field(default_factory=dict)

    def median(self, side: str) -> float:
        """Seconds."""
        return statistics.median(each.seconds for each in self.starts[side])

    def limits(self, warm: str = Warm.name) -> dict[int, float]:
        """Seconds, by the rounding of extents; ``warm`` is the side whose start no fetching saves."""
        least = self.median(warm)
        return {
            each.rounding: self.profile.seconds(each.compressed) + least
            for each in self.footprint.pages
        }

    def bars(self) -> Bars:
        """What the starts are held against."""
        stargz = self.profile.seconds(self.footprint.files) + self.median(Warm.name)
        named = self.limits(WarmNamed.name)[ROUNDING] if WarmNamed.name in self.starts else None
        return Bars(self.limits()[ROUNDING], named, stargz, self.untouched)

    def goals(self) -> list[Goal]:
        """What was asked of our starts, as far as the sides of this run can say it."""
        medians = {side: self.median(side) for side in self.starts}
        return goals(medians, self.bars(), self.profile)

    def as_group(self) -> Group:
        """For a chart; the part that is no fetching is in the limit."""
        starts = {
            side: [each.seconds for each in starts]
            for side, starts in self.starts.items()
            if side not in (Warm.name, WarmNamed.name)
        }
        medians = {side: self.median(side) for side in starts}
        return Group(self.workload, sides_of(starts, medians, "fusesnap"), self.limits()[ROUNDING])

    def as_json(self) -> dict[str, Any]:
        """Everything, in seconds and bytes."""
        return {
            "workload": self.workload,
            "rate": self.profile.rate,
            "round_trip": self.profile.round_trip,
            "touched": {
                each.rounding: [each.plain, each.compressed] for each in self.footprint.pages
            },
            "limit": self.limits(),
            "bars": asdict(self.bars()),
            "goals": [
                {"name": each.name, "ratio": each.ratio, "most": each.most, "met": each.met}
                for each in self.goals()
            ],
            "starts": {
                side: {
                    "seconds": [each.seconds for each in starts],
                    "median": self.median(side),
                    "crossed": statistics.median(each.crossed for each in starts),
                }
                for side, starts in self.starts.items()
            },
        }

    def as_table(self) -> Table:
        """For a person."""
        rate, trip = self.profile.rate / 1e6, self.profile.round_trip * 1e3
        table = Table(title=f"{self.workload}, {rate:g} Mbit/s, {trip:g} ms", title_justify="left")
        for column in ("start", "median s", "least", "most", "MB over the link", "x limit"):
            table.add_column(column, justify="left" if column == "start" else "right")
        limit = self.limits()[ROUNDING]
        for side, starts in self.starts.items():
            seconds = [each.seconds for each in starts]
            crossed = statistics.median(each.crossed for each in starts) / 1e6
            figures = [self.median(side), min(seconds), max(seconds)]
            cells = [f"{each:.2f}" for each in (*figures, crossed, figures[0] / limit)]
            table.add_row(side, *cells)
        for each in self.footprint.pages:
            table.add_row(
                f"limit, extents rounded to {each.rounding // 1024} KiB",
                f"{self.limits()[each.rounding]:.2f}",
                *("", ""),
                f"{each.compressed / 1e6:.2f}",
                f"{self.limits()[each.rounding] / limit:.2f}",
            )
        stargz, size = self.bars().stargz, self.footprint.files / 1e6
        cells = [f"{stargz:.2f}", "", "", f"{size:.2f}", f"{stargz / limit:.2f}"]
        table.add_row("optimised eStargz, estimated", *cells)
        return table


def sides(nix_snapshotter: Path | None = None) -> list[Side]:
    """All ways to start; that of a program by its path, where it is given."""
    peers = [] if nix_snapshotter is None else [NixSnapshotter(nix_snapshotter)]
    return [
        Warm(),
        Fusesnap(STOCK, "stock"),
        Fusesnap(PUBLISHED, "published"),
        Fusesnap(TRACED, "traced"),
        Fusesnap(BUNDLED, "bundled"),
        Updated(),
        WarmNamed(),
        Named(),
        Eager(),
        Eager(copying=True),
        Ordinary("gzip"),
        Ordinary("zstd"),
        *peers,
    ]


@dataclass(frozen=True, slots=True)
class Ready:
    """A workload whose images are in the registry, and whose closure and image are in caches, by name."""

    built: Built
    caches: dict[str, CacheFiles]
    images: dict[str, str]
    path: str  # the image with Nix layers
    before: CacheFiles | None = None  # of the generation before, whose image is there too


def make_ready(
    workload: Workload, work: Path, key: SigningKey, images: Registry, directory: Path
) -> Ready:
    """Build what is not there yet."""
    built = Built.make(workload, NixStore(work / "store"))
    name = f"cold-{workload.name}"
    archives = {kind: directory / f"{name}-{kind}.tar" for kind in KINDS}
    built.nix_image(archives["nix"])
    for kind in KINDS[1:]:
        built.ordinary_image(archives[kind], kind)
    path = image_path(built.store, archives["nix"], built.closure.root)
    roots = [built.closure.root, path]
    caches = {
        "stock": write_cache(built.store, roots, work / f"cache-{name}", key=key),
        "published": publish_cache(built.store, roots, work / f"published-{name}", key),
    }
    caches["traced"] = add_trace(built, caches["published"], archives["nix"], key, directory)
    caches["bundled"] = add_bundle(built, roots, caches["traced"], key, directory)
    names = {kind: f"{archive.stem}:latest" for kind, archive in archives.items()}
    for kind, archive in archives.items():
        images.push(archive, names[kind])
        archive.unlink()
    return Ready(built, caches, names, path)


def with_before(
    ready: Ready, work: Path, key: SigningKey, images: Registry, directory: Path
) -> Ready:
    """The same with the generation before, in which one package below everything was another build."""
    built = Built.make(ready.built.workload, ready.built.store, rebuilt=REBUILT)
    name = f"cold-{built.workload.name}-{BEFORE}"
    files = publish_cache(built.store, [built.closure.root], work / f"published-{name}", key)
    archive = built.nix_image(directory / f"{name}.tar")
    images.push(archive, f"{name}:latest")
    archive.unlink()
    return replace(ready, images={**ready.images, BEFORE: f"{name}:latest"}, before=files)


def add_trace(
    built: Built, published: CacheFiles, image: Path, key: SigningKey, directory: Path
) -> CacheFiles:
    """The same cache with the trace of a start."""
    traced = directory / f"traced-{built.workload.name}"
    run(["cp", "--archive", "--link", published.directory, traced])
    state: list[str | Path] = ["--state", directory / f"recorded-{built.workload.name}"]
    source = Source([f"file://{published.directory}"], [key.public])
    variables = [f"{name}={value}" for name, value in built.environment.items()]
    options = [word for variable in variables for word in ("--env", variable)]
    recorded = directory / "recorded.trace"
    command = [PROGRAM, "trace", "record", *state, *source.options, *options, "-o", recorded]
    command += [f"oci-archive:{image}", "--", *built.workload.command]
    run(command, timeout=START_SECONDS)
    export: list[str | Path] = ["--secret-key-file", key.secret_file, "--cache", traced]
    run([PROGRAM, "trace", "export", *state, *export, built.closure.root])
    return CacheFiles(traced)


def add_bundle(
    built: Built, roots: Sequence[str], traced: CacheFiles, key: SigningKey, directory: Path
) -> CacheFiles:
    """The same cache with the startup bundles that are made of its trace."""
    bundled = directory / f"bundled-{built.workload.name}"
    run(["cp", "--archive", "--link", traced.directory, bundled])
    target: list[str | Path] = ["--from", built.store.directory, "--to", bundled]
    options: list[str | Path] = [*target, "--secret-key-file", key.secret_file, "--closure"]
    run([PROGRAM, "publish", *options, *roots], timeout=START_SECONDS)
    return CacheFiles(bundled)


@contextlib.contextmanager
def scene(
    ready: Ready, profile: Profile, key: SigningKey, images: Registry, directory: Path
) -> Iterator[Scene]:
    """Everything behind one link."""
    with contextlib.ExitStack() as stack:
        caches = {
            name: stack.enter_context(http_cache(files, directory / f"nginx-{name}"))
            for name, files in ready.caches.items()
        }
        ports = {name: cache.port for name, cache in caches.items()}
        link = stack.enter_context(
            slow_link(
                {**ports, "registry": images.port},
                directory,
                rate=profile.rate,
                round_trip=profile.round_trip,
            )
        )
        port = link.port("registry")
        references = {
            kind: images.reference(name, port=port) for kind, name in ready.images.items()
        }
        before = None
        if ready.before is not None:
            near = stack.enter_context(http_cache(ready.before, directory / f"nginx-{BEFORE}"))
            reference = images.reference(ready.images[BEFORE])
            before = Before(Source([near.url], [key.public]), reference)
        local = Source([caches["stock"].url], [key.public])
        local_reference = images.reference(ready.images["nix"])
        yield Scene(
            ready.built, link, key, references, ready.path, local, local_reference, caches, before
        )


def measure(
    ready: Ready,
    profile: Profile,
    key: SigningKey,
    images: Registry,
    directory: Path,
    chosen: Sequence[Side],
    rounds: int,
) -> Result:
    """All sides, in turns."""
    footprint = touched(ready.built, directory, (PAGE, ROUNDING))
    result = Result(ready.built.workload.name, profile, footprint, untouched(ready, footprint))
    for number in range(rounds):
        for side in chosen:
            with (
                run_directory("fs-cold-") as place,
                scene(ready, profile, key, images, place) as on,
            ):
                taken = start(side, on, place / "m")
            result.starts.setdefault(side.name, []).append(taken)
            print(
                f"{number + 1}/{rounds} {result.workload} {profile.name} {side.name}: "
                f"{taken.seconds:.2f} s, {taken.crossed / 1e6:.2f} MB",
                file=sys.stderr,
                flush=True,
            )
    return result


def untouched(ready: Ready, footprint: Footprint) -> float:
    """See Bars."""
    stock, paths = ready.caches["stock"], ready.built.closure.paths
    return 1 - stock.compressed_size(footprint.paths) / stock.compressed_size(paths)


def machine() -> dict[str, str]:
    """What it was measured on."""
    return {
        "kernel": platform.release(),
        "processors": str(os.cpu_count()),
        "python": platform.python_version(),
        "containerd": Release.of().text,
    }


def write_charts(results: Sequence[Result], directory: Path) -> None:
    """A chart for each link."""
    directory.mkdir(parents=True, exist_ok=True)
    rounds = min(len(starts) for result in results for starts in result.starts.values())
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    for profile in dict.fromkeys(result.profile for result in results):
        groups = [result.as_group() for result in results if result.profile == profile]
        title = (
            f"From nothing to the first output, {profile.rate / 1e6:g} Mbit/s,"
            f" {profile.round_trip * 1e3:g} ms round trip"
        )
        footer = [f"Medians of {rounds}, line: least and most; dashed: the least possible. {where}"]
        footer += [
            f"{result.workload}: {goal}"
            for result in results
            if result.profile == profile
            for goal in result.goals()
        ]
        chart = bar_chart(title, groups, "\n".join(footer))
        (directory / f"coldstart-{profile.name}.svg").write_text(chart)


def main() -> int:
    """Measure, print; returns the exit status."""
    given = _arguments()
    chosen = [
        side
        for side in sides(given.nix_snapshotter)
        if not given.side
        or isinstance(side, Warm | WarmNamed)
        or any(text in side.name for text in given.side)
    ]
    results = []
    with run_directory("fs-cold-") as directory, registry(directory) as images:
        key = signing_key(given.work / "keys")
        for name in given.workload or WORKLOADS:
            ready = make_ready(WORKLOADS[name], given.work, key, images, directory)
            if any(isinstance(side, Updated) for side in chosen):
                ready = with_before(ready, given.work, key, images, directory)
            for profile in given.profile or ["20"]:
                link = Profile(profile, *PROFILES[profile])
                results.append(measure(ready, link, key, images, directory, chosen, given.rounds))
    if given.charts:
        write_charts(results, given.charts)
    if given.json:
        print(json.dumps({"machine": machine(), "results": [each.as_json() for each in results]}))
    else:
        say = Console(highlight=False, soft_wrap=True)
        for result in results:
            say.print(result.as_table())
            for goal in result.goals():
                say.print(str(goal))
        say.print(", ".join(f"{key} {value}" for key, value in machine().items()))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench coldstart", description=DESCRIPTION)
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="starts of each side (5)")
    add("--workload", action="append", choices=list(WORKLOADS), help="one or several; default all")
    add("--profile", action="append", choices=list(PROFILES), help="Mbit/s; default 20")
    add("--side", action="append", metavar="TEXT", help="only sides whose name has TEXT")
    add("--nix-snapshotter", type=Path, metavar="FILE", help="a program to be one more side")
    add("--json", action="store_true", help="print JSON, in seconds and bytes")
    add("--charts", type=Path, metavar="DIR", help="write an SVG chart for each link into DIR")
    add("--work", type=Path, default=default_work(), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
