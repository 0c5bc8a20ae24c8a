"""A thundering herd: many containers of several images that start at once on a node that has nothing yet."""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from testbed.binary_cache import CacheFiles, HttpCache, http_cache, signing_key
from testbed.containerd import Container, Containerd, containerd
from testbed.fusesnap_daemon import FusesnapDaemon, Source, fusesnap_daemon
from testbed.images import write_image
from testbed.link_process import RunningLink, slow_link
from testbed.workplace import default_work, run_directory

from benchmarks.herd_images import HerdImage, busybox, herd_images
from benchmarks.large_cache import write_large_cache
from benchmarks.resident import MIB, Peaks, watched
from fusesnap.nix.store_path import StoreDir

DESCRIPTION = """\
Starts many containers of several images at once (ctr run, runc), each of which reads its whole closure. The time is
that until the last has read everything; to end them is not part of it. In
turns: in containerd's overlayfs, where everything is there and was read before; and in fusesnap, on a node that has
nothing, with the cache behind an emulated link. What fusesnap can at best take is the longer of two times: that of the
bytes on the link, each once, and that of the warm starts.
Exit status 1 if a NAR is fetched twice, or the median of the ratios is above its limit.
"""
GOAL = 1.3
SECONDS = 900
KIB = 1024
LOOK_EVERY = 0.1  # seconds between two looks at what a container has said


class Failed(Exception):
    """A container did not start, or did not read what it should."""


@dataclass(frozen=True, slots=True)
class Line:
    """A link: ``rate`` in bits a second, ``round_trip`` in seconds."""

    rate: float = 20e6
    round_trip: float = 0.08


@dataclass(frozen=True, slots=True)
class Round:
    """One turn of each side. Times in seconds, sizes in bytes; ``twice``: NARs that were asked for more than once.

    ``link``: what the NARs take on the link. ``crossed``: what did cross it. ``memory``: the most that the daemon's
    processes held together, shared pages counted once.
    """

    warm: float
    link: float
    cold: float
    crossed: int
    twice: int
    memory: int

    @property
    def ratio(self) -> float:
        """The herd's time by the least that it could take."""
        return self.cold / max(self.warm, self.link)


class Herd:
    """Containers of some images, in one snapshotter of a running containerd."""

    def __init__(
        self, client: Containerd, images: Sequence[HerdImage], snapshotter: str, directory: Path
    ) -> None:
        self._client = client
        self._images = images
        self._snapshotter = snapshotter
        self._turn = 0
        self._references = [self._import(image, directory) for image in images]

    def start(self, count: int) -> float:
        """Start ``count`` containers at once, the images in turns; returns seconds until the last has read everything.

        They run until all have; to end them is not timed. Raises ``Failed``.
        """
        self._turn += 1  # each container has a log of its own name
        all_read = threading.Barrier(count)
        began = time.perf_counter()
        with ThreadPoolExecutor(count) as threads:
            try:
                ended = list(threads.map(lambda number: self._run(number, all_read), range(count)))
            except BaseException:
                all_read.abort()  # nobody waits any longer
                raise
        return max(ended) - began

    def remove_images(self) -> None:
        """Have containerd forget the images, and so what they need."""
        self._client.ctr("images", "rm", "--sync", *self._references)

    def _run(self, number: int, all_read: threading.Barrier) -> float:
        image = self._images[number % len(self._images)]
        reference = self._references[number % len(self._images)]
        name = f"{self._snapshotter}-{image.number}-{self._turn}-{number}"
        try:
            with self._client.started(
                reference, name, *image.command, snapshotter=self._snapshotter, timeout=SECONDS
            ) as container:
                self._wait_until_read(container, image, all_read)
                ended = time.perf_counter()
                all_read.wait(SECONDS)
                return ended
        except BaseException:
            all_read.abort()
            raise

    def _wait_until_read(
        self, container: Container, image: HerdImage, all_read: threading.Barrier
    ) -> None:
        deadline = time.perf_counter() + SECONDS
        while container.log_text() != image.says:
            if time.perf_counter() > deadline or all_read.broken:
                raise Failed(f"{container.name} said {container.log_text()!r}, not {image.says!r}")
            time.sleep(LOOK_EVERY)

    def _import(self, image: HerdImage, directory: Path) -> str:
        lazy = self._snapshotter == "fusesnap"
        name = f"herd-{image.number}-{self._snapshotter}:latest"
        layers = image.nix_layers() if lazy else image.ordinary_layers()
        archive = write_image(directory / "image.tar", layers, name=name)
        return self._client.import_archive(archive, snapshotter=self._snapshotter, timeout=SECONDS)


@dataclass(frozen=True, slots=True)
class Node:
    """A node with all that it has."""

    cache: HttpCache
    link: RunningLink
    daemon: FusesnapDaemon
    client: Containerd
    directory: Path

    def herd(self, images: Sequence[HerdImage], snapshotter: str) -> Herd:
        """Import the images, which unpacks them."""
        return Herd(self.client, images, snapshotter, self.directory)

    def memory(self) -> contextlib.AbstractContextManager[Peaks]:
        """Watch what the daemon's processes hold."""
        return watched(self.daemon.service.pid, self.daemon.status()["worker"]["pid"])


