"""Spans by OpenTelemetry's SDK: calls of containerd's, and each fetch, ``realise``, with ``transfer`` and ``commit``.

The only module that imports it, and imported only where spans are asked for: the extra ``otel``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.metadata import version

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, StatusCode, set_span_in_context

from fusesnap.fetch.events import (
    Asked,
    FetchEvent,
    InLine,
    Landed,
    Part,
    Paused,
    Received,
    Resumed,
    TransferBegun,
    Verifying,
)
from fusesnap.filesystem.wait_events import Blocked, WaitEvent

EVENTS = {InLine: "others are before it", Paused: "paused", Resumed: "resumed"}
TRACES = "/v1/traces"  # where a receiver of OTLP over HTTP takes spans


class _Fetch:
    """A path that is under way. ``step`` is its transfer or its commit, ``received`` what came of that transfer."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self.step: Span | None = None
        self.received = 0

    def end_step(self) -> None:
        """Its transfer or its commit is over."""
        if self.step is not None:
            if self.received:
                self.step.set_attribute("fusesnap.bytes", self.received)
            self.step.end()
        self.step, self.received = None, 0


class ExportedSpans:
    """Makes spans in ``provider``. See ``Spans``."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("fusesnap", version("fusesnap"))
        self._fetches: dict[tuple[str, Part | None], _Fetch] = {}

    def fetch(self, event: FetchEvent) -> None:
        """See ``Spans``. A fetch is below the call that asked for it, if one did."""
        which = event.path.base_name, event.part
        if isinstance(event, Asked):
            attributes = {
                "fusesnap.path": event.path.base_name,
                "fusesnap.reason": event.priority.name.lower(),
            }
            if event.part is not None:
                attributes["fusesnap.part"] = f"{event.part[0]}-{event.part[1]}"
            self._fetches[which] = _Fetch(self._tracer.start_span("realise", attributes=attributes))
            return
        fetch = self._fetches.get(which)
        if fetch is None:
            return  # an observer must not fail, whatever it is told
        match event:
            case InLine() | Paused() | Resumed():
                fetch.span.add_event(EVENTS[type(event)])
            case TransferBegun(_, cache, _, kept):
                fetch.end_step()
                self._begin(fetch, "transfer", {"fusesnap.cache": cache, "fusesnap.kept": kept})
            case Received(_, _, count):
                fetch.received += count
            case Verifying():
                fetch.end_step()
                self._begin(fetch, "commit", {})
            case Landed(_, error):
                self._end(fetch, error)
                del self._fetches[which]

    def _begin(self, fetch: _Fetch, name: str, attributes: Mapping[str, str | int]) -> None:
        above = set_span_in_context(fetch.span)
        fetch.step = self._tracer.start_span(name, above, attributes=dict(attributes))

    def _end(self, fetch: _Fetch, error: Exception | None) -> None:
        if error is not None:
            for span in (fetch.step, fetch.span):
                if span is not None:
                    span.set_status(StatusCode.ERROR, str(error))
        fetch.end_step()
        fetch.span.end()

    def wait(self, event: WaitEvent) -> None:
        """See ``Spans``. That a reader waits is an event of the span of what it waits for."""
        if not isinstance(event, Blocked):
            return
        path = event.question.path.base_name
        for fetch in [each for (name, _), each in self._fetches.items() if name == path]:
            reader = event.readers[-1].command if event.readers else ""
            attributes = {"fusesnap.operation": event.question.operation, "fusesnap.reader": reader}
            fetch.span.add_event("a reader waits", attributes)

    def call(self, name: str, /, **attributes: str) -> AbstractContextManager[object]:
        """See ``Spans``."""
        named = {f"fusesnap.{word}": value for word, value in attributes.items()}
        return self._tracer.start_as_current_span(name, attributes=named)

    def close(self) -> None:
        """See ``Spans``."""
        self._provider.shutdown()


def exported_spans(endpoint: str, process: str) -> ExportedSpans:
    """Spans that go to the receiver at ``endpoint``, many at a time, from a thread of the SDK's.

    What else may be set, headers, sampling, the resource's attributes, is read by the SDK from its own variables of the
    environment (OTEL_EXPORTER_OTLP_HEADERS, OTEL_TRACES_SAMPLER, OTEL_RESOURCE_ATTRIBUTES).
    """
    resource = Resource.create(
        {
            "service.name": "fusesnap",
            "service.version": version("fusesnap"),
            "fusesnap.process": process,
        }
    )
    # What is still under way when the process ends is sent by `close`, in its own time.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + TRACES)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return ExportedSpans(provider)
