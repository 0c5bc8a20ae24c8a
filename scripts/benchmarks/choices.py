"""Cold starts over a link with one setting or another of the daemon, in turns."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.binary_cache import SigningKey, signing_key
from testbed.registry import Registry, registry
from testbed.workplace import default_work, run_directory

from benchmarks.coldstart import PROFILES, make_ready, scene
from benchmarks.coldstart_goals import Profile
from benchmarks.coldstart_sides import Fusesnap, Started, start
from benchmarks.coldstart_workloads import WORKLOADS

Starts = dict[str, list[Started]]  # by the choice


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a binary cache of the kind ``cache``.

    ``choices`` are lines of the daemon's configuration by their names, the first of which is what others are held
    against. ``complete``: closures are fetched whole when nothing else is.
    """

    subject: str
    cache: str
    choices: Mapping[str, str]
    complete: bool = False


def answer(question: Question, given: argparse.Namespace) -> str:
    """Measure; returns what is to be printed."""
    found: dict[tuple[str, str], Starts] = {}
    with run_directory("fs-choice-") as directory, registry(directory) as images:
        key = signing_key(given.work / "keys")
        for workload in given.workload or WORKLOADS:
            measured = _measure(question, workload, given, key, images, directory)
            found |= {(workload, profile): starts for profile, starts in measured.items()}
    return json.dumps(_as_json(found)) if given.json else _as_text(question, found)


def _measure(
    question: Question,
    workload: str,
    given: argparse.Namespace,
    key: SigningKey,
    images: Registry,
    directory: Path,
) -> dict[str, Starts]:
    ready = make_ready(WORKLOADS[workload], given.work, key, images, directory)
    found: dict[str, Starts] = {}
    for profile in given.profile or ["20"]:
        link = Profile(profile, *PROFILES[profile])
        starts = found[profile] = {name: [] for name in question.choices}
        for number in range(given.rounds):
            for name, lines in question.choices.items():
                ours = Fusesnap(name, question.cache, lines, complete=question.complete)
                with (
                    run_directory("fs-choice-") as place,
                    scene(ready, link, key, images, place) as on,
                ):
                    taken = start(ours, on, place / "m")
                starts[name].append(taken)
                said = f"{taken.seconds:.2f} s, {taken.crossed / 1e6:.2f} MB"
                line = f"{number + 1} {workload} {profile} {name}: {said}"
                print(line, file=sys.stderr, flush=True)
    return found


def _as_json(found: Mapping[tuple[str, str], Starts]) -> list[dict[str, object]]:
    return [
        {
            "workload": workload,
            "profile": profile,
            "choice": name,
            "seconds": [each.seconds for each in taken],
            "crossed": [each.crossed for each in taken],
        }
        for (workload, profile), starts in found.items()
        for name, taken in starts.items()
    ]


def _as_text(question: Question, found: Mapping[tuple[str, str], Starts]) -> str:
    first = next(iter(question.choices))
    lines = [
        f"{'medians':<10}{'Mbit/s':<8}{question.subject:<14}{'s':>8}{f'by {first}':>12}{'MB':>8}"
    ]
    for (workload, profile), starts in found.items():
        base = [each.seconds for each in starts[first]]
        for name, taken in starts.items():
            lines.append(f"{workload:<10}{profile:<8}{name:<14}" + _figures(taken, base))
    return "\n".join(lines)


def _figures(taken: Sequence[Started], base: Sequence[float]) -> str:
    seconds = statistics.median(each.seconds for each in taken)
    pairs = zip(taken, base, strict=True)
    ratio = statistics.median(each.seconds / other for each, other in pairs)
    crossed = statistics.median(each.crossed for each in taken)
    return f"{seconds:>8.2f}{ratio:>12.2f}{crossed / 1e6:>8.2f}"


def arguments(name: str, description: str) -> argparse.Namespace:
    """What a benchmark of this kind is asked for on the command line."""
    parser = argparse.ArgumentParser(
        prog=f"scripts/bench {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="starts of each choice (5)")
    add("--workload", action="append", choices=list(WORKLOADS), help="one or several; default all")
    add("--profile", action="append", choices=list(PROFILES), help="Mbit/s; default 20")
    add("--json", action="store_true", help="print JSON, in seconds and bytes")
    add("--work", type=Path, default=default_work(), help=argparse.SUPPRESS)
    return parser.parse_args()
