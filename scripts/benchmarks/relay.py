"""What a request costs through the supervisor's relay, beside one that the worker has from the kernel itself."""

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
from collections.abc import Iterator
from pathlib import Path

from testbed.binary_cache import signing_key, write_cache
from testbed.fusesnap_daemon import Source, fusesnap_daemon, prefetch
from testbed.nix_store import NixStore
from testbed.synthetic import simple_closure
from testbed.workplace import default_work, run_directory

DESCRIPTION = """\
Starts two daemons, one whose worker reads the kernel's requests itself and one whose supervisor relays them (as it must
before Linux 6.9), each with the same store path, already fetched. Reads 4 KiB at random places of a file through each
mount, past the page cache, in turns. Shows the median and the 99th percentile of a read in microseconds.
"""
PAGE = 4096
MODES = {"direct": "never", "relay": "always"}


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="scripts/bench relay", description=DESCRIPTION)
    parser.add_argument("--rounds", type=int, default=20, help="turns of each mode (default: 20)")
    parser.add_argument("--reads", type=int, default=500, help="reads a turn (default: 500)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    given = parser.parse_args()
    with run_directory("fs-relay-") as work, contextlib.ExitStack() as stack:
        files = {mode: stack.enter_context(served(work, mode)) for mode in MODES}
        times = measure(files, given.rounds, given.reads)
    results = {mode: summary(each) for mode, each in times.items()}
    ratio = results["relay"]["median"] / results["direct"]["median"]
    if given.json:
        print(json.dumps({**results, "ratio": ratio}))
        return
    print(f"4 KiB reads, {given.rounds} turns of {given.reads} each, microseconds a read")
    for mode, each in results.items():
        print(f"{mode:8} median {each['median']:7.1f}   99th percentile {each['p99']:7.1f}")
    print(f"relay / direct: {ratio:.2f}")


@contextlib.contextmanager
def served(work: Path, mode: str, name: str = "") -> Iterator[int]:
    """A descriptor of a large file below the mount of a daemon in that mode, open past the page cache.

    ``name`` is the daemon's among others in ``work``.
    """
    store = NixStore(default_work() / "store")
    path = simple_closure(store).large
    directory = work / (name or mode)
    directory.mkdir()
    key = signing_key(directory)
    (directory / "cache").mkdir()
    cache = write_cache(store, [path], directory / "cache", compression="none", key=key)
    source = Source([f"file://{cache.directory}"], [key.public])
    state = directory / "s"
    prefetch(state, [path], source=source)
    with fusesnap_daemon(state, source=source, options=["--relay", MODES[mode]]):
        root = state / "lazy/layer/.fusesnap-lazy" / Path(path).name
        file = next(entry for entry in root.rglob("*") if entry.is_file())
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def measure(files: dict[str, int], rounds: int, reads: int) -> dict[str, list[float]]:
    """Seconds of every read, by mode; the modes take turns, so that what else the machine does meets both."""
    times: dict[str, list[float]] = {mode: [] for mode in files}
    choice = random.Random(1)  # noqa: S311 - the same places in every run
    with mmap.mmap(-1, PAGE) as page:
        for number in range(rounds + 1):
            for mode, descriptor in files.items():
                pages = os.fstat(descriptor).st_size // PAGE
                offsets = [choice.randrange(pages) * PAGE for _ in range(reads)]
                taken = [timed_read(descriptor, page, offset) for offset in offsets]
                if number:  # the first turn warms up
                    times[mode] += taken
    return times


def timed_read(descriptor: int, page: mmap.mmap, offset: int) -> float:
    """Seconds that one read takes."""
    begin = time.perf_counter()
    size = os.preadv(descriptor, [page], offset)
    taken = time.perf_counter() - begin
    if size != PAGE:
        sys.exit(f"a read of {PAGE} bytes gave {size}")
    return taken


def summary(times: list[float]) -> dict[str, float]:
    """Microseconds."""
    return {
        "median": statistics.median(times) * 1e6,
        "p99": statistics.quantiles(times, n=100)[98] * 1e6,
    }


if __name__ == "__main__":
    main()
