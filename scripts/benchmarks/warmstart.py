"""Warm starts: containers whose closure is complete, beside the same files in containerd's own overlayfs."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.binary_cache import CacheFiles, SigningKey, http_cache, signing_key, write_cache
from testbed.containerd import Containerd, containerd
from testbed.fusesnap_daemon import Source, fusesnap_daemon, prefetch
from testbed.images import Layer, NixLayerManner, nix_layer, store_paths_layer, write_image
from testbed.nix_store import NixStore
from testbed.processes import run_until_output
from testbed.workplace import default_work, run_directory

from benchmarks.coldstart_workloads import SHELL, Built
from benchmarks.large_cache import write_large_cache
from benchmarks.many_paths import nix_image, ordinary_image, small_paths
from fusesnap.nix.store_path import StoreDir

DESCRIPTION = """\
Runs real containers (ctr run, runc) of images whose closure is all there, to their first output, in turns: in fusesnap,
the same files as an ordinary image in containerd's overlayfs, and in overlayfs once more, which shows how much the
machine itself varies. Once with a closure of a shell, once with many store paths beside it.
Shows medians, and the median of the ratios of each round with the interval that holds it in 95 of 100 resamplings.
"""
OURS, THEIRS, AGAIN = "fusesnap", "overlayfs", "overlayfs again"
COMMAND = ("bash", "-c", "echo started")
RESAMPLINGS = 2000
SECONDS = 600


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of paired ratios, and its interval."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        """Of two sides that took turns."""
        ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
        chance = random.Random(1)  # noqa: S311 - the same figures give the same interval
        medians = sorted(
            statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(RESAMPLINGS)
        )
        ends = (medians[RESAMPLINGS * 25 // 1000], medians[RESAMPLINGS * 975 // 1000])
        return cls(statistics.median(ratios), *ends)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True, slots=True)
class Images:
    """The layers of both images, what has to be fetched for the one, and where from."""

    name: str
    ours: Sequence[Layer]
    theirs: Sequence[Layer]
    paths: Sequence[str]
    files: CacheFiles
    environment: dict[str, str]


def shell_images(work: Path, key: SigningKey) -> Images:
    """The closure of a shell."""
    built = Built.make(SHELL, NixStore(work / "store"))
    files = write_cache(built.store, [built.closure.root], work / "cache-cold-shell", key=key)
    base = built.base_layer()
    ours = [base, nix_layer(built.store, built.closure, NixLayerManner.PATHS)]
    theirs = [base, store_paths_layer(built.store, built.closure.paths)]
    count = len(built.closure.paths)
    return Images(
        f"{count} store paths", ours, theirs, [built.closure.root], files, built.environment
    )


def many_images(work: Path, key: SigningKey, directory: Path, count: int) -> Images:
    """Many store paths, and the shell in an ordinary layer below them."""
    built = Built.make(SHELL, NixStore(work / "store"))
    store_dir, paths = StoreDir(), small_paths(count)
    files = write_large_cache(paths, directory / "cache", key, store_dir, compression="zstd")
    below = [built.base_layer(), store_paths_layer(built.store, built.closure.paths)]
    return Images(
        f"{count} store paths",
        [*below, *nix_image(paths, store_dir)],
        [*below, *ordinary_image(paths, store_dir)],
        [store_dir.format(path.store_path) for path in paths],
        files,
        built.environment,
    )


@contextlib.contextmanager
def node(
    images: Images, key: SigningKey, directory: Path
) -> Iterator[dict[str, Callable[[], float]]]:
    """A node with everything there; gives what starts a container of each side, and returns the seconds."""
    state = directory / "s"
    with http_cache(images.files, directory / "nginx") as cache:
        source = Source([cache.url], [key.public])
        with (
            fusesnap_daemon(state, source=source) as daemon,
            containerd(directory / "c", proxy=daemon.address) as client,
        ):
            prefetch(state, images.paths, source=source, timeout=SECONDS)
            sides = {
                OURS: (images.ours, "fusesnap"),
                THEIRS: (images.theirs, "overlayfs"),
                AGAIN: (images.theirs, "overlayfs"),
            }
            starts = {}
            for name, (layers, snapshotter) in sides.items():
                word = name.replace(" ", "-")
                archive = write_image(
                    directory / f"{word}.tar",
                    layers,
                    name=f"{word}:latest",
                    environment=images.environment,
                )
                reference = client.import_archive(archive, snapshotter=snapshotter, timeout=SECONDS)
                starts[name] = _starter(client, reference, snapshotter)
            yield starts


def _starter(client: Containerd, reference: str, snapshotter: str) -> Callable[[], float]:
    command = client.run_command(reference, "one", *COMMAND, snapshotter=snapshotter)

    def start() -> float:
        began = time.perf_counter()
        ends: list[float] = []
        run_until_output(command, lambda: ends.append(time.perf_counter()), timeout=SECONDS)
        return ends[0] - began

    return start


def measure(
    images: Images, key: SigningKey, directory: Path, rounds: int
) -> dict[str, list[float]]:
    """Seconds by side. The order changes from round to round; one round before is not counted."""
    seconds: dict[str, list[float]] = {}
    with node(images, key, directory) as starts:
        names = list(starts)
        for number in range(-1, rounds):
            for name in names:
                taken = starts[name]()
                if number >= 0:
                    seconds.setdefault(name, []).append(taken)
            names.append(names.pop(0))
    return seconds


def report(name: str, seconds: dict[str, list[float]]) -> dict[str, object]:
    """Print the figures for a person on the error stream; returns them for scripts."""
    ratio, noise = (Ratio.of(seconds[side], seconds[THEIRS]) for side in (OURS, AGAIN))
    medians = {side: statistics.median(each) for side, each in seconds.items()}
    shown = ", ".join(f"{side} {median * 1e3:.1f} ms" for side, median in medians.items())
    print(
        f"{name}: {shown}\n  {OURS} / {THEIRS} {ratio}, {AGAIN} / {THEIRS} {noise}, "
        f"difference {ratio.median - noise.median:+.3f}",
        file=sys.stderr,
        flush=True,
    )
    return {
        "name": name,
        "seconds": seconds,
        "medians": medians,
        "ratio": [ratio.median, ratio.low, ratio.high],
        "noise": [noise.median, noise.low, noise.high],
    }


def main() -> int:
    """Measure, print; returns the exit status."""
    given = _arguments()
    key = signing_key(given.work / "keys")
    results = []
    for many in (False, True):
        with run_directory("fs-warm-") as directory:
            images = (
                many_images(given.work, key, directory, given.paths)
                if many
                else shell_images(given.work, key)
            )
            results.append(report(images.name, measure(images, key, directory, given.rounds)))
    if given.json:
        print(json.dumps(results))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench warmstart", description=DESCRIPTION)
    add = parser.add_argument
    add("--rounds", type=int, default=30, help="starts of each side (30)")
    add("--paths", type=int, default=2400, help="store paths of the large closure (2400)")
    add("--json", action="store_true", help="print JSON, in seconds")
    add("--work", type=Path, default=default_work(), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
