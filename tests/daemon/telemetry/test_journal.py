"""The journal on disk."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fusesnap.daemon.telemetry import journal as module
from fusesnap.daemon.telemetry.journal import FILE_NAME, KEPT_DAYS, Batch, Journal
from fusesnap.daemon.telemetry.records import (
    Attempt,
    FetchRecord,
    Phase,
    StartRecord,
    Step,
    WaitRecord,
)
from fusesnap.errors import InvalidData, StorageFailure

DAY = 86400.0
FETCH = FetchRecord(
    session="one",
    number=1,
    path="0-redis",
    priority="reader",
    asked=10,
    steps=(Step(10, Phase.QUEUED), Step(11, Phase.ASKING)),
    landed=14,
    expected=30,
    received=30,
    attempts=(Attempt(11, "c", 0),),
    marks=((12, 5),),
)
WAIT = WaitRecord("one", 1, "/s/1/fs", 7, "redis", True, "read", "0-redis", "bin", 10.5, 14)
START = StartRecord("default/1/redis", "default/2/chain", "/s/1/fs", 9, 9.5, True)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path)
    yield opened
    opened.close()


def test_what_was_written_is_read_by_another_process(journal: Journal, tmp_path: Path) -> None:
    journal.write(
        Batch([FETCH], [WAIT], [START], {"default/2/chain": frozenset(["0-redis", "1-glibc"])})
    )
    other = Journal(tmp_path)
    assert other.starts() == [START]
    assert other.waits("/s/1/fs", 0) == [WAIT]
    assert other.waits("/s/2/fs", 0) == []
    assert other.waits("/s/1/fs", 11) == []
    assert other.fetches(0, 100) == [FETCH]
    assert other.chain("default/2/chain") == {"0-redis", "1-glibc"}
    assert other.chain("another") == frozenset()
    other.close()


def test_a_record_that_changes_is_one(journal: Journal) -> None:
    journal.write(Batch([replace(FETCH, landed=None)], [replace(WAIT, ended=None)]))
    journal.write(Batch([FETCH], [WAIT]))
    assert journal.fetches(0, 100) == [FETCH]
    assert journal.waits("/s/1/fs", 0) == [WAIT]


@pytest.mark.parametrize(
    ("begin", "end", "seen"), [(0, 9, 0), (0, 10, 1), (12, 13, 1), (14, 20, 1), (15, 20, 0)]
)
def test_a_fetch_is_seen_whenever_it_was_under_way(
    journal: Journal, begin: float, end: float, seen: int
) -> None:
    journal.write(Batch([FETCH]))
    assert len(journal.fetches(begin, end)) == seen


def test_counters_add_up_over_processes_and_restarts(tmp_path: Path) -> None:
    for _ in range(3):
        opened = Journal(tmp_path)
        opened.write(Batch(counters={("bytes", "cache=c"): 10, ("errors", ""): 1}))
        opened.close()
    opened = Journal(tmp_path)
    assert opened.counters() == {("bytes", "cache=c"): 30, ("errors", ""): 3}
    opened.close()


def test_what_is_old_or_too_much_goes_and_counters_stay(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT_FETCHES", 3)
    now = KEPT_DAYS * DAY + 100
    journal.write(
        Batch(
            [replace(FETCH, number=number, asked=200.0 + number) for number in range(5)],
            [WAIT, replace(WAIT, number=2, began=300)],
            [START, replace(START, key="new", parent="new chain", began=300)],
            {"default/2/chain": frozenset(["a"]), "new chain": frozenset(["b"])},
            {("bytes", ""): 1},
        )
    )
    journal.prune(now)
    assert [fetch.number for fetch in journal.fetches(0, 1e9)] == [2, 3, 4]
    assert [wait.number for wait in journal.waits("/s/1/fs", 0)] == [2]
    assert [start.key for start in journal.starts()] == ["new"]
    assert journal.chain("default/2/chain") == frozenset()
    assert journal.chain("new chain") == {"b"}
    assert journal.counters() == {("bytes", ""): 1}


def test_a_batch_is_written_whole_or_not_at_all(journal: Journal) -> None:
    bad = Batch([FETCH], counters={("x", ""): 1})
    bad.counters[("y", "")] = float("nan")  # SQLite takes it for NULL, which the schema refuses
    with pytest.raises(StorageFailure):
        journal.write(bad)
    assert journal.fetches(0, 100) == []
    assert journal.counters() == {}


@pytest.mark.parametrize("rubbish", [b"this is no database" * 100, os.urandom(8192)])
def test_a_file_that_is_no_journal_is_replaced(tmp_path: Path, rubbish: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(rubbish)
    opened = Journal(tmp_path)
    opened.write(Batch([FETCH]))
    assert opened.fetches(0, 100) == [FETCH]
    opened.close()


def test_a_journal_of_another_release_is_begun_anew(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    connection.execute("CREATE TABLE fetches (anything)")
    connection.execute("PRAGMA user_version = 99")
    connection.commit()
    connection.close()
    opened = Journal(tmp_path)
    opened.write(Batch([FETCH]))
    assert opened.fetches(0, 100) == [FETCH]
    opened.close()


def test_where_there_is_no_directory_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(StorageFailure, match=r"journal\.sqlite"):
        Journal(tmp_path / "gone")


def test_a_record_that_cannot_be_read_is_named(journal: Journal, tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    connection.execute("INSERT INTO fetches VALUES ('x', 1, 10, 11, '{\"path\": 5}')")
    connection.commit()
    connection.close()
    with pytest.raises(InvalidData, match="journal: "):
        journal.fetches(0, 100)
