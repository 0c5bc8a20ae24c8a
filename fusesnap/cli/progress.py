"""What a person sees of long work: bars and a live line on a terminal, plain lines or nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
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

from fusesnap.fetch.flight import FlightState


class LiveLine:
    """One line that says what is being fetched and for whom, redrawn in place; nothing where nobody watches."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = Live("", console=self._console, transient=True, auto_refresh=False)

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
                Text("  ".join(describe(flight) for flight in flights[:3])), refresh=True
            )


def describe(flight: FlightState) -> str:
    """One fetch in a few words."""
    readers = ", ".join(f"{reader.command} ({reader.pid})" for reader in flight.readers[:2])
    percent = f" {100 * flight.received // flight.expected}%" if flight.expected else ""
    return f"fetching {flight.path.name}{percent}" + (f" for {readers}" if readers else "")


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
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            transient=False,
        )

    def update(self, description: str, done: int, total: int) -> None:
        """``done`` of ``total`` bytes of NARs are committed or on their way."""
        self._bar.update(self._task, description=description, completed=done, total=total)


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
