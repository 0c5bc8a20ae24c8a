"""What to fetch before a program asks for it, when nothing is known of its start: cold starts in turns."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from testbed.binary_cache import SigningKey, signing_key
from testbed.registry import Registry, registry
from testbed.workplace import default_work, run_directory

from benchmarks.coldstart import PROFILES, make_ready, scene
from benchmarks.coldstart_goals import Profile
from benchmarks.coldstart_sides import Fusesnap, Started, start
from benchmarks.coldstart_workloads import WORKLOADS

DESCRIPTION = """\
Starts real containers on machines that have nothing yet, over an emulated link, and takes the time from the pull to the
first output: with the dynamic loader's look-ahead, with that by references, with both, and with none, in turns. None of
them has a startup trace, and nothing is completed in the background.
"""
SIDES = ("loader", "references", "both", "none")


def main() -> int:
    """Measure, print; returns the exit status."""
    given = _arguments()
    found: dict[str, dict[str, list[Started]]] = {}
    with run_directory("fs-ahead-") as directory, registry(directory) as images:
        key = signing_key(given.work / "keys")
        for name in given.workload or WORKLOADS:
            found[name] = _measure(name, given, key, images, directory)
    print(json.dumps(_as_json(found)) if given.json else _as_text(found))
    return 0


def _measure(
    name: str, given: argparse.Namespace, key: SigningKey, images: Registry, directory: Path
) -> dict[str, list[Started]]:
    ready = make_ready(WORKLOADS[name], given.work, key, images, directory)
    link = Profile(given.profile, *PROFILES[given.profile])
    starts: dict[str, list[Started]] = {side: [] for side in SIDES}
    for number in range(given.rounds):
        for side in SIDES:
            ours = Fusesnap(side, "stock", f'[fetch]\nlook-ahead = "{side}"\n', complete=False)
            with run_directory("fs-ahead-") as place, scene(ready, link, key, images, place) as on:
                taken = start(ours, on, place / "m")
            starts[side].append(taken)
            said = f"{taken.seconds:.2f} s, {taken.crossed / 1e6:.2f} MB"
            print(f"{number + 1} {name} {side}: {said}", file=sys.stderr, flush=True)
    return starts


def _as_json(found: dict[str, dict[str, list[Started]]]) -> dict[str, object]:
    return {
        name: {
            side: {
                "seconds": [each.seconds for each in taken],
                "crossed": [each.crossed for each in taken],
            }
            for side, taken in sides.items()
        }
        for name, sides in found.items()
    }


def _as_text(found: dict[str, dict[str, list[Started]]]) -> str:
    lines = [f"{'medians':<12}{'look-ahead':<14}{'s':>8}{'by loader':>11}{'MB':>8}"]
    for name, sides in found.items():
        base = [each.seconds for each in sides["loader"]]
        for side, taken in sides.items():
            lines.append(_row(name, side, taken, base))
    return "\n".join(lines)


def _row(name: str, side: str, taken: Sequence[Started], base: Sequence[float]) -> str:
    seconds = statistics.median(each.seconds for each in taken)
    pairs = zip(taken, base, strict=True)
    ratio = statistics.median(each.seconds / other for each, other in pairs)
    crossed = statistics.median(each.crossed for each in taken)
    return f"{name:<12}{side:<14}{seconds:>8.2f}{ratio:>11.2f}{crossed / 1e6:>8.2f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench lookahead",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="starts of each side (5)")
    add("--workload", action="append", choices=list(WORKLOADS), help="one or several; default all")
    add("--profile", choices=list(PROFILES), default="20", help="Mbit/s (20)")
    add("--json", action="store_true", help="print JSON, in seconds and bytes")
    add("--work", type=Path, default=default_work(), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
