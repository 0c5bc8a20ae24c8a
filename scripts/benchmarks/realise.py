"""How long it takes to have a whole closure, beside ``nix copy`` of real Nix."""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import shlex
import shutil
import sqlite3
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import zstandard
from testbed.binary_cache import CacheFiles, http_cache, signing_key
from testbed.fusesnap_daemon import PROGRAM, Source
from testbed.processes import run
from testbed.workplace import default_work, run_directory

from benchmarks.family import Taken, run_measured
from benchmarks.large_cache import Compressor, Stored, write_large_cache
from benchmarks.program_paths import ProgramPath, few_large, many_small
from benchmarks.resident import MIB
from fusesnap.nix.store_path import StoreDir

DESCRIPTION = """\
Realises a closure into a new, empty store, with `fusesnap prefetch` and with `nix copy`, in turns, from the same binary
cache behind a local nginx: everything is verified and committed by both. fusesnap alone also waits until it is on the
disk; what that costs Nix is shown beside, as `nix copy` and then `sync --file-system` of its store. Each turn has a new
file system on a loop device: ext4 is slow to create files for minutes after many were deleted, whoever deleted them.

Two closures of files of this machine's own programs, one of few large paths and one of many small ones; each as zstd,
xz and uncompressed. Shows the medians of seconds from start to end, of CPU seconds, and of the most memory that was
held. Exit status 1 if fusesnap's median is longer than that of `nix copy` alone in any row.
"""
NIX, SYNCED, FUSESNAP = "nix copy", "nix copy; sync", "fusesnap"
SIDES = (NIX, SYNCED, FUSESNAP)
# Of the file system that a turn has, which takes no more room than is written.
DISK_SIZE = 8 * 1024**3
SHAPES: dict[str, Callable[[argparse.Namespace], list[ProgramPath]]] = {
    "few large": lambda given: few_large(given.size * 1_000_000),
    "many small": lambda given: many_small(given.paths),
}
# What ``nix copy`` writes by default.
COMPRESSORS: dict[str, Callable[[], Compressor]] = {
    "zstd": lambda: zstandard.ZstdCompressor(level=3).compressobj(),
    "xz": lambda: lzma.LZMACompressor(preset=6),
    "none": Stored,
}


class Incomplete(Exception):
    """A side said that it was done, and was not."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One closure in one cache."""

    shape: str
    compression: str
    root: str
    paths: int
    files: CacheFiles

    @property
    def name(self) -> str:
        return f"{self.shape}, {self.compression}"


@dataclass
class Row:
    """What was measured of one cell, turn by turn."""

    cell: Cell
    taken: dict[str, list[Taken]] = field(default_factory=lambda: {side: [] for side in SIDES})

    def median(self, side: str, figure: str = "seconds") -> float:
        """Of all turns of a side; ``figure`` is one of Taken's."""
        figures: list[float] = [getattr(each, figure) for each in self.taken[side]]
        return statistics.median(figures)

    def ratio(self, side: str = NIX) -> float:
        """Of the medians of fusesnap and ``side``; less than 1 where fusesnap is faster."""
        return self.median(FUSESNAP) / self.median(side)

    def as_json(self) -> dict[str, Any]:
        """All turns, in seconds and bytes."""
        sides = {side: [asdict(each) for each in taken] for side, taken in self.taken.items()}
        ratios = {"ratio": self.ratio(), "ratio_to_synced": self.ratio(SYNCED)}
        return {"paths": self.cell.paths, **ratios, **sides}

    def as_text(self) -> str:
        """A line of the table."""
        words = [f"{self.cell.name:<18}"]
        for side in SIDES:
            seconds = [each.seconds for each in self.taken[side]]
            words.append(
                f"{self.median(side):>8.2f} {f'{min(seconds):.2f}-{max(seconds):.2f}':>13}"
                f"{self.median(side, 'cpu'):>7.2f}{self.median(side, 'memory') / MIB:>7.0f}"
            )
        return "  ".join([*words, f"{self.ratio():>6.2f}{self.ratio(SYNCED):>8.2f}"])


def main() -> None:
    """Measure, print."""
    given = arguments()
    with run_directory("fs-realise-") as work:
        rows = [Row(cell) for cell in cells(given)]
        for row in rows:
            measure(row, work, given.rounds)
            print(row.as_text(), file=sys.stderr, flush=True)
    if given.json:
        print(json.dumps({row.cell.name: row.as_json() for row in rows}))
    else:
        print(table(rows, given.rounds))
    sys.exit(any(row.ratio() > 1 for row in rows))


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench realise",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument(
        "--size", type=int, default=250, help="MB of the few large paths (default: 250)"
    )
    parser.add_argument("--paths", type=int, default=1000, help="small paths (default: 1000)")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="only this closure")
    parser.add_argument("--compression", action="append", choices=COMPRESSORS, help="only this")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args()


def table(rows: Sequence[Row], rounds: int) -> str:
    """For a person."""
    side = f"{'median':>8} {'least-most':>13}{'CPU':>7}{'MiB':>7}"
    return "\n".join(
        [
            f"seconds of {rounds} turns each; CPU seconds; MiB held at most",
            "  ".join([f"{'':<18}", *(f"{name:^35}" for name in SIDES), "    ratio to"]),
            "  ".join([f"{'':<18}", *[side] * len(SIDES), f"{'copy':>6}{'synced':>8}"]),
            *(row.as_text() for row in rows),
        ]
    )


