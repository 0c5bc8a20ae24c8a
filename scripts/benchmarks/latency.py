"""How fast the worker answers while a large NAR is being unpacked, beside when nothing else is done."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from testbed.binary_cache import http_cache, signing_key
from testbed.fusesnap_daemon import FusesnapDaemon, Source, fusesnap_daemon, prefetch
from testbed.workplace import run_directory

from benchmarks.large_cache import COMPRESSORS, LARGE, SMALL, LargePath, write_large_cache
from benchmarks.memory import Client
from fusesnap.nix.store_path import StoreDir

DESCRIPTION = """\
Starts the daemon, with a path of many small files that is committed, and large paths that are not. Looks at files of
the committed path through the lazy mount, each once, so that nothing is in the kernel's caches: stat (the kernel's
LOOKUP), open (OPEN) and read (READ), a file every millisecond; in turns with nothing else to do, and while a large NAR
comes from a local nginx as fast as it can be unpacked. Shows microseconds an answer. Exit status 1 if the 99th
percentile is above its limit meanwhile.
"""
LIMIT = 0.002
PAUSE = 0.001  # seconds between files
STEPS = ("stat", "open", "read")
IDLE, BUSY = "idle", "unpacking"
FILES = 60_000
BAR = 50


class Exhausted(Exception):
    """There are no more files to look at for the first time."""


@dataclass
class Answers:
    """Seconds of each answer, by step."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {step: [] for step in STEPS})

    @property
    def all(self) -> list[float]:
        """Of all steps."""
        return [each for step in STEPS for each in self.seconds[step]]

    def figures(self, step: str | None = None) -> dict[str, float]:
        """Median, percentiles, maximum."""
        found = sorted(self.all if step is None else self.seconds[step])
        return {
            "count": len(found),
            "median": statistics.median(found),
            "p90": found[int(len(found) * 0.9)],
            "p99": found[int(len(found) * 0.99)],
            "p99.9": found[int(len(found) * 0.999)],
            "maximum": found[-1],
        }

    def histogram(self) -> dict[int, int]:
        """Answers by the power of two of microseconds that they took at most."""
        return dict(sorted(Counter(_power(each) for each in self.all).items()))


def _power(seconds: float) -> int:
    return 1 << max(0, math.ceil(math.log2(max(seconds * 1e6, 1))))


class Looker:
    """Looks at one file after the other for the first time."""

    def __init__(self, directory: Path, path: LargePath) -> None:
        self._files = iter(
            f"{directory}/{SMALL.decode()}/{path.small_name(index).decode()}"
            for index in range(path.files)
        )

    def begin(self) -> None:
        """Have the tree of the path read, which takes its time once."""
        self._look_at(next(self._files), Answers())

    def look(self, answers: Answers, goes_on: Callable[[], bool]) -> None:
        """Until it does not go on."""
        while goes_on():
            try:
                self._look_at(next(self._files), answers)
            except StopIteration:
                raise Exhausted("all files were looked at: --rounds is too large") from None
            time.sleep(PAUSE)

    def _look_at(self, file: str, answers: Answers) -> None:
        times = [time.perf_counter()]
        os.stat(file)  # noqa: PTH116 - a Path costs as much as an answer
        times.append(time.perf_counter())
        descriptor = os.open(file, os.O_RDONLY)
        times.append(time.perf_counter())
        try:
            os.pread(descriptor, 4096, 0)
            times.append(time.perf_counter())
        finally:
            os.close(descriptor)
        for step, began, ended in zip(STEPS, times[:-1], times[1:], strict=True):
            answers.seconds[step].append(ended - began)


def main() -> None:
    """Measure, print."""
    given = arguments()
    with run_directory("fs-latency-") as work:
        answers, unpacked = measure(work, given)
    if given.json:
        print(json.dumps(as_json(answers, unpacked)))
    else:
        print(as_text(answers, unpacked, given))
    sys.exit(answers[BUSY].figures()["p99"] > LIMIT)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench latency",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each kind (default: 5)")
    parser.add_argument("--size", type=int, default=300, help="MB of a large NAR (default: 300)")
    parser.add_argument(
        "--compression", choices=COMPRESSORS, default="zstd", help="of the NARs (default: zstd)"
    )
    parser.add_argument("--relay", choices=("never", "always"), default="never", help="relay mode")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args()


