"""The journal on disk: bounded in size and in age, shared by the processes of a state directory.

It is in a file of its own, which may be deleted at any time. A process that is killed loses what it had not written
yet, half a second at most. All methods are blocking and raise ``StorageFailure``.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

from fusesnap.daemon.telemetry.records import (
    FETCH,
    START,
    WAIT,
    FetchRecord,
    StartRecord,
    WaitRecord,
    parse,
)
from fusesnap.errors import StorageFailure
from fusesnap.store.database import Database

FILE_NAME: Final = "journal.sqlite"
VERSION: Final = 3
KEPT_DAYS: Final = 7
# Rows of some 500 bytes: 15 MB at most, with the lists of paths of the images that were started.
KEPT_FETCHES: Final = 10_000
KEPT_WAITS: Final = 20_000
KEPT_STARTS: Final = 500
# For one report: more cannot be drawn, and an answer has its limits.
MOST_ROWS: Final = 3_000
WAIT_SECONDS: Final = 5.0

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS fetches (
    session TEXT NOT NULL, number INTEGER NOT NULL, asked REAL NOT NULL, landed REAL, data TEXT NOT NULL,
    PRIMARY KEY (session, number)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS fetches_asked ON fetches (asked);
CREATE TABLE IF NOT EXISTS waits (
    session TEXT NOT NULL, number INTEGER NOT NULL, upper TEXT, began REAL NOT NULL, data TEXT NOT NULL,
    PRIMARY KEY (session, number)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS waits_began ON waits (began);
CREATE INDEX IF NOT EXISTS waits_upper ON waits (upper, began);
CREATE TABLE IF NOT EXISTS starts (
    id INTEGER PRIMARY KEY AUTOINCREMENT, began REAL NOT NULL, parent TEXT NOT NULL, data TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS chains (parent TEXT PRIMARY KEY, paths BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS counters (
    name TEXT NOT NULL, labels TEXT NOT NULL, value REAL NOT NULL, PRIMARY KEY (name, labels)
) WITHOUT ROWID;
"""
TABLES: Final = ("fetches", "waits", "starts", "chains", "counters")

# The name of a counter, and its labels as text: key=value, sorted, one a line.
CounterKey: TypeAlias = tuple[str, str]


