"""The drills: what dies, stops or is replaced under a running container, and what its readers notice of it.

Each drill returns an :class:`Outcome` and raises nothing for what it is about: a read that failed, a byte that differs
and a reader that hangs are lines of ``wrong``.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from testbed.drill_bed import (
    WATCHDOG,
    DrillBed,
    Line,
    Materials,
    Readers,
    drill_bed,
    kill,
    next_part,
    readers,
    wait_for,
)
from testbed.drill_closure import DrillClosure
from testbed.drill_outcome import FIRST_ACCESS, INTERRUPTION, Outcome
from testbed.drill_reader import PROBES
from testbed.processes import CommandFailed
from testbed.workplace import processes_naming, run_directory

# A probe makes some hundred accesses a second: those that begin before or up to so many seconds after an event met it.
MET = 0.05
SHORT_WATCHDOG = 2.0  # seconds
EARLY = 0.1  # the share of kills that do not wait for the last worker's successor to serve


@dataclass(slots=True)
class Events:
    """When something was done to a part of ours."""

    times: list[float] = field(default_factory=list)

    def now(self) -> None:
        self.times.append(time.monotonic())


@contextlib.contextmanager
def observed(
    outcome: Outcome, bed: DrillBed, closure: DrillClosure, reference: str, name: str, seed: int
) -> Iterator[tuple[Readers, Events]]:
    """A container with readers; what they notice of the events goes into ``outcome``."""
    events = Events()
    with (
        bed.container(reference, name) as container,
        readers(bed, closure, container, seed) as group,
    ):
        try:
            yield group, events
        except CommandFailed as failure:
            outcome.wrong.append(str(failure))
        outcome.wrong += group.stop()
        account(outcome, group, events)


def account(outcome: Outcome, group: Readers, events: Events) -> None:
    """Put what the readers noted into the outcome."""
    accesses = group.accesses()
    outcome.accesses += sum(group.counts())
    outcome.events += len(events.times)
    outcome.wrong += [
        f"{each.role} {each.what} {each.path}: {each.error}" for each in accesses if each.error
    ]
    outcome.add(FIRST_ACCESS, (each.end - each.start for each in accesses if each.what == "first"))
    probes = [each for each in accesses if each.role in PROBES]
    for event in events.times:
        waits = (
            each.end - max(each.start, event)
            for each in probes
            if each.start < event + MET and each.end > event
        )
        outcome.add(INTERRUPTION, [max(waits, default=0.0)])


# ----------------------------------------------------------------------------------- the worker


def kill_worker(
    materials: Materials, kills: int, *, seed: int, line: Line, relay: str = "", pause: float = 0.3
) -> Outcome:
    """SIGKILL to the worker at random moments: no read fails, no byte differs, nobody hangs.

    After a kill and the recovery from it the next comes within ``pause`` seconds, one in ten without that recovery.
    When everything has been read the drill goes on with a fresh container on a fresh state directory.
    """
    outcome = Outcome(f"kill -9 of the worker{in_mode(relay)}", seed)
    chance = random.Random(seed)  # noqa: S311

    def after(bed: DrillBed, group: Readers) -> None:
        if chance.random() > EARLY:
            wait_for_recovery(group)

    drill = Kills(outcome, materials, materials.many, chance, pause, after, orphans)
    drill.run(kills, line, relay)
    return outcome


def in_mode(relay: str) -> str:
    """How a drill's name says which mode it ran in."""
    return f", relay {relay}" if relay else ""


@dataclass(slots=True)
class Kills:
    """SIGKILL to the worker again and again while readers read a closure for the first time.

    ``after`` is called after each kill, ``finish`` at the end of a round; what it returns is wrong.
    """

    outcome: Outcome
    materials: Materials
    closure: DrillClosure
    chance: random.Random
    pause: float
    after: Callable[[DrillBed, Readers], None]
    finish: Callable[[DrillBed, Readers], list[str]]

    def run(self, kills: int, line: Line, relay: str = "") -> None:
        """Until so many kills are done, or something is wrong; each round on a fresh state directory."""
        outcome = self.outcome
        while outcome.events < kills and not outcome.wrong:
            with (
                run_directory("fd-") as work,
                drill_bed(self.materials, work, line=line, relay=relay) as bed,
                observed(
                    outcome,
                    bed,
                    self.closure,
                    bed.image(self.closure),
                    "one",
                    outcome.seed + outcome.events,
                ) as (group, events),
            ):
                self._round(bed, group, events, kills - outcome.events)

    def _round(self, bed: DrillBed, group: Readers, events: Events, kills: int) -> None:
        pid: int | None = None
        while len(events.times) < kills and not (group.through and events.times):
            pid = next_part(bed.daemon.service.pid, "worker", pid)
            time.sleep(self.chance.uniform(0, self.pause))
            events.now()
            kill(pid)
            self.after(bed, group)
        group.wait_for_progress()
        self.outcome.wrong += self.finish(bed, group)


