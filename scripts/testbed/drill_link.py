"""The link to the cache goes down under running containers, and comes back."""

from __future__ import annotations

import time
from collections.abc import Sequence

from testbed.drill_bed import DrillBed, Line, Materials, Readers, wait_for
from testbed.drill_outcome import Outcome
from testbed.drills import in_mode, under_readers

# Of what crosses the link beside NARs: narinfos, and the heads of requests and answers.
BESIDE = 400_000  # bytes
# What was under way when a connection broke crosses again.
AGAIN = 1.1
MANNERS = ("silence", "cut")


def link_outage(
    materials: Materials, seconds: Sequence[float], *, seed: int, line: Line, relay: str = ""
) -> Outcome:
    """The link is silent, and then cut, for each of ``seconds``: who waits goes on, and nothing crosses twice."""
    outcome = Outcome(
        f"link down for {', '.join(f'{each:g}' for each in seconds)} s{in_mode(relay)}", seed
    )
    outages = [(manner, each) for each in seconds for manner in MANNERS]
    left = iter(outages)

    def go_down(bed: DrillBed, group: Readers) -> None:
        manner, down_for = next(left)
        began = time.monotonic()
        getattr(bed.link, manner)()
        wait_for(lambda: group.through or bed.daemon.status()["waiting"], "a reader that waits")
        time.sleep(max(0.0, began + down_for - time.monotonic()))
        bed.link.mend()
        group.wait_for_progress()
        if bed.daemon.status()["errors"]:
            outcome.wrong.append(f"errors after {manner}: {bed.daemon.status()['errors']}")
        outcome.wrong += crossed_twice(bed)

    return under_readers(outcome, materials, len(outages), go_down, line=line, relay=relay)


def crossed_twice(bed: DrillBed) -> list[str]:
    """Whether far more bytes have crossed than are here or on their way."""
    crossed = bed.link.down()  # first: what crosses meanwhile is not to count
    paths = bed.materials.many.closure.paths
    committed = [path for path in paths if (bed.daemon.state / store_name(path)).exists()]
    sizes = bed.materials.files.compressed_size(committed)
    under_way = sum(each["received"] for each in bed.daemon.status()["fetching"])
    most = (sizes + under_way) * AGAIN + BESIDE
    if crossed <= most:
        return []
    return [f"{crossed} bytes have crossed the link, at most {most:.0f} were to be expected"]


def store_name(path: str) -> str:
    """Where a store path is in the state directory."""
    return f"layer/.fusesnap-store/{path.rpartition('/')[2]}"
