"""Spans for OpenTelemetry, where they are asked for. Without that nothing of it is imported."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import trio

from fusesnap.errors import InvalidConfiguration
from fusesnap.fetch.events import FetchEvent
from fusesnap.filesystem.wait_events import WaitEvent

# Seconds for the last spans to be sent, when the process ends.
FAREWELL = 2.0


class Spans(Protocol):
    """Makes spans of events and calls. It must not wait."""

    def fetch(self, event: FetchEvent) -> None:
        """See ``ObserveFetch``."""
        ...

    def wait(self, event: WaitEvent) -> None:
        """See ``ObserveWait``."""
        ...

    def call(self, name: str, /, **attributes: str) -> AbstractContextManager[object]:
        """A span for the time of the block; what the block leads to in this task is below it."""
        ...

    def close(self) -> None:
        """Send what is left; blocking, and perhaps for long."""
        ...


class NoSpans:
    """Nobody wants any."""

    def fetch(self, event: FetchEvent) -> None:
        """See ``Spans``."""

    def wait(self, event: WaitEvent) -> None:
        """See ``Spans``."""

    def call(self, name: str, /, **attributes: str) -> AbstractContextManager[object]:
        """See ``Spans``."""
        return nullcontext()

    def close(self) -> None:
        """See ``Spans``."""


def open_spans(endpoint: str | None, process: str) -> Spans:
    """Spans that go to an OTLP receiver at ``endpoint``, as ``process``; none without one.

    Raises ``InvalidConfiguration`` where what they need is not installed.
    """
    if endpoint is None:
        return NoSpans()
    try:
        from fusesnap.daemon.telemetry.exported_spans import exported_spans  # noqa: PLC0415
    except ImportError as error:
        raise InvalidConfiguration(
            f"spans = {endpoint!r}: {error.name} is not installed: pip install 'fusesnap[otel]'"
        ) from error
    return exported_spans(endpoint, process)


async def close_spans(spans: Spans) -> None:
    """Send what is left, but do not wait for a receiver that does not answer."""
    with trio.move_on_after(FAREWELL, shield=True):
        await trio.to_thread.run_sync(spans.close, abandon_on_cancel=True)