def wait_for_recovery(group: Readers) -> None:
    """Wait until every probe has ended an access that it began after now, and nobody died."""
    before = group.probes()

    def recovered() -> bool:
        return bool(group.dead()) or all(
            now > then + 1 for now, then in zip(group.probes(), before, strict=True)
        )

    wait_for(recovered, f"recovery of the readers ({group})")


def orphans(bed: DrillBed, group: Readers) -> list[str]:
    """Processes of workers that are gone: all of ours are descendants of the supervisor."""
    supervisor = bed.daemon.service.pid

    def stray() -> list[str]:
        return [
            f"left running by a dead worker: {pid} {command[:120]}"
            for pid, command in processes_naming(bed.daemon.state).items()
            if "fusesnap.daemon" in command and not descends(pid, supervisor)
        ]

    with contextlib.suppress(CommandFailed):
        wait_for(lambda: not stray(), "the end of orphans", timeout=10)
    return stray()


def descends(pid: int, ancestor: int) -> bool:
    """Whether a process is gone or has ``ancestor`` above it."""
    while pid not in (0, 1, ancestor):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return True
        pid = int(stat.rpartition(")")[2].split()[1])
    return pid == ancestor


def stop_worker(
    materials: Materials, times: int, *, seed: int, line: Line, relay: str = ""
) -> Outcome:
    """SIGSTOP to the worker: its watchdog replaces it, and readers go on."""
    outcome = Outcome(f"SIGSTOP of the worker{in_mode(relay)}", seed)

    def stop(bed: DrillBed, group: Readers) -> None:
        supervisor = bed.daemon.service.pid
        pid = next_part(supervisor, "worker", None)
        kill(pid, signal.SIGSTOP)
        next_part(supervisor, "worker", pid)

    return under_readers(
        outcome, materials, times, stop, line=line, relay=relay, watchdog=SHORT_WATCHDOG
    )


def reload(
    materials: Materials,
    times: int,
    *,
    seed: int,
    line: Line,
    relay: str = "",
) -> Outcome:
    """A live upgrade: the supervisor is told to hand over to newly started processes, and nobody notices."""
    outcome = Outcome(f"reload{in_mode(relay)}", seed)

    def hand_over(bed: DrillBed, group: Readers) -> None:
        supervisor = bed.daemon.service.pid
        before = {name: next_part(supervisor, name, None) for name in ("worker", "services")}
        kill(supervisor, signal.SIGHUP)
        for name, pid in before.items():
            next_part(supervisor, name, pid)
        # A reload that comes while one is under way may be the same reload.
        wait_for(lambda: not any(alive(pid) for pid in before.values()), "the end of the old ones")
        bed.daemon.service.wait_until(lambda: answers(bed), timeout=60)

    return under_readers(outcome, materials, times, hand_over, line=line, relay=relay)


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def answers(bed: DrillBed) -> bool:
    """Whether the daemon says its status."""
    with contextlib.suppress(CommandFailed):
        return bool(bed.daemon.status())
    return False


def under_readers(
    outcome: Outcome,
    materials: Materials,
    times: int,
    event: Callable[[DrillBed, Readers], None],
    *,
    line: Line,
    relay: str = "",
    watchdog: float = WATCHDOG,
) -> Outcome:
    """Do something ``times`` times under readers, who must not notice it."""
    chance = random.Random(outcome.seed)  # noqa: S311
    with (
        run_directory("fd-") as work,
        drill_bed(materials, work, line=line, relay=relay, watchdog=watchdog) as bed,
        observed(outcome, bed, materials.many, bed.image(materials.many), "one", outcome.seed) as (
            group,
            events,
        ),
    ):
        for _ in range(times):
            time.sleep(chance.uniform(0, 0.3))
            events.now()
            event(bed, group)
            wait_for_recovery(group)
        group.wait_for_progress()
        outcome.wrong += orphans(bed, group)
    return outcome


# ------------------------------------------------------------------------------------ containerd


def restart_containerd(materials: Materials, times: int, *, seed: int, line: Line) -> Outcome:
    """containerd is killed and started again: running containers and snapshots are unaffected."""
    outcome = Outcome("kill -9 and restart of containerd", seed)
    listings = (("snapshots", "--snapshotter", "fusesnap", "ls"), ("tasks", "ls"))

    def restart(bed: DrillBed, group: Readers) -> None:
        before = [bed.containerd.ctr(*words) for words in listings]
        bed.restart_containerd()
        after = [bed.containerd.ctr(*words) for words in listings]
        if after != before:
            outcome.wrong.append(f"before the restart: {before}, after it: {after}")
        if bed.containerd.run(bed.references[0], "other", "/bin/echo", "new") != "new\n":
            outcome.wrong.append("a new container says something else than it was told to")

    return under_readers(outcome, materials, times, restart, line=line)