@dataclass(frozen=True, slots=True)
class Bench:
    """What stays the same from round to round."""

    images: Sequence[HerdImage]
    files: CacheFiles
    key: str
    line: Line

    @property
    def size(self) -> int:
        """Bytes of all NARs, each once."""
        paths = {path.store_path for image in self.images for path in image.paths}
        store_dir = self.images[0].store_dir
        return self.files.compressed_size(store_dir.format(path) for path in paths)

    @contextlib.contextmanager
    def node(self, directory: Path, options: Sequence[str | Path] = ()) -> Iterator[Node]:
        """A node that has nothing yet, at the far end of the link, for the time of the context.

        ``options`` are further ones of the daemon.
        """
        with contextlib.ExitStack() as stack:
            enter = stack.enter_context
            cache = enter(http_cache(self.files, directory / "nginx"))
            rate, round_trip = self.line.rate, self.line.round_trip
            link = enter(
                slow_link({"cache": cache.port}, directory, rate=rate, round_trip=round_trip)
            )
            source = Source([link.url("cache")], [self.key])
            daemon = enter(
                fusesnap_daemon(
                    directory / "s",
                    source=source,
                    options=[str(each) for each in options],
                    complete=True,
                )
            )
            client = enter(containerd(directory / "c", proxy=daemon.address))
            yield Node(cache, link, daemon, client, directory)

    def round(self, containers: int, directory: Path) -> Round:
        """One turn of each side."""
        with self.node(directory) as node:
            ordinary, lazy = node.herd(self.images, "overlayfs"), node.herd(self.images, "fusesnap")
            ordinary.start(len(self.images))  # now they are warm
            warm = ordinary.start(containers)
            before = node.link.down()
            with node.memory() as peaks:
                cold = lazy.start(containers)
            return Round(
                warm,
                self.size * 8 / self.line.rate,
                cold,
                node.link.down() - before,
                len(fetched_again(node.cache)),
                peaks.total_pss,
            )


def fetched_again(cache: HttpCache) -> set[str]:
    """NARs that were asked for again, other than for a part that was missing."""
    asked = Counter(
        each.path
        for each in cache.requests()
        if each.path.startswith("/nar/") and each.status < 400 and not each.range
    )
    return {path for path, count in asked.items() if count > 1}


def prepare(
    directory: Path,
    work: Path,
    *,
    images: int,
    shared: Sequence[int],
    own: Sequence[int],
    line: Line,
) -> Bench:
    """Make images and a cache for them in ``directory``; ``work`` is where packages are kept."""
    store_dir = StoreDir()
    shell = busybox(work / "store" / "archives")
    made = herd_images(images, shared=shared, own=own, shell=shell, store_dir=store_dir)
    paths = {path.store_path: path for image in made for path in image.paths}
    key = signing_key(directory / "keys", "bench-1")
    files = write_large_cache(
        list(paths.values()), directory / "cache", key, store_dir, compression="zstd"
    )
    return Bench(made, files, key.public, line)


def main() -> int:
    """Measure, print; returns the exit status."""
    given = _arguments()
    rounds: list[Round] = []
    with run_directory("fs-herd-") as directory:
        bench = prepare(
            directory,
            given.work,
            images=given.images,
            shared=[400 * KIB] * 5,
            own=[given.own * KIB] * 10,
            line=Line(given.rate * 1e6, given.round_trip / 1e3),
        )
        for number in range(given.rounds):
            with run_directory("fs-herd-") as node:
                rounds.append(bench.round(given.containers, node))
            print(_row(number, rounds[-1]), file=sys.stderr, flush=True)
    ratio = statistics.median(each.ratio for each in rounds)
    print(json.dumps(_as_json(rounds, ratio)) if given.json else _as_text(rounds, ratio))
    return int(ratio > GOAL or any(each.twice for each in rounds))


def _as_json(rounds: Sequence[Round], ratio: float) -> dict[str, Any]:
    return {"ratio": ratio, "rounds": [{**asdict(each), "ratio": each.ratio} for each in rounds]}


def _as_text(rounds: Sequence[Round], ratio: float) -> str:
    lines = [
        f"{'round':<7}{'warm, s':>9}{'link, s':>9}{'cold, s':>9}{'ratio':>7}"
        f"{'crossed, MiB':>14}{'twice':>7}{'memory, MiB':>13}"
    ]
    lines += [_row(number, each) for number, each in enumerate(rounds)]
    low, high = min(each.ratio for each in rounds), max(each.ratio for each in rounds)
    lines.append(f"median of the ratios: {ratio:.2f} ({low:.2f} to {high:.2f}), goal {GOAL}")
    return "\n".join(lines)


def _row(number: int, each: Round) -> str:
    return (
        f"{number:<7}{each.warm:>9.1f}{each.link:>9.1f}{each.cold:>9.1f}{each.ratio:>7.2f}"
        f"{each.crossed / MIB:>14.1f}{each.twice:>7}{each.memory / MIB:>13.0f}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench herd",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--containers", type=int, default=200, help="containers at once (200)")
    add("--images", type=int, default=20, help="images (20)")
    add("--own", type=int, default=256, metavar="KIB", help="size of an image's own 10 paths (256)")
    add("--rounds", type=int, default=5, help="rounds (5)")
    add("--rate", type=float, default=20, metavar="MBIT", help="of the link (20)")
    add("--round-trip", type=float, default=80, metavar="MS", help="of the link (80)")
    add("--json", action="store_true", help="print JSON, in seconds and bytes")
    add("--work", type=Path, default=default_work(), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