@dataclass(slots=True)
class Batch:
    """What one process has to write: records as they are now, and what counters grew by."""

    fetches: list[FetchRecord] = field(default_factory=list)
    waits: list[WaitRecord] = field(default_factory=list)
    starts: list[StartRecord] = field(default_factory=list)
    chains: dict[str, frozenset[str]] = field(default_factory=dict)
    counters: dict[CounterKey, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any((self.fetches, self.waits, self.starts, self.chains, self.counters))


class Journal:
    """One state directory's."""

    def __init__(self, root: Path) -> None:
        """Open it, and create it where it is missing or is not one."""
        path = root / FILE_NAME
        try:
            self._database = _open(path)
        except StorageFailure as error:
            if not _is_damaged(error):
                raise
            for name in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
                name.unlink(missing_ok=True)
            self._database = _open(path)

    def close(self) -> None:
        """Close it."""
        self._database.close()

    def write(self, batch: Batch) -> None:
        """Write all of ``batch`` or nothing."""
        with self._database.writing("write") as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO fetches VALUES (?, ?, ?, ?, ?)",
                (
                    (each.session, each.number, each.asked, each.landed, _text(FETCH, each))
                    for each in batch.fetches
                ),
            )
            connection.executemany(
                "INSERT OR REPLACE INTO waits VALUES (?, ?, ?, ?, ?)",
                (
                    (each.session, each.number, each.upper, each.began, _text(WAIT, each))
                    for each in batch.waits
                ),
            )
            connection.executemany(
                "INSERT INTO starts (began, parent, data) VALUES (?, ?, ?)",
                ((each.began, each.parent, _text(START, each)) for each in batch.starts),
            )
            connection.executemany(
                "INSERT OR REPLACE INTO chains VALUES (?, ?)",
                ((parent, _packed(paths)) for parent, paths in batch.chains.items()),
            )
            connection.executemany(
                "INSERT INTO counters VALUES (?, ?, ?) "
                "ON CONFLICT DO UPDATE SET value = value + excluded.value",
                ((*key, grown) for key, grown in batch.counters.items()),
            )

    def prune(self, now: float) -> None:
        """Remove what is too old or too much; ``now`` in seconds since the epoch."""
        oldest = now - KEPT_DAYS * 86400
        with self._database.writing("shorten") as connection:
            for table, time, kept in (
                ("fetches", "asked", KEPT_FETCHES),
                ("waits", "began", KEPT_WAITS),
                ("starts", "began", KEPT_STARTS),
            ):
                row = connection.execute(
                    f"SELECT {time} FROM {table} ORDER BY {time} DESC LIMIT 1 OFFSET ?",  # noqa: S608
                    (kept,),
                ).fetchone()
                limit = max(oldest, row[0]) if row is not None else oldest
                connection.execute(f"DELETE FROM {table} WHERE {time} <= ?", (limit,))  # noqa: S608
            connection.execute("DELETE FROM chains WHERE parent NOT IN (SELECT parent FROM starts)")

    def starts(self) -> list[StartRecord]:
        """Every start that is kept, the newest first."""
        with self._database.reading("read") as connection:
            rows = connection.execute("SELECT data FROM starts ORDER BY id DESC").fetchall()
        return [parse(START, data) for (data,) in rows]

    def waits(self, upper: str, begin: float, end: float = float("inf")) -> list[WaitRecord]:
        """The waits in the container with this upper directory that began in a time, the first first."""
        with self._database.reading("read") as connection:
            rows = connection.execute(
                "SELECT data FROM waits WHERE upper = ? AND began >= ? AND began <= ? ORDER BY began LIMIT ?",
                (upper, begin, end, MOST_ROWS),
            ).fetchall()
        return [parse(WAIT, data) for (data,) in rows]

    def fetches(self, begin: float, end: float) -> list[FetchRecord]:
        """The fetches, for whomever, that were under way at some moment of a time, the first first."""
        with self._database.reading("read") as connection:
            rows = connection.execute(
                "SELECT data FROM fetches WHERE asked <= ? AND coalesce(landed, ?) >= ? ORDER BY asked LIMIT ?",
                (end, end, begin, MOST_ROWS),
            ).fetchall()
        return [parse(FETCH, data) for (data,) in rows]

    def chain(self, parent: str) -> frozenset[str]:
        """The base names of the store paths of an image; empty where they are not known."""
        with self._database.reading("read") as connection:
            row = connection.execute(
                "SELECT paths FROM chains WHERE parent = ?", (parent,)
            ).fetchone()
        return frozenset() if row is None else _unpacked(row[0])

    def counters(self) -> Mapping[CounterKey, float]:
        """All counters of this state directory since the journal was created."""
        with self._database.reading("read") as connection:
            rows: Sequence[tuple[str, str, float]] = connection.execute(
                "SELECT name, labels, value FROM counters"
            ).fetchall()
        return {(name, labels): value for name, labels, value in rows}


def _open(path: Path) -> Database:
    database = Database(path, wait_seconds=WAIT_SECONDS)
    try:
        with database.writing("create") as connection:
            if connection.execute("PRAGMA user_version").fetchone() != (VERSION,):
                for table in TABLES:
                    connection.execute(f"DROP TABLE IF EXISTS {table}")
                for statement in SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {VERSION}")
    except BaseException:
        database.close()
        raise
    return database


def _is_damaged(error: StorageFailure) -> bool:
    code = getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


def _text(kind: object, record: object) -> str:
    return kind.dump_json(record).decode()  # type: ignore[attr-defined,no-any-return]


def _packed(paths: Iterable[str]) -> bytes:
    return zlib.compress("\n".join(sorted(paths)).encode())


def _unpacked(data: bytes) -> frozenset[str]:
    return frozenset(zlib.decompress(data).decode().splitlines())
