"""Spans, into the SDK's own memory; and that nothing of it is there where nobody asked."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import cast

import pytest
import trio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from fusesnap.config import load
from fusesnap.daemon.telemetry.counting import Counters, Counting
from fusesnap.daemon.telemetry.exported_spans import ExportedSpans
from fusesnap.daemon.telemetry.keeper import Telemetry
from fusesnap.daemon.telemetry.recorder import Recorder
from fusesnap.daemon.telemetry.snapshots import ObservedSnapshots
from fusesnap.daemon.telemetry.spans import NoSpans, close_spans, open_spans
from fusesnap.errors import InvalidConfiguration, NotFound, Unavailable
from fusesnap.fetch.events import Asked, Boarded, InLine, Landed, Received, TransferBegun, Verifying
from fusesnap.fetch.flight import Reader
from fusesnap.fetch.priority import Priority
from fusesnap.filesystem.wait_events import Answered, Blocked, Question
from fusesnap.nix.store_path import StorePath
from fusesnap.snapshots.interface import Mount, Snapshots

PATH = StorePath("0" * 32, "redis")
CACHE = "http://cache"


class Bench:
    """Spans, and what came of them."""

    def __init__(self) -> None:
        self._memory = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._memory))
        self.spans = ExportedSpans(provider)

    def ended(self) -> list[ReadableSpan]:
        return list(self._memory.get_finished_spans())

    def fetch(self, error: Exception | None = None) -> None:
        self.spans.fetch(Asked(PATH, Priority.READER))
        question = Question("open", PATH, 1, pid=7)
        self.spans.wait(Blocked(1, question, (Reader(7, "redis-server"),)))
        self.spans.fetch(Boarded(PATH))
        self.spans.fetch(InLine(PATH))
        self.spans.fetch(TransferBegun(PATH, "http://bad", 30))
        self.spans.fetch(Received(PATH, "http://bad", 10))
        self.spans.fetch(TransferBegun(PATH, CACHE, 30, kept=10))
        self.spans.fetch(Received(PATH, CACHE, 20))
        if error is None:
            self.spans.fetch(Verifying(PATH))
        self.spans.fetch(Landed(PATH, error))
        self.spans.wait(Answered(1, error))


def attributes(span: ReadableSpan) -> Mapping[str, object]:
    return dict(span.attributes or {})


def test_a_fetch_is_a_span_with_its_transfers_and_its_commit() -> None:
    bench = Bench()
    bench.fetch()
    first, second, commit, realise = bench.ended()
    assert [each.name for each in bench.ended()] == ["transfer", "transfer", "commit", "realise"]
    for part in (first, second, commit):
        assert part.parent == realise.get_span_context()
    assert attributes(realise) == {"fusesnap.path": PATH.base_name, "fusesnap.reason": "reader"}
    assert attributes(first) == {
        "fusesnap.cache": "http://bad",
        "fusesnap.kept": 0,
        "fusesnap.bytes": 10,
    }
    assert attributes(second) == {
        "fusesnap.cache": CACHE,
        "fusesnap.kept": 10,
        "fusesnap.bytes": 20,
    }
    waits, turn = realise.events
    assert (waits.name, turn.name) == ("a reader waits", "others are before it")
    assert dict(waits.attributes or {})["fusesnap.reader"] == "redis-server"
    assert realise.status.is_ok


def test_a_fetch_that_fails_says_why() -> None:
    bench = Bench()
    bench.fetch(Unavailable("down"))
    *_, transfer, realise = bench.ended()
    for span in (transfer, realise):
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "down")


class Snapshotter:
    """The part of a snapshotter that is called: it prepares by fetching something, and has no mounts."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        async with trio.open_nursery() as nursery:

            async def fetch() -> None:
                self._bench.fetch()

            nursery.start_soon(fetch)
        return []

    async def mounts(self, key: str) -> list[Mount]:
        raise NotFound(f"{key}: no such snapshot")


async def test_what_prepare_fetches_is_below_it(tmp_path: Path, nursery: trio.Nursery) -> None:
    bench = Bench()
    recorder = Recorder("one", trio.current_time, lambda pid: None)
    counting = Counting(Counters(), trio.current_time)
    telemetry = Telemetry(tmp_path, recorder, counting, trio.current_time, bench.spans)
    snapshotter = cast(Snapshots, Snapshotter(bench))
    observed = ObservedSnapshots(
        snapshotter, telemetry, trio.current_time, lambda name: frozenset(), "/s", nursery
    )
    await observed.prepare("default/1/one", "default/2/chain", {})
    with pytest.raises(NotFound):
        await observed.mounts("gone")
    found = {span.name: span for span in bench.ended()}
    prepare = found["prepare"]
    assert found["realise"].parent == prepare.get_span_context()
    assert attributes(prepare) == {
        "fusesnap.snapshot": "default/1/one",
        "fusesnap.parent": "default/2/chain",
    }
    assert found["mounts"].status.status_code is StatusCode.ERROR


async def test_spans_reach_a_receiver() -> None:
    received: list[bytes] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Not to stderr."""

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        spans = open_spans(f"http://127.0.0.1:{server.server_port}/", "worker")
        with spans.call("prepare", snapshot="default/1/one"):
            pass
        await close_spans(spans)
        server.shutdown()
        thread.join()
    (scope,) = ExportTraceServiceRequest.FromString(received[0]).resource_spans
    named = {each.key: each.value.string_value for each in scope.resource.attributes}
    assert (named["service.name"], named["fusesnap.process"]) == ("fusesnap", "worker")
    assert [span.name for span in scope.scope_spans[0].spans] == ["prepare"]


def test_where_nobody_asked_nothing_of_it_is_imported() -> None:
    assert isinstance(open_spans(None, "worker"), NoSpans)
    program = (
        "import sys, fusesnap.daemon.build\n"  # both processes make their spans there
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_where_it_is_not_installed_the_mend_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fusesnap.daemon.telemetry.exported_spans")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(InvalidConfiguration, match=r"pip install 'fusesnap\[otel\]'"):
        open_spans("http://127.0.0.1:4318", "worker")


@pytest.mark.parametrize("url", ["127.0.0.1:4318", "grpc://host", "http://", "unix:/x"])
def test_a_receiver_is_a_url(tmp_path: Path, url: str) -> None:
    file = tmp_path / "fusesnap.toml"
    file.write_text(f'spans = "{url}"\n')
    with pytest.raises(InvalidConfiguration, match=r"spans: .*expected a URL"):
        load(file, {})


def test_a_call_may_have_any_attribute() -> None:
    with open_spans(None, "services").call("Commit", name="one", key="two"):
        pass