def measure(work: Path, given: argparse.Namespace) -> tuple[dict[str, Answers], list[float]]:
    """The answers of both kinds of turns, and how many seconds the large NARs took."""
    small = LargePath(0, 1, FILES)
    blocks = given.size * 1_000_000 // (64 * 1024)
    large = [LargePath(number, blocks, 1) for number in range(1, given.rounds + 1)]
    answers, unpacked = {IDLE: Answers(), BUSY: Answers()}, []
    with daemon_with(work, [small, *large], small, given) as daemon:
        lazy = daemon.state / "lazy/layer/.fusesnap-lazy"
        looker = Looker(lazy / small.store_path.base_name, small)
        looker.begin()
        for path in large:
            with unpacking(lazy / path.store_path.base_name / LARGE.decode()) as job:
                looker.look(answers[BUSY], lambda job=job: job.goes_on)  # type: ignore[misc]
            unpacked.append(job.seconds)
            time.sleep(0.5)  # for what is left to be written
            until = time.monotonic() + job.seconds
            looker.look(answers[IDLE], lambda until=until: time.monotonic() < until)  # type: ignore[misc]
    return answers, unpacked


@contextlib.contextmanager
def daemon_with(
    work: Path, paths: Sequence[LargePath], there: LargePath, given: argparse.Namespace
) -> Iterator[FusesnapDaemon]:
    """A daemon that may fetch ``paths``, of which one is there."""
    key = signing_key(work / "keys")
    files = write_large_cache(paths, work / "cache", key, StoreDir(), compression=given.compression)
    with http_cache(files, work / "nginx") as cache, contextlib.ExitStack() as stack:
        source = Source([cache.url], [key.public])
        prefetch(work / "s", [StoreDir().format(there.store_path)], source=source, timeout=600)
        os.sync()
        daemon = stack.enter_context(
            fusesnap_daemon(work / "s", source=source, options=["--relay", given.relay])
        )
        channel = stack.enter_context(grpc.insecure_channel(f"unix:{daemon.address}"))
        Client(channel, work / "m").commit_image(paths, StoreDir())
        yield daemon


class Unpacking:
    """A large path that somebody waits for."""

    def __init__(self, file: Path) -> None:
        self._began = time.monotonic()
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._wait, args=(file,), daemon=True)
        self._thread.start()

    @property
    def goes_on(self) -> bool:
        """Whether it has not come yet."""
        return self._thread.is_alive()

    def _wait(self, file: Path) -> None:
        file.stat()
        self.seconds = time.monotonic() - self._began


@contextlib.contextmanager
def unpacking(file: Path) -> Iterator[Unpacking]:
    """Have the path of ``file`` fetched meanwhile."""
    job = Unpacking(file)
    yield job
    while job.goes_on:
        time.sleep(PAUSE)


def as_json(answers: dict[str, Answers], unpacked: Sequence[float]) -> dict[str, object]:
    """Everything, in seconds."""
    return {
        "unpacking_seconds": list(unpacked),
        "limit": LIMIT,
        **{
            name: {
                "all": each.figures(),
                **{step: each.figures(step) for step in STEPS},
                "histogram_us": each.histogram(),
            }
            for name, each in answers.items()
        },
    }


def as_text(
    answers: dict[str, Answers], unpacked: Sequence[float], given: argparse.Namespace
) -> str:
    """For a person."""
    names = ("count", "median", "p90", "p99", "p99.9", "maximum")
    lines = [
        f"microseconds an answer; {len(unpacked)} turns each; a NAR of {given.size} MB, "
        f"{given.compression}, came in {statistics.median(unpacked):.2f} s",
        f"{'':<18}" + "".join(f"{name:>10}" for name in names),
    ]
    for name, each in answers.items():
        for step in (None, *STEPS):
            figures = each.figures(step)
            shown = [figures["count"], *(figures[figure] * 1e6 for figure in names[1:])]
            label = f"{name}, {step or 'all'}"
            lines.append(f"{label:<18}" + "".join(f"{value:>10.0f}" for value in shown))
    for name, each in answers.items():
        lines.append(f"\n{name}: answers within so many microseconds")
        total = len(each.all)
        for power, count in each.histogram().items():
            bar = "#" * math.ceil(BAR * count / total)
            lines.append(f"{power:>8} {count:>8} {100 * count / total:6.2f} %  {bar}")
    ratio = answers[BUSY].figures()["p99"] / answers[IDLE].figures()["p99"]
    lines.append(f"\n99th percentile, {BUSY} / {IDLE}: {ratio:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
