"""A real daemon is scraped, before and after its worker is killed, and sends its spans."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families
from testbed.binary_cache import HttpCache
from testbed.images import Layer
from testbed.synthetic import SimpleClosure

from .conftest import SHELL, Node

NixLayers = Callable[..., Layer]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@contextlib.contextmanager
def receiver() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Takes spans over HTTP: its URL, and the process and name of each span that came."""
    came: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for each in ExportTraceServiceRequest.FromString(body).resource_spans:
                named = {one.key: one.value.string_value for one in each.resource.attributes}
                came.extend(
                    (named["fusesnap.process"], span.name)
                    for scope in each.scope_spans
                    for span in scope.spans
                )
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Not to stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", came
        server.shutdown()
        thread.join()


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")  # milliseconds; the SDK has 5,000
    with receiver() as found:
        yield found


def scrape(socket: Path) -> tuple[Samples, set[str]]:
    """Every sample by name and labels, and the names of those that never go back."""
    transport = httpx.HTTPTransport(uds=str(socket))
    with httpx.Client(transport=transport, base_url="http://node", timeout=30) as client:
        answer = client.get("/metrics").raise_for_status()
    families = list(text_string_to_metric_families(answer.text))
    samples = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }
    growing = {
        sample.name
        for family in families
        for sample in family.samples
        if family.type in ("counter", "histogram")
    }
    return samples, growing


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_counters_go_on_when_the_worker_is_killed(
    make_node: Callable[..., Node],
    cache: HttpCache,
    simple: SimpleClosure,
    base_layer: Layer,
    nix_layers: NixLayers,
    work: Path,
    spans: tuple[str, list[tuple[str, str]]],
) -> None:
    socket = work / "m.sock"
    url, sent = spans
    (work / "metrics.toml").write_text(f'metrics = "unix:{socket}"\nspans = "{url}"\n')
    node = make_node(cache.url, options=["--config", str(work / "metrics.toml")])
    reference = node.pull([base_layer, nix_layers()])
    node.containerd.run(reference, "one", *SHELL, f"wc -c < {simple.large}/data")

    # The worker writes what it counted twice a second.
    def came() -> bool:
        return value(scrape(socket)[0], "fusesnap_read_bytes_total") > 5_000_000

    node.daemon.service.wait_until(came)
    before, _ = scrape(socket)
    fetched = value(before, "fusesnap_fetched_bytes_total", cache=cache.url, reason="reader")
    assert fetched > 5_000_000
    assert value(before, "fusesnap_worker_up") == 1
    assert value(before, "fusesnap_worker_starts_total") == 1
    assert value(before, "fusesnap_cache_up", cache=cache.url) == 1
    assert value(before, "fusesnap_cache_breaker", cache=cache.url, state="closed") == 1
    assert value(before, "fusesnap_requests_waiting", **{"for": "transfer"}) == 0
    assert value(before, "fusesnap_store_bytes") > 5_000_000
    assert value(before, "fusesnap_store_paths", state="committed") >= 2
    assert value(before, "fusesnap_requests_total", operation="lookup", source="fetched") >= 2
    assert value(before, "fusesnap_requests_total", operation="read", source="store") > 0
    assert value(before, "fusesnap_read_bytes_total") > 5_000_000
    assert value(before, "fusesnap_reader_wait_seconds_count", operation="lookup") >= 2
    assert value(before, "fusesnap_snapshot_call_seconds_count", call="prepare") >= 3

    wanted = {("services", name) for name in ("prepare", "commit", "mounts")}
    wanted |= {("worker", name) for name in ("realise", "transfer", "commit")}
    node.daemon.service.wait_until(lambda: wanted <= set(sent))

    worker = node.daemon.status()["worker"]["pid"]
    os.kill(worker, signal.SIGKILL)
    node.containerd.run(reference, "two", *SHELL, f"ls -R {simple.tree} > /dev/null")
    node.daemon.service.wait_until(
        lambda: value(scrape(socket)[0], "fusesnap_worker_starts_total") == 2
    )
    after, growing = scrape(socket)
    gone_back = [which for which in before if which[0] in growing and after[which] < before[which]]
    assert gone_back == []
    assert value(after, "fusesnap_worker_up") == 1
