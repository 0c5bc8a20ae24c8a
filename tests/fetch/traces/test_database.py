"""What a node keeps of starts."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fusesnap.errors import StorageFailure, Unsupported
from fusesnap.fetch.traces import database as module
from fusesnap.fetch.traces.database import MERGED_STARTS, Origin, TraceDatabase
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.startup_trace import BLOCK, Flaw, StartupTrace, TraceBuilder

from ...nix.traces import CLOSURE, HELLO, NAR, WELL, example
from .starts import start


@pytest.fixture
def database(tmp_path: Path) -> Iterator[TraceDatabase]:
    opened = TraceDatabase(tmp_path / "traces.sqlite")
    yield opened
    opened.close()


def block(number: int, *, flaws: frozenset[Flaw] = frozenset()) -> StartupTrace:
    """A start that reads one block."""
    builder = TraceBuilder()
    size = 100 * BLOCK
    file = builder.file(builder.path(HELLO, NAR), 2, size, b"bin/hello")
    builder.read(file, number * BLOCK, 1, size)
    return builder.trace(CLOSURE, replace(WELL, flaws=flaws))


def test_starts_of_one_closure_are_kept_as_one(database: TraceDatabase) -> None:
    assert database.merge(block(5), 1) == block(5)
    kept = database.merge(block(1), 2)
    assert [extent.offset for extent in kept.extents] == [5 * BLOCK, BLOCK]
    assert kept.circumstances.starts == 2
    (stored,) = database.traces(CLOSURE)
    assert (stored.trace, stored.origin, stored.used) == (kept, Origin.RECORDED, 2)


def test_after_so_many_starts_it_is_known(database: TraceDatabase) -> None:
    for number in range(MERGED_STARTS):
        database.merge(block(number, flaws=frozenset({Flaw.SHARED})), 1)
    assert len(database.merge(block(50, flaws=frozenset({Flaw.SHARED})), 1).extents) == 1
    whole = database.merge(block(51), 1)  # what completes it is still taken
    assert whole.circumstances.complete
    assert whole.circumstances.starts == MERGED_STARTS + 1
    assert database.merge(block(52), 1) == whole


def test_a_path_that_became_another_nar_is_recorded_anew(database: TraceDatabase) -> None:
    database.merge(block(5), 1)
    other = replace(
        block(1), paths=(replace(block(1).paths[0], nar_hash=replace(NAR, digest=bytes(32))),)
    )
    assert database.merge(other, 2) == other
    assert database.traces() == [module.StoredTrace(other, Origin.RECORDED, 2)]


def test_the_best_is_what_is_complete_and_then_what_was_brought(database: TraceDatabase) -> None:
    partial, whole = block(1, flaws=frozenset({Flaw.INTERRUPTED})), block(2)
    assert database.best(CLOSURE, 5) is None
    database.put(partial, Origin.CACHE, 1)
    database.merge(partial, 1)
    assert [each.origin for each in database.traces()] == [Origin.RECORDED, Origin.CACHE]
    database.put(whole, Origin.CACHE, 1)
    best = database.best(CLOSURE, 5)
    assert best is not None
    assert (best.origin, best.trace) == (Origin.CACHE, whole)
    database.put(whole, Origin.IMPORTED, 1)
    assert database.traces()[0].origin is Origin.IMPORTED
    assert database.remove(CLOSURE) == 3
    assert database.traces() == []


def test_the_least_recently_used_go(
    database: TraceDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT_CLOSURES", 2)
    closures = [ClosureDigest(str(number) * 64) for number in range(3)]
    for number, closure in enumerate(closures[:2]):
        database.put(replace(example(), closure=closure), Origin.RECORDED, number)
    assert database.best(closures[0], 10) is not None
    database.put(replace(example(), closure=closures[2]), Origin.RECORDED, 11)
    assert [each.trace.closure for each in database.traces()] == [closures[0], closures[2]]


def test_a_recording_is_taken_over(tmp_path: Path, database: TraceDatabase) -> None:
    one, two = start("one"), start("two", upper=None)
    database.begin(one, example())
    database.begin(two, example())
    database.save({"one": block(1)}, orderly=True)
    database.end("two")
    database.begin(two, example())
    (first, second) = database.unfinished()
    assert (first.start, first.orderly, first.trace) == (one, True, block(1))
    assert (second.start, second.orderly, second.trace) == (two, False, example())
    assert [each.orderly for each in TraceDatabase(tmp_path / "traces.sqlite").unfinished()] == [
        False,
        False,
    ]
    database.end("one")
    assert [each.start for each in database.unfinished()] == [two]


def test_what_was_shown_is_forgotten_with_the_boot(database: TraceDatabase) -> None:
    assert database.shown("boot-1") == set()
    database.add_shown([3, 5])
    database.add_shown([5, 7])
    assert database.shown("boot-1") == {3, 5, 7}
    assert database.shown("boot-2") == set()
    assert database.shown("boot-1") == set()


def test_what_is_damaged_is_no_trace(
    tmp_path: Path, database: TraceDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    database.put(example(), Origin.RECORDED, 1)
    with sqlite3.connect(tmp_path / "traces.sqlite") as connection:
        connection.execute("UPDATE traces SET trace = substr(trace, 2)")
    connection.close()
    assert database.best(CLOSURE, 1) is None
    assert "a trace in the database is not used: startup trace: begins with" in caplog.text
    assert database.merge(example(), 2) == example()
    assert database.traces()[0].trace == example()


def test_what_another_version_wrote_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "traces.sqlite"
    TraceDatabase(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(Unsupported, match="schema version 99, expected at most 2"):
        TraceDatabase(path)
    path.write_bytes(b"x" * 5000)
    with pytest.raises(StorageFailure, match="cannot open"):
        TraceDatabase(path)
