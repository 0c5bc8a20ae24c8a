"""Lets a person see what is being fetched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from fusesnap.daemon.build import Node
from fusesnap.fetch.flight import FlightState

# How often the line on a terminal is drawn anew, in seconds.
TICK = 0.2

Watch = Callable[[Sequence[FlightState]], None]


async def draw(node: Node, watch: Watch) -> None:
    """Let a person see what is being fetched, until cancelled."""
    while True:
        watch(node.realiser.flights())
        await trio.sleep(TICK)