def cells(given: argparse.Namespace) -> Iterator[Cell]:
    """The caches that are asked for; what was written once is kept in the test bed's directory."""
    for shape in given.shape or SHAPES:
        paths = SHAPES[shape](given)
        for compression in given.compression or COMPRESSORS:
            files = prepared(paths, compression)
            root = StoreDir().format(paths[0].store_path)
            yield Cell(shape, compression, root, len(paths), files)


def prepared(paths: Sequence[ProgramPath], compression: str) -> CacheFiles:
    """A binary cache with ``paths``."""
    work = default_work() / "realise"
    key = signing_key(work)
    made_of = hashlib.sha256(repr((paths, key.public)).encode()).hexdigest()[:16]
    directory = work / f"{made_of}-{compression}"
    if not directory.exists():
        print(f"writing a cache of {len(paths)} paths, {compression}", file=sys.stderr, flush=True)
        unfinished = work / f"{directory.name}.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        write_large_cache(
            paths,
            unfinished,
            key,
            StoreDir(),
            compression=compression,
            compressors=COMPRESSORS,
        )
        unfinished.rename(directory)
    return CacheFiles(directory)


def measure(row: Row, work: Path, rounds: int) -> None:
    """All sides in turns, so that what else the machine does meets all."""
    cell, key = row.cell, signing_key(default_work() / "realise")
    with http_cache(cell.files, work / "nginx") as cache:
        sides: dict[str, Callable[[Path], Taken]] = {
            NIX: lambda store: nix_copy(cell.root, cache.url, key.public, store),
            SYNCED: lambda store: nix_copy_synced(cell.root, cache.url, key.public, store),
            FUSESNAP: lambda store: prefetch(cell.root, Source([cache.url], [key.public]), store),
        }
        for number in range(rounds):
            # Each is first as often as last.
            for side in list(sides)[:: -1 if number % 2 else 1]:
                with new_disk(work) as store:
                    row.taken[side].append(sides[side](store))
                    check(side, store, cell, thoroughly=number == rounds - 1)


@contextmanager
def new_disk(work: Path) -> Iterator[Path]:
    """An empty file system, on a disk for which nothing waits that others have written."""
    image, disk = work / "disk.img", work / "disk"
    with image.open("wb") as file:
        file.truncate(DISK_SIZE)
    run(["mkfs.ext4", "-q", "-E", "nodiscard", image])
    disk.mkdir(exist_ok=True)
    run(["mount", "-o", "loop", image, disk])
    try:
        os.sync()
        yield disk
    finally:
        run(["umount", disk])
        image.unlink()


def nix_copy(root: str, url: str, key: str, store: Path) -> Taken:
    """Real Nix, with nothing remembered."""
    return run_measured(copying(root, url, store), env=environment(key, store))


def nix_copy_synced(root: str, url: str, key: str, store: Path) -> Taken:
    """Real Nix, and what it wrote is on the disk: what a crash leaves is then worth as much as with us."""
    both = (
        f"{shlex.join(copying(root, url, store))} && sync --file-system {shlex.quote(str(store))}"
    )
    return run_measured(["sh", "-c", both], env=environment(key, store))


def copying(root: str, url: str, store: Path) -> list[str]:
    """The command."""
    return ["nix", "copy", "--from", url, "--to", uri(store), root]


def environment(key: str, store: Path) -> dict[str, str]:
    """What real Nix is told beside its command."""
    return {
        "HOME": str(store),
        "XDG_CACHE_HOME": str(store / "cache"),
        "NIX_CONF_DIR": str(store),
        "NIX_CONFIG": f"experimental-features = nix-command\ntrusted-public-keys = {key}\n"
        "substituters =\nsandbox = false\nbuild-users-group =",
    }


def prefetch(root: str, source: Source, store: Path) -> Taken:
    """Us."""
    return run_measured([PROGRAM, "prefetch", "--state", store, *source.options, root], env={})


def uri(store: Path) -> str:
    """The URL of a store in ``store``, laid out as ours is."""
    return (
        f"local?store=/nix/store&real={store}/layer/.fusesnap-store&state={store}/nix"
        f"&log={store}/log"
    )


def check(side: str, store: Path, cell: Cell, *, thoroughly: bool) -> None:
    """Raise Incomplete unless all paths are valid; ``thoroughly`` has Nix read every byte."""
    with sqlite3.connect(store / "nix/db/db.sqlite") as database:
        (valid,) = database.execute("SELECT count(*) FROM ValidPaths").fetchone()
    database.close()
    if valid != cell.paths:
        raise Incomplete(f"{side}: {cell.name}: {valid} of {cell.paths} paths are valid")
    if thoroughly:
        verify = ["nix-store", "--store", uri(store), "--verify", "--check-contents"]
        run(verify, env={"HOME": str(store), "NIX_CONF_DIR": str(store)}, timeout=600)


if __name__ == "__main__":
    main()
