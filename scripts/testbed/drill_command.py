"""``scripts/drill``: the drills in their long form."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from testbed import drills
from testbed.drill_bed import FAST, Line, Materials, prepare_materials
from testbed.drill_commits import kill_in_commits
from testbed.drill_link import link_outage
from testbed.drill_metastore import kill_in_transactions
from testbed.drill_outage import outage
from testbed.drill_outcome import Outcome
from testbed.drill_services import kill_services
from testbed.workplace import default_work

Run = Callable[[], Outcome]
KILLS = {
    "worker": 1000,
    "stop": 20,
    "commit": 60,
    "reload": 20,
    "services": 30,
    "metastore": 200,
    "containerd": 10,
}
RELAY = "always"  # a value of the daemon's --relay
# On the slow link a fetch takes about half a second: some are to end between two kills.
SLOW_PAUSE = 1.5
RELAYED: Mapping[str, Callable[..., Outcome]] = {
    "worker": partial(drills.kill_worker, pause=SLOW_PAUSE),
    "stop": drills.stop_worker,
    "reload": drills.reload,
}
NAMES = (
    "worker",
    "stop",
    "commit",
    "reload",
    "services",
    "metastore",
    "all",
    "containerd",
    "outage",
)
OUTAGES = (1.0, 10.0, 60.0)  # seconds


def runs(
    name: str,
    materials: Materials,
    kills: int | None,
    seed: int,
    line: Line,
    seconds: Sequence[float],
) -> Iterator[Run]:
    """The drills of that name: those that differ in relay mode run in both modes."""
    many = kills or KILLS.get(name, 1)
    if name == "commit":  # its paths are small: on the slow link it would wait, not commit
        yield lambda: kill_in_commits(materials, many, seed=seed, line=FAST)
    elif name == "services":
        yield lambda: kill_services(materials, many, seed=seed, line=line)
    elif name == "metastore":
        yield lambda: kill_in_transactions(materials, many, seed=seed)
    elif name == "containerd":
        yield lambda: drills.restart_containerd(materials, many, seed=seed, line=line)
    elif name == "outage":
        yield lambda: link_outage(materials, seconds, seed=seed, line=line)
    elif name == "all":
        yield lambda: outage(materials, seed=seed, line=FAST)
    else:
        drill = RELAYED[name]
        yield lambda: drill(materials, many, seed=seed, line=line)
        yield lambda: drill(materials, many, seed=seed, line=line, relay=RELAY)


def main() -> int:
    """Run what the command line asks for; 1 if anything was wrong."""
    # What a drill has started ends with it, also when we are told to end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = _arguments()
    materials = prepare_materials(arguments.work)
    line = Line(arguments.rate * 1e6, arguments.round_trip / 1e3)
    wrong = 0
    for name in arguments.drills or NAMES:
        drills_of_name = runs(
            name, materials, arguments.kills, arguments.seed, line, arguments.seconds
        )
        for number, run in enumerate(drills_of_name):
            if arguments.relay is not None and number != (arguments.relay == RELAY):
                continue
            start = time.monotonic()
            outcome = run()
            print(*outcome.lines(), sep="\n")
            print(f"  took {time.monotonic() - start:.0f} s", flush=True)
            wrong += len(outcome.wrong)
    print("Nothing was wrong." if not wrong else f"{wrong} things were wrong.")
    return 1 if wrong else 0


def _arguments() -> argparse.Namespace:
    """The options that ``scripts/drill --help`` describes."""
    parser = argparse.ArgumentParser(prog="scripts/drill")
    parser.add_argument("drills", nargs="*", choices=[*NAMES, []], metavar="DRILL")
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seconds", type=float, nargs="+", default=OUTAGES)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=20)
    parser.add_argument("--round-trip", type=float, default=80)
    parser.add_argument("--relay", choices=["never", RELAY])
    parser.add_argument("--work", type=Path, default=default_work())
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
