"""What a person sees of long work: bars and a live line on a terminal, plain lines or nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from fusesnap.cli.status import size
from fusesnap.daemon.status import waits_for
from fusesnap.fetch.flight import FlightState

SHOWN = 3  # fetches in one line
BAR_WIDTH = 24  # of 80 columns: words follow
STATES = {
    "narinfo": "asking caches for it",
    "turn": "others are before it",
    "pause": "paused for others",
    "verify": "verifying",
}


class LiveLine:
    """One line that says what is being fetched and for whom, redrawn in place; nothing where nobody watches."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = Live(
            "",
            console=self._console,
            transient=True,
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),  # a script that reads it must get its lines
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def say(self, line: str) -> None:
        """A line that stays, on stdout, at once also where stdout is a pipe."""
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def update(self, flights: Sequence[FlightState]) -> None:
        """Draw this moment."""
        if self._console.is_terminal:
            self._live.update(
                Text(line_of(flights), no_wrap=True, overflow="ellipsis"), refresh=True
            )

    def end(self, received: Mapping[str, int]) -> None:
        """Say what came from each cache, to somebody who has watched."""
        if self._console.is_terminal and any(received.values()):
            came = ", ".join(
                f"{size(count)} from {url}" for url, count in received.items() if count
            )
            self._console.print(Text(f"fetched {came}"))


def line_of(flights: Sequence[FlightState]) -> str:
    """Who waits for what, or else what is fetched ahead."""
    waiting = [flight for flight in flights if flight.waiting]
    shown = (waiting or list(flights))[:SHOWN]
    more = len(flights) - len(shown)
    return "; ".join(map(describe, shown)) + (f"; {more} more" if more else "")


def describe(flight: FlightState) -> str:
    """One fetch in a few words."""
    readers = " and ".join(f"{reader.command} ({reader.pid})" for reader in flight.readers[:2])
    verb = "wait" if len(flight.readers) > 1 else "waits"
    what = f"{readers or 'somebody'} {verb} for" if flight.waiting else "fetching"
    return f"{what} {flight.path.name}: {how_far(flight)}"


def how_far(flight: FlightState) -> str:
    """How much of it is here, how fast it comes, and for how long it still will."""
    state = waits_for(flight)
    if state != "transfer":
        return STATES[state]
    if not flight.expected:
        return f"{size(flight.received)}, {size(round(flight.rate))}/s"
    left = flight.expected - flight.received
    remaining = f", {left / flight.rate:.0f} s left" if flight.rate > 0 else ""
    return f"{size(flight.received)} of {size(flight.expected)}, {size(round(flight.rate))}/s{remaining}"


class _Bar:
    """A bar that is shown for the time of a context, on a terminal; ``columns`` are what it shows."""

    def __init__(self, description: str, *columns: ProgressColumn, transient: bool) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            *columns, console=console, disable=not console.is_terminal, transient=transient
        )
        self._task = self._bar.add_task(description, total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()


class CollectProgress(_Bar):
    """A bar over what is to be freed."""

    def __init__(self) -> None:
        super().__init__("", TextColumn("freeing"), BarColumn(), DownloadColumn(), transient=True)

    def update(self, freed: int, total: int) -> None:
        """``freed`` of ``total`` bytes are free."""
        self._bar.update(self._task, completed=freed, total=total)


class FetchProgress(_Bar):
    """A bar over a whole closure."""

    def __init__(self) -> None:
        super().__init__(
            "asking for narinfos",
            BarColumn(BAR_WIDTH),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),  # the last: its length changes
            transient=True,
        )

    def update(self, description: str, done: int, total: int) -> None:
        """``done`` of ``total`` bytes are here, or sent; of 0 where it is not known yet how many there are."""
        self._bar.update(self._task, description=description, completed=done, total=total or None)


class PublishProgress(_Bar):
    """A bar over the NARs that are published or checked."""

    def __init__(self, what: str) -> None:
        super().__init__(
            what,
            TextColumn(what),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            transient=True,
        )

    def plan(self, total: int) -> None:
        """There are ``total`` bytes of NARs to do."""
        self._bar.update(self._task, total=total)

    def advance(self, name: str, size: int) -> None:
        """A path ``name`` with ``size`` bytes of NAR is done."""
        self._bar.update(self._task, advance=size, description=name)
