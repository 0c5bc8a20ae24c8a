"""What a path does from an event on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fusesnap.daemon.telemetry.records import Phase
from fusesnap.fetch.events import (
    Boarded,
    FetchEvent,
    InLine,
    Paused,
    Received,
    Resumed,
    TransferBegun,
    Verifying,
)

PHASES: Final[Mapping[type[FetchEvent], Phase]] = {
    Boarded: Phase.ASKING,
    InLine: Phase.QUEUED,
    TransferBegun: Phase.ASKING,
    Received: Phase.TRANSFER,
    Paused: Phase.PAUSED,
    Resumed: Phase.ASKING,
    Verifying: Phase.VERIFY,
}


def phase_after(event: FetchEvent, before: Phase) -> Phase:
    """What a path does after ``event``; what was under way when it was paused still comes, and it stays paused."""
    if isinstance(event, Received) and before is Phase.PAUSED:
        return before
    return PHASES.get(type(event), before)
