"""Scrapes over HTTP, on an address and on a unix socket."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trio
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from trio.testing import MockClock

from fusesnap.config import MetricsAddress
from fusesnap.daemon.telemetry.exposition import WITHIN, serve, serve_metrics
from fusesnap.errors import StorageFailure

LOCAL = MetricsAddress("127.0.0.1", 0)


class One(Collector):
    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("fusesnap_one", "One.", value=1)


async def gather() -> CollectorRegistry:
    found = CollectorRegistry()
    found.register(One())
    return found


async def full() -> CollectorRegistry:
    raise StorageFailure("the disk is full", 28)


async def broken() -> CollectorRegistry:
    raise KeyError("a fault of ours")


async def url(nursery: trio.Nursery, gather_from: object = gather) -> str:
    """Of a server on a port of its own."""
    listeners = await nursery.start(serve, LOCAL, gather_from)
    return f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"


async def test_prometheus_gets_its_text(nursery: trio.Nursery) -> None:
    async with httpx.AsyncClient(base_url=await url(nursery), trust_env=False) as client:
        answer = await client.get("/metrics?x=y")
        (metric,) = text_string_to_metric_families(answer.text)
        assert (answer.status_code, metric.name) == (200, "fusesnap_one")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        kind = "application/openmetrics-text; version=1.0.0"
        answer = await client.get("/metrics", headers={"Accept": kind})
        assert [each.name for each in parse_openmetrics(answer.text)] == ["fusesnap_one"]
        assert answer.headers["content-type"].startswith("application/openmetrics-text")


async def test_a_unix_socket_is_our_users_alone(nursery: trio.Nursery, tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    for _ in range(2):  # the second takes the first one's place
        await nursery.start(serve, MetricsAddress(path=str(path)), gather)
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    async with httpx.AsyncClient(transport=transport, base_url="http://node") as client:
        assert "fusesnap_one 1.0" in (await client.get("/metrics")).text


@pytest.mark.parametrize(
    ("method", "target", "status", "said"),
    [
        ("GET", "/", 200, "metrics are at /metrics"),
        ("GET", "/other", 404, "metrics are at /metrics"),
        ("POST", "/metrics", 405, "only GET and HEAD"),
        ("HEAD", "/metrics", 200, ""),
    ],
)
async def test_other_requests_are_told(
    nursery: trio.Nursery, method: str, target: str, status: int, said: str
) -> None:
    async with httpx.AsyncClient(base_url=await url(nursery), trust_env=False) as client:
        answer = await client.request(method, target)
    assert answer.status_code == status
    assert said in answer.text
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize(
    ("fails", "said"), [(full, "the disk is full"), (broken, "unexpected KeyError")]
)
async def test_a_scrape_that_fails_says_why_and_the_next_is_answered(
    nursery: trio.Nursery, fails: object, said: str
) -> None:
    async with httpx.AsyncClient(base_url=await url(nursery, fails), trust_env=False) as client:
        for _ in range(2):
            answer = await client.get("/metrics")
            assert (answer.status_code, said in answer.text) == (500, True)


@pytest.mark.parametrize("rubbish", [b"\x16\x03\x01 tls", b"GET\r\n\r\n", b"x" * 200_000, b""])
async def test_what_is_no_request_ends_its_own_connection_only(
    nursery: trio.Nursery, rubbish: bytes
) -> None:
    base = await url(nursery)
    stream = await trio.open_tcp_stream("127.0.0.1", int(base.rpartition(":")[2]))
    try:
        await stream.send_all(rubbish + b"\r\n\r\n")
        while await stream.receive_some():
            pass
    except trio.BrokenResourceError:
        pass
    await stream.aclose()
    async with httpx.AsyncClient(base_url=base, trust_env=False) as client:
        assert (await client.get("/metrics")).status_code == 200


async def test_who_says_nothing_is_let_go(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    base = await url(nursery)
    stream = await trio.open_tcp_stream("127.0.0.1", int(base.rpartition(":")[2]))
    began = trio.current_time()
    assert await stream.receive_some() == b""
    assert trio.current_time() - began == pytest.approx(WITHIN)
    await stream.aclose()


async def test_an_address_that_somebody_has_is_tried_again(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    (listener, *_) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    nursery.start_soon(serve_metrics, MetricsAddress("127.0.0.1", port), gather)
    await trio.sleep(100)
    said = [record.message for record in caplog.records]
    assert said == [
        f"metrics = '127.0.0.1:{port}': somebody else listens there; trying again every 10 s"
    ]
    await listener.aclose()
    await trio.sleep(100)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        assert (await client.get("/metrics")).status_code == 200
