"""Metrics as Prometheus parses them, and the examples that are made of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families

from fusesnap.daemon.telemetry.counting import BUCKETS, Counters
from fusesnap.daemon.telemetry.journal import Batch
from fusesnap.daemon.telemetry.metrics import COUNTERS, HISTOGRAMS, Picture, registry

REPOSITORY = Path(__file__).parents[3]
EXAMPLES = REPOSITORY / "docs/examples/prometheus"
CACHE = 'https://cache.example.org/a="b"\\c'
STATUS: Mapping[str, Any] = {
    "worker": {"pid": 7},
    "paths": {"committed": 3, "valid": 2, "missing": 1},
    "depend_on_fuse": ["default/1/one"],
    "caches": [
        {"url": CACHE, "reachable": True, "breaker": "closed"},
        {"url": "https://down", "reachable": False, "breaker": "open"},
        {"url": "https://new", "reachable": None, "breaker": "closed"},
    ],
    "waiting": [{"for": "transfer", "seconds": 1.5}, {"for": "turn", "seconds": 3.0}],
    "fetching": [{"for": each} for each in ("transfer", "narinfo", "turn", "pause")],
}


def families(status: Mapping[str, Any] = STATUS, *, openmetrics: bool = False) -> dict[str, Metric]:
    """Written out and parsed again."""
    counters = Counters()
    counters.add("fusesnap_fetched_bytes", 1000, cache=CACHE, reason="reader")
    counters.add("fusesnap_worker_starts")
    for seconds in (0.02, 3.0, 1000.0):
        counters.observe("fusesnap_reader_wait_seconds", seconds, operation="open")
    batch = Batch()
    counters.take(batch)
    batch.counters["of_another_release", "x=y"] = 1
    found = registry(Picture(batch.counters, status, 5_000, 6_000, "1.2.3"))
    if openmetrics:
        return {each.name: each for each in parse_openmetrics(generate_openmetrics(found).decode())}
    text = generate_latest(found).decode()
    return {each.name: each for each in text_string_to_metric_families(text)}


def samples(metric: Metric) -> dict[tuple[str, ...], float]:
    return {
        (sample.name.removeprefix(metric.name), *dict(sorted(sample.labels.items())).values()): (
            sample.value
        )
        for sample in metric.samples
    }


@pytest.mark.parametrize("openmetrics", [False, True])
def test_counters_have_their_labels_and_those_without_are_always_there(openmetrics: bool) -> None:
    found = families(openmetrics=openmetrics)
    assert samples(found["fusesnap_fetched_bytes"]) == {("_total", CACHE, "reader"): 1000}
    assert samples(found["fusesnap_worker_starts"]) == {("_total",): 1}
    assert samples(found["fusesnap_evicted_bytes"]) == {("_total",): 0}
    assert samples(found["fusesnap_reader_errors"]) == {}
    assert not any("another" in name for name in found)


def test_a_histogram_is_cumulative_and_whole() -> None:
    found = samples(families()["fusesnap_reader_wait_seconds"])
    buckets = [found["_bucket", f"{bound:g}", "open"] for bound in BUCKETS]
    assert buckets == sorted(buckets)
    assert buckets[:2] == [0, 1]
    assert buckets[-1] == 2
    assert found["_bucket", "+Inf", "open"] == found["_count", "open"] == 3
    assert found["_sum", "open"] == pytest.approx(1003.02)


def test_gauges_say_how_it_is_now() -> None:
    found = families()
    assert samples(found["fusesnap_requests_waiting"]) == {
        ("", "narinfo"): 0,
        ("", "turn"): 1,
        ("", "transfer"): 1,
        ("", "pause"): 0,
        ("", "verify"): 0,
        ("", "disk"): 0,
    }
    assert samples(found["fusesnap_longest_wait_seconds"]) == {("",): 3}
    assert samples(found["fusesnap_transfers"]) == {
        ("", "running"): 2,
        ("", "queued"): 1,
        ("", "paused"): 1,
    }
    assert samples(found["fusesnap_store_paths"])["", "valid"] == 2
    assert samples(found["fusesnap_store_bytes"]) == {("",): 5000}
    assert samples(found["fusesnap_cache_up"]) == {("", CACHE): 1, ("", "https://down"): 0}
    breakers = samples(found["fusesnap_cache_breaker"])
    assert (breakers["", CACHE, "closed"], breakers["", "https://down", "open"]) == (1, 1)
    assert sum(breakers.values()) == 3
    assert found["fusesnap_build_info"].samples[0].labels == {"version": "1.2.3"}


def test_without_a_worker_nothing_is_made_up() -> None:
    found = families({**STATUS, "worker": {"pid": None}})
    assert samples(found["fusesnap_worker_up"]) == {("",): 0}
    assert "fusesnap_requests_waiting" not in found
    assert "fusesnap_transfers" not in found


def test_names_and_meanings_follow_prometheus_conventions() -> None:
    for name, metric in families().items():
        assert re.fullmatch(r"fusesnap_[a-z_]+", name)
        assert metric.documentation.endswith(".")
        assert not name.endswith(("_total", "_count", "_sum"))


def names_in(expression: str) -> set[str]:
    """The metrics that an expression asks for, without what Prometheus makes of them."""
    found = set(re.findall(r"\bfusesnap_[a-z_]+", expression))
    return {re.sub(r"_(total|bucket|sum|count|info)$", "", name) for name in found}


def known() -> set[str]:
    names = (name.removesuffix("_info") for name in families())
    return {*names, *COUNTERS, *HISTOGRAMS}


def test_the_example_alerts_ask_for_what_there_is() -> None:
    rules = yaml.safe_load((EXAMPLES / "alerts.yaml").read_text())
    alerts = [rule for group in rules["groups"] for rule in group["rules"]]
    assert len({alert["alert"] for alert in alerts}) == len(alerts) >= 6
    for alert in alerts:
        assert names_in(alert["expr"]) <= known()
        assert set(alert) == {"alert", "expr", "for", "labels", "annotations"}
        assert set(alert["annotations"]) == {"summary", "description"}
        assert alert["labels"]["severity"] in ("warning", "critical")


def test_the_example_dashboard_asks_for_what_there_is() -> None:
    dashboard = json.loads((EXAMPLES / "dashboard.json").read_text())
    expressions = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])
    ]
    assert len(expressions) >= 8
    for expression in expressions:
        assert names_in(expression)
        assert names_in(expression) <= known()


def test_the_docs_list_every_metric() -> None:
    text = (REPOSITORY / "docs/operations.md").read_text()
    listed = {
        re.sub(r"_(total|info)$", "", name)
        for name in re.findall(r"^\| `(fusesnap_\w+)", text, re.M)
    }
    assert listed == known()
