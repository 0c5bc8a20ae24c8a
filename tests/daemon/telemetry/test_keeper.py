"""What one process keeps, and that it serves on where it cannot."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from fusesnap.daemon.telemetry.counting import Counters, Counting, key, labels_of
from fusesnap.daemon.telemetry.journal import Journal
from fusesnap.daemon.telemetry.keeper import EVERY, Telemetry
from fusesnap.daemon.telemetry.recorder import Recorder
from fusesnap.daemon.telemetry.records import FetchRecord, StartRecord
from fusesnap.daemon.telemetry.spans import NoSpans
from fusesnap.errors import Unavailable
from fusesnap.fetch.events import (
    Asked,
    Boarded,
    FetchEvent,
    Landed,
    Rebuilt,
    Received,
    TransferBegun,
    Verifying,
)
from fusesnap.fetch.flight import Reader
from fusesnap.fetch.priority import Priority
from fusesnap.filesystem.wait_events import Answered, Blocked, Question
from fusesnap.nix.store_path import StorePath

PATH = StorePath("0" * 32, "redis")
CACHE = "http://cache"


def telemetry(root: Path) -> Telemetry:
    recorder = Recorder("one", trio.current_time, lambda pid: None)
    counting = Counting(Counters(), trio.current_time)
    return Telemetry(root, recorder, counting, trio.current_time, NoSpans())


async def fetch(kept: Telemetry, priority: Priority = Priority.PREFETCH) -> None:
    """A fetch whose every step takes a second."""
    steps: list[FetchEvent] = [
        Asked(PATH, priority),
        Boarded(PATH),
        TransferBegun(PATH, CACHE, 30),
        Received(PATH, CACHE, 30),
        Verifying(PATH),
        Landed(PATH),
    ]
    for step in steps:
        kept.fetch(step)
        await trio.sleep(1)


def reads(totals: dict[str, float]) -> list[tuple[str, dict[str, str], float]]:
    return [("reads", {"from": source}, total) for source, total in totals.items()]


def counters(root: Path) -> dict[str, float]:
    """As Prometheus would write them."""
    journal = Journal(root)
    found = {
        f"{name}{labels_of(labels)}": value for (name, labels), value in journal.counters().items()
    }
    journal.close()
    return found


async def test_what_happens_is_on_disk_soon_and_at_the_end(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    journal = Journal(tmp_path)
    async with telemetry(tmp_path).running() as kept:
        kept.fetch(Asked(PATH, Priority.READER))
        found: list[FetchRecord] = []
        while not found:  # the clock does not wait for threads
            await trio.sleep(EVERY)
            found = await trio.to_thread.run_sync(journal.fetches, 0, 1e9)
        assert [record.landed for record in found] == [None]
        kept.fetch(Landed(PATH))
        kept.started(StartRecord("k", "p", "u", 1, 2, True))
        kept.chain("p", frozenset(["a"]))
    (record,) = journal.fetches(0, 1e9)
    assert record.landed is not None
    assert [start.key for start in journal.starts()] == ["k"]
    assert journal.chain("p") == {"a"}
    journal.close()


async def test_bytes_count_for_the_reader_who_waits_and_else_for_whom_they_were_asked(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with telemetry(tmp_path).running() as kept:
        await fetch(kept)
        kept.wait(Blocked(1, Question("open", PATH, 1, pid=7), (Reader(7, "cat"),)))
        await fetch(kept)
        kept.wait(Answered(1, Unavailable("down")))
        await fetch(kept, Priority.TRACE)
        kept.fetch(Rebuilt(PATH, Priority.READER, 40, (0, 50)))
    found = counters(tmp_path)
    assert found[f"fusesnap_rebuilt_bytes{ {'reason': 'reader'} }"] == 40
    for reason in ("prefetch", "reader", "trace"):
        labels = {"cache": CACHE, "reason": reason}
        assert found[f"fusesnap_fetched_bytes{labels}"] == 30
    committed = {"outcome": "committed", "reason": "prefetch"}
    assert found[f"fusesnap_fetches{committed}"] == 2
    assert found[f"fusesnap_reader_errors{ {'kind': 'unavailable'} }"] == 1
    waits = {"operation": "open"}
    assert found[f"fusesnap_reader_wait_seconds_count{waits}"] == 1
    assert found[f"fusesnap_reader_wait_seconds_sum{waits}"] == pytest.approx(6)
    for bound, expected in (("5", 0), ("10", 1), ("+Inf", 1)):
        bucket = {"le": bound, "operation": "open"}
        assert found[f"fusesnap_reader_wait_seconds_bucket{bucket}"] == expected
    for phase, seconds in (("queued", 3), ("asking", 6), ("transfer", 3), ("verify", 3)):
        assert found[f"fusesnap_fetch_phase_seconds_sum{ {'phase': phase} }"] == pytest.approx(
            seconds
        )


async def test_what_nobody_asked_for_disturbs_nobody(tmp_path: Path) -> None:
    kept = telemetry(tmp_path)
    for event in (Boarded(PATH), Received(PATH, CACHE, 5), Landed(PATH)):
        kept.fetch(event)
    kept.wait(Answered(7))
    await kept.flush()
    assert counters(tmp_path) == {}


async def test_totals_are_counted_by_what_they_grew(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    for _ in range(2):  # each process begins at nothing
        totals = {"store": 0.0}
        async with telemetry(tmp_path).running() as kept:
            kept.watch(partial(reads, totals))
            for _ in range(5):
                totals["store"] += 10
                await trio.sleep(EVERY)
    assert counters(tmp_path) == {"reads{'from': 'store'}": 100}


async def test_where_it_cannot_be_written_nothing_fails_and_nothing_is_lost(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "not yet"
    with caplog.at_level(logging.WARNING):
        async with telemetry(root).running() as kept:
            await fetch(kept)
            kept.started(StartRecord("k", "p", "u", 1, 2, True))
            for _ in range(2):  # it is said once
                await kept.flush()
            root.mkdir()
    assert [record.message for record in caplog.records] == [
        f"cannot open {root}/journal.sqlite: unable to open database file;"
        " start reports and metrics will lack something"
    ]
    journal = Journal(root)
    assert len(journal.fetches(0, 1e9)) == 1
    assert len(journal.starts()) == 1
    journal.close()
    committed = {"outcome": "committed", "reason": "prefetch"}
    assert counters(root)[f"fusesnap_fetches{committed}"] == 1


def test_labels_survive_what_a_url_may_hold() -> None:
    labels = {"cache": "http://host/a=b?c=d&e", "reason": "reader"}
    assert labels_of(key("x", labels)[1]) == labels
    assert labels_of(key("x", {})[1]) == {}
