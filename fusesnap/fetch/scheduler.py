"""Which transfers run: a state machine that moves no bytes and has no clock of its own.

It is told what is wanted, what came and how late it is, and decides what starts, what pauses and what goes on.

The more urgent goes first, strictly; what is less urgent gets what the more urgent leave. A *reader* never waits for
anything but other readers, and has the link for itself from the moment it asks: what is less urgent pauses at once, and
goes on when the last of the reader's bytes are on their way.

Among its like the next transfer begins before the last has ended: as soon as less than ``window`` bytes are
outstanding, twice those that come during the time that a request takes (measured rate times measured round trip). One
large transfer fills that, and so do many small ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from fusesnap.fetch.gauge import Lately, Rate, RoundTrip, Width
from fusesnap.fetch.priority import Priority

# Bytes that may be outstanding as long as nothing has been measured, and at least.
FIRST_WINDOW: Final = 256 * 1024
LEAST_WINDOW: Final = 64 * 1024
# Bytes of which it is sooner to let them come than to ask for them again.
HARDLY_ANYTHING: Final = 16 * 1024
# Bytes from which on a transfer may cost the memory of a decompressor: of those fewer run at once.
LARGE: Final = 1 << 20
# Seconds without a reader before what nobody waits for is begun: a start reads, thinks, and reads again, and each pause
# costs what was on its way. Much longer, and the link is idle while containers are created.
QUIET: Final = 0.25
# The same where the link carries so many bytes a second, or, as long as that is not known, where answers come within so
# many seconds: there a start thinks for longer than it waits, and whoever unpacks would have the processors that it
# thinks with.
FAST: Final = 12_500_000
NEAR: Final = 0.015
LONG_QUIET: Final = 2.0
# Seconds in which a transfer shows what it can do; less than this share of the link, and others may run beside it.
TRIAL: Final = 2.0
LEAST_SHARE: Final = 0.25
# How much of what was known of a load's waiting each new piece replaces.
FORGETS: Final = 0.1
# Seconds after which whoever got nothing gets a turn, and seconds that such a turn lasts.
STARVED: Final = 60.0
TURN: Final = 5.0
# Seconds after which time alone may have changed what should run.
LOOK_AGAIN: Final = 0.25

_ONLY_WHEN_QUIET: Final = frozenset({Priority.COMPLETION, Priority.PREFETCH})


class LoadState(Enum):
    """``WAITING``: it has not begun. ``PAUSED``: it has begun, and more urgent ones have the link."""

    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """``transfers``: at once, of all caches. ``connections``: at once, of one cache, and as many that are held."""

    transfers: int = 32
    connections: int = 16

    @property
    def large(self) -> int:
        """Large transfers at once."""
        return max(1, self.transfers // 4)


@dataclass(slots=True, eq=False)
class Load:
    """Something to be transferred from ``source``, a cache's URL: ``remaining`` bytes, if it is known how many.

    ``modest``: it is small, and others may use the link while it waits for its first byte. ``beside``: it is small, and
    what it would interrupt is a stream that its reader needs as much, so it interrupts nothing. ``foreseen``: a trace
    or a bundle says that a start reads it. ``holds``: while it is paused its connection stays, because its cache cannot
    send the rest alone.
    """

    priority: Priority
    source: str
    remaining: int | None
    modest: bool = False
    beside: bool = False
    foreseen: bool = False
    number: int = 0
    state: LoadState = LoadState.WAITING
    holds: bool = False
    asked: float | None = None  # when a request was sent of which nothing came yet
    resumed: float = -math.inf
    flows: bool = False  # something came since it was resumed
    flows_since: float = math.inf  # when the first of that came
    waited: float = 0.0  # seconds of late that it waited for the link
    worked: float = 0.0  # and for whoever takes its bytes
    waits_since: float | None = None  # for the next piece
    lately: Lately | None = None

    @property
    def is_hungry(self) -> bool:
        """Whether it is the link that limits it, and not who takes its bytes."""
        return self.waited >= self.worked

    @property
    def large(self) -> bool:
        """Whether what remains is much, as far as it is known."""
        return self.remaining is None or self.remaining > LARGE


class Scheduler:
    """The loads of one node."""

    def __init__(self, limits: LinkLimits) -> None:
        self._limits = limits
        self._loads: dict[Load, None] = {}
        self._added = 0
        self._rate = Rate()
        self._round_trips: dict[str, RoundTrip] = {}
        self._width = Width(limits.large)
        self._received = 0
        self._quiet_from = -math.inf
        self._served: dict[Priority, float] = {}
        self._favoured: tuple[Load, float] | None = None

    # ------------------------------------------------------------------ told

    def add(self, load: Load) -> None:
        """``load`` is wanted."""
        load.number = self._added
        self._added += 1
        self._loads[load] = None

    def remove(self, load: Load) -> None:
        """Everything of ``load`` came, or nothing more is wanted of it."""
        self._loads.pop(load, None)

    def asked(self, load: Load, now: float) -> None:
        """A request for ``load`` is being sent."""
        load.asked = now

    def received(self, load: Load, count: int, now: float) -> None:
        """``count`` bytes of ``load`` came."""
        if load.asked is not None:
            self._round_trips.setdefault(load.source, RoundTrip()).took(now - load.asked)
            load.asked = None
        if not load.flows:
            load.flows, load.flows_since = True, now
        if load.remaining is not None:
            load.remaining = max(0, load.remaining - count)
        if load.lately is not None:
            load.lately.received(count, now)
        flowing = (each.flows_since for each in self._loads if each.flows and each.is_hungry)
        self._rate.received(count, now, min(flowing, default=now))
        self._received += count

    def fed(self, load: Load, waited: float, worked: float) -> None:
        """A piece of ``load`` was so many seconds waited for, and so many worked on."""
        load.waited += waited - FORGETS * load.waited
        load.worked += worked - FORGETS * load.worked

    # --------------------------------------------------------------- decides

    def decide(self, now: float) -> list[Load]:
        """Let run what should run from ``now`` on; returns the loads whose state is another than before."""
        self._keep_quiet(now)
        order = sorted(self._loads, key=lambda load: (load.priority, load.number))
        self._favour(order, now)
        chosen = self._choose(order, now)
        changed = []
        for load in order:
            if load in chosen and load.state is not LoadState.RUNNING:
                load.state, load.resumed, load.asked = LoadState.RUNNING, now, None
                load.flows, load.lately = False, Lately(now)
                changed.append(load)
            elif load not in chosen and load.state is LoadState.RUNNING:
                load.state, load.flows, load.lately = LoadState.PAUSED, False, None
                changed.append(load)
        return changed

    def _keep_quiet(self, now: float) -> None:
        """A start may go on reading: what nobody waits for is to wait a little longer."""
        # Over a fast link what a trace or a bundle brings is here before anybody reads it.
        fast = self._is_fast
        keeps, quiet = (Priority.TRACE, LONG_QUIET) if fast else (Priority.READER, QUIET)
        urgent = [each for each in self._loads if self._is_urgent_with_the_link(each, now)]
        if any(load.priority <= keeps for load in urgent):
            self._quiet_from = max(self._quiet_from, now + quiet)
        if any(load.foreseen for load in urgent):
            self._quiet_from = max(self._quiet_from, now + LONG_QUIET)

    def looks_again(self) -> float | None:
        """Seconds after which to decide again although nothing happened; ``None`` if nothing can change by that."""
        waits = any(load.state is not LoadState.RUNNING for load in self._loads)
        return LOOK_AGAIN if waits else None

    def window(self, source: str) -> float:
        """Bytes that may be outstanding before another transfer from ``source`` begins."""
        return max(LEAST_WINDOW, 2 * self._underway(source))

    @property
    def rate(self) -> float:
        """Bytes a second that the link has carried of late, at most; 0 as long as nothing is known."""
        return self._rate.value

    def round_trip(self, source: str) -> float:
        """Seconds that a request to ``source`` takes at least; 0 as long as nothing is known."""
        measured = self._round_trips.get(source)
        return measured.value if measured is not None else 0.0

    # --------------------------------------------------------------- private

    def _choose(self, order: Iterable[Load], now: float) -> set[Load]:
        chosen = _Chosen(self._limits, (load for load in self._loads if load.holds))
        for load in order:
            if load.state is LoadState.RUNNING and self._nearly_done(load):
                chosen.take(load, self._share(load, now))
        crowded = False
        for load in order:
            if load not in chosen.loads and chosen.has_room(load):
                if self._may_run(load, chosen, now):
                    chosen.take(load, self._share(load, now))
                else:
                    crowded = crowded or self._is_only_crowded(load, chosen, now)
        self._width.look(now, self._received, limits=crowded)
        return chosen.loads

    def _may_run(self, load: Load, chosen: _Chosen, now: float) -> bool:
        if load.priority is Priority.READER or self._is_favoured(load):
            return True
        if self._must_be_quiet(load, now):
            return False
        # What runs already is stopped for the more urgent only, never for its like.
        if load.state is LoadState.RUNNING:
            return not chosen.is_pressed(load)
        return not chosen.is_claimed(load) and (
            chosen.outstanding < self.window(load.source) or chosen.using < self._width.value
        )

    def _is_only_crowded(self, load: Load, chosen: _Chosen, now: float) -> bool:
        """Whether ``load`` is kept out by nothing but its like, which fill the window."""
        return not self._must_be_quiet(load, now) and not chosen.is_claimed(load)

    @property
    def _is_fast(self) -> bool:
        if self._rate.value:
            return self._rate.value >= FAST
        known = [each.value for each in self._round_trips.values() if each.value]
        return bool(known) and min(known) <= NEAR

    def _must_be_quiet(self, load: Load, now: float) -> bool:
        return load.priority in _ONLY_WHEN_QUIET and now < self._quiet_from

    def _is_urgent_with_the_link(self, load: Load, now: float) -> bool:
        """A reader whose cache is silent leaves the link to others: it may be so for minutes."""
        return load.priority <= Priority.TRACE and not self._is_held_back(load, now)

    def _share(self, load: Load, now: float) -> _Share:
        used = not self._is_held_back(load, now)
        remaining = math.inf if load.remaining is None else load.remaining
        return _Share(
            is_used=used,
            is_claimed=used and not load.beside and not self._lets_others(load),
            # A reader has the link from the moment it asks. What others ask for takes a round trip to come, in which
            # whatever would be stopped for it has the link.
            is_pressing=load.flows or load.priority is Priority.READER,
            outstanding=remaining if used and load.is_hungry else 0.0,
        )

    def _lets_others(self, load: Load) -> bool:
        """Whether others may use the link beside it."""
        return (load.flows or load.modest) and self._nearly_done(load)

    def _is_held_back(self, load: Load, now: float) -> bool:
        """Whether it is the server that limits it, so that the link would be idle if it were alone."""
        if load.lately is None or now - load.resumed < TRIAL:
            return False
        if load.waits_since is not None and now - load.waits_since > TRIAL:
            return True  # it is silent
        if not load.is_hungry:
            return False
        return load.lately.rate(now) <= LEAST_SHARE * self._rate.value

    def _nearly_done(self, load: Load) -> bool:
        """Whether what remains is on its way already: to stop it would be to send it twice.

        Of what has just been asked for nothing came yet, but will: so twice as much is let come.
        """
        underway = self._underway(load.source) * (1 if load.flows else 2)
        return load.remaining is not None and load.remaining <= max(HARDLY_ANYTHING, underway)

    def _underway(self, source: str) -> float:
        """Bandwidth times delay: what is on its way, or will be once it is asked for."""
        return self._rate.value * self.round_trip(source) or FIRST_WINDOW / 2

    def _favour(self, order: Iterable[Load], now: float) -> None:
        """Give a turn to the first of a kind that got nothing for long."""
        kinds = {load.priority for load in order}
        running = {load.priority for load in order if load.state is LoadState.RUNNING}
        self._served = {
            kind: now if kind in running else self._served.get(kind, now) for kind in kinds
        }
        if self._favoured is not None:
            load, until = self._favoured
            if load in self._loads and now < until:
                return
            self._favoured = None
        for load in order:
            if now - self._served[load.priority] >= STARVED:
                self._favoured = load, now + TURN
                return

    def _is_favoured(self, load: Load) -> bool:
        return self._favoured is not None and self._favoured[0] is load


@dataclass(frozen=True, slots=True)
class _Share:
    """What a load has of the link.

    ``is_used``: its bytes come. ``is_claimed``: more of them come than are on their way by now; ``is_pressing``: and
    what runs is stopped for them. ``outstanding``: how many will come before there is room for its like, which is at
    once where they are not taken as fast as they come.
    """

    is_used: bool
    is_claimed: bool
    is_pressing: bool
    outstanding: float


class _Chosen:
    """Those that are to run, as they are chosen, and how much of the limits and of the link they take."""

    def __init__(self, limits: LinkLimits, held: Iterable[Load]) -> None:
        self.loads: set[Load] = set()
        self.outstanding = 0.0
        self.using = 0
        self._limits = limits
        self._large = 0
        self._claimed_by: set[Priority] = set()
        self._pressed_by: set[Priority] = set()
        self._used_by: set[Priority] = set()
        self._held = set(held)
        self._connections: Counter[str] = Counter()
        self._held_connections = Counter(load.source for load in self._held)

    def has_room(self, load: Load) -> bool:
        limits, taken = self._limits, self._connections[load.source]
        if load.priority is not Priority.READER:  # whom what is held must not keep out
            taken += self._held_connections[load.source]
        return (
            (load in self._held or taken < limits.connections)
            and len(self.loads) < limits.transfers
            and not (load.large and self._large >= limits.large)
        )

    def take(self, load: Load, share: _Share) -> None:
        self.loads.add(load)
        self._large += load.large
        if load not in self._held:
            self._connections[load.source] += 1
        self.using += share.outstanding > 0
        self.outstanding += share.outstanding
        if share.is_claimed:
            self._claimed_by.add(load.priority)
            if share.is_pressing:
                self._pressed_by.add(load.priority)
        if share.is_used:
            self._used_by.add(load.priority)

    def is_pressed(self, load: Load) -> bool:
        """Whether something that is more urgent has ``load``, which runs, stopped."""
        return any(each < load.priority for each in self._pressed_by)

    def is_claimed(self, load: Load) -> bool:
        """Whether the link belongs to something that is more urgent than ``load``.

        What is held goes on without a round trip: it begins when the link is free, not when it is about to be.
        """
        taken = self._used_by if load.holds else self._claimed_by
        return any(each < load.priority for each in taken)
