"""Lets a person see what is being fetched."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from fusesnap.daemon.build import Node
from fusesnap.daemon.status import waits_for
from fusesnap.errors import FusesnapError
from fusesnap.fetch.flight import FlightState

# How often the line on a terminal is drawn anew, in seconds.
TICK = 0.2

Watch = Callable[[Sequence[FlightState]], None]


async def draw(node: Node, watch: Watch) -> None:
    """Let a person see what is being fetched, until cancelled."""
    while True:
        watch(node.realiser.flights())
        await trio.sleep(TICK)


@asynccontextmanager
async def meanwhile(
    function: Callable[..., Awaitable[object]], *arguments: object
) -> AsyncIterator[None]:
    """Run ``function`` until the block is left. An error that a person can be told about comes out as it is."""
    told: FusesnapError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(function, *arguments)
        try:
            yield
        except FusesnapError as error:
            told = error
        nursery.cancel_scope.cancel()
    if told is not None:
        raise told


# What each state is called where several paths are counted, in the order in which they are told.
WORDS = {
    "transfer": "coming",
    "verify": "being verified",
    "narinfo": "being asked for",
    "turn": "in line",
    "pause": "paused",
}


def summary(flights: Sequence[FlightState]) -> str:
    """All transfers in a few words: what comes, and what waits for what."""
    counts = Counter(map(waits_for, flights))
    said = [f"{counts[state]} {word}" for state, word in WORDS.items() if counts[state]]
    coming = [flight.path.name for flight in flights if waits_for(flight) == "transfer"]
    return ", ".join(said) + (f": {coming[0]}" if coming else "") or "looking at what is here"


def share_of(flight: FlightState) -> float:
    """How much of a path is here, from 0 to 1; 0 where its size is not known."""
    return min(1.0, flight.received / flight.expected) if flight.expected else 0.0
