"""The traces of a node, the recordings that are under way, and what the kernel was shown, in one file."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from fusesnap.errors import InvalidData, Unsupported
from fusesnap.fetch.traces.recording import Start
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.startup_trace import StartupTrace, merge_traces
from fusesnap.nix.startup_trace_text import format_trace, parse_trace
from fusesnap.nix.store_path import StorePath
from fusesnap.store.database import Database

log = logging.getLogger(__name__)

NAME: Final = "traces.sqlite"
SCHEMA_VERSION: Final = 2
_SCHEMA: Final = """
CREATE TABLE traces (
    closure TEXT NOT NULL,             -- 64 hexadecimal digits
    origin TEXT NOT NULL,
    trace BLOB NOT NULL,               -- the text, see docs/formats.md
    used INTEGER NOT NULL,             -- seconds since 1970
    PRIMARY KEY (closure, origin)
) WITHOUT ROWID;
CREATE TABLE recordings (
    snapshot TEXT PRIMARY KEY,
    upper TEXT,
    closure TEXT NOT NULL,
    paths TEXT NOT NULL,               -- base names, one a line
    orderly INTEGER NOT NULL,          -- the process that records ended in good order, and nothing is missing
    trace BLOB NOT NULL                -- what there is of it
) WITHOUT ROWID;
CREATE TABLE shown (ordinal INTEGER PRIMARY KEY);
CREATE TABLE boots (id TEXT PRIMARY KEY) WITHOUT ROWID
"""
_ASKED: Final = """
CREATE TABLE asked (
    closure TEXT NOT NULL,
    url TEXT NOT NULL,                 -- of a binary cache
    until INTEGER NOT NULL,            -- seconds since 1970 until which it need not be asked again
    PRIMARY KEY (closure, url)
) WITHOUT ROWID
"""
# What each version added.
_STEPS: Final = (_SCHEMA, _ASKED)
# A trace has some 50 KiB; a node that meets more images than this has forgotten the first.
KEPT_CLOSURES: Final = 1000
# Starts of one image differ little. Merging ever more of them would collect what only one in many reads.
MERGED_STARTS: Final = 8


# Seconds for which an answer that is out of date stays on disk.
ASKED_FOR: Final = 7 * 24 * 3600


class Origin(StrEnum):
    """Where a trace is from, the one to be preferred first."""

    IMPORTED = "imported"
    RECORDED = "recorded"
    CACHE = "cache"
    IMAGE = "image"


@dataclass(frozen=True, slots=True)
class StoredTrace:
    """A trace that the node has; ``used`` in seconds since 1970."""

    trace: StartupTrace
    origin: Origin
    used: int


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A recording that another process began. ``orderly``: that process missed nothing."""

    start: Start
    orderly: bool
    trace: StartupTrace


class TraceDatabase:
    """The file ``traces.sqlite``, for any number of threads and processes. Methods block, and raise ``StorageFailure``.

    A trace in it that cannot be read is no trace: it is logged, and recorded anew.
    """

    def __init__(self, path: Path) -> None:
        """Open or create; raises ``Unsupported`` where a version that we do not know wrote the file."""
        self._database = Database(path)
        try:
            with self._database.writing("create tables in") as connection:
                _create(connection, path)
        except BaseException:
            self._database.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    # ---------------------------------------------------------------- traces

    def put(self, trace: StartupTrace, origin: Origin, now: int) -> None:
        """Keep ``trace`` in place of another of the same closure and origin."""
        with self._database.writing("keep a trace in") as connection:
            _put(connection, trace, origin, now)

    def merge(self, trace: StartupTrace, now: int) -> StartupTrace:
        """Keep a recorded trace together with those recorded before, and return what is kept."""
        with self._database.writing("keep a trace in") as connection:
            row = connection.execute(
                "SELECT trace FROM traces WHERE closure = ? AND origin = ?",
                (trace.closure.hex, Origin.RECORDED),
            ).fetchone()
            before = None if row is None else _parsed(row[0])
            kept = trace if before is None else _merged(before, trace)
            _put(connection, kept, Origin.RECORDED, now)
        return kept

    def traces(self, closure: ClosureDigest | None = None) -> list[StoredTrace]:
        """The traces of ``closure``, or all; those of a closure together, the best first."""
        query = "SELECT trace, origin, used FROM traces WHERE closure LIKE ?"
        with self._database.reading("read traces from") as connection:
            rows = connection.execute(query, (closure.hex if closure else "%",)).fetchall()
        found = [
            StoredTrace(trace, Origin(origin), used)
            for text, origin, used in rows
            if (trace := _parsed(text)) is not None
        ]
        return sorted(found, key=_rank)

    def best(self, closure: ClosureDigest, now: int) -> StoredTrace | None:
        """The trace to start ``closure`` by, which is noted as used."""
        found = self.traces(closure)
        if not found:
            return None
        with self._database.writing("note the use of a trace in") as connection:
            query = "UPDATE traces SET used = ? WHERE closure = ?"
            connection.execute(query, (now, closure.hex))
        return found[0]

    def remove(self, closure: ClosureDigest) -> int:
        """Forget the traces of ``closure``, and what caches said of it; says how many traces there were."""
        with self._database.writing("remove traces from") as connection:
            connection.execute("DELETE FROM asked WHERE closure = ?", (closure.hex,))
            query = "DELETE FROM traces WHERE closure = ?"
            return connection.execute(query, (closure.hex,)).rowcount

    # ---------------------------------------------------------------- caches

    def to_be_asked(self, closure: ClosureDigest, urls: Iterable[str], now: int) -> set[str]:
        """Those of the caches at ``urls`` that were not asked for the trace of ``closure`` of late."""
        query = "SELECT url FROM asked WHERE closure = ? AND until > ?"
        with self._database.reading("read what caches said from") as connection:
            known = {url for (url,) in connection.execute(query, (closure.hex, now))}
        return set(urls) - known

    def note_answers(self, closure: ClosureDigest, until: Mapping[str, int]) -> None:
        """Caches were asked for the trace of ``closure``, and need not be asked again ``until`` then."""
        with self._database.writing("note what caches said in") as connection:
            connection.execute(
                "DELETE FROM asked WHERE until < ?", (min(until.values()) - ASKED_FOR,)
            )
            connection.executemany(
                "INSERT OR REPLACE INTO asked VALUES (?, ?, ?)",
                [(closure.hex, url, moment) for url, moment in until.items()],
            )

    # ------------------------------------------------------------ recordings

    def begin(self, start: Start, trace: StartupTrace) -> None:
        """A recording begins; ``trace`` is still empty, but has its circumstances."""
        names = "\n".join(sorted(path.base_name for path in start.paths))
        with self._database.writing("note a recording in") as connection:
            connection.execute(
                "INSERT OR REPLACE INTO recordings VALUES (?, ?, ?, ?, 0, ?)",
                (start.key, start.upper, start.closure.hex, names, format_trace(trace)),
            )

    def save(self, drafts: Mapping[str, StartupTrace], *, orderly: bool) -> None:
        """What there is of recordings, by their keys."""
        query = "UPDATE recordings SET trace = ?, orderly = ? WHERE snapshot = ?"
        with self._database.writing("save recordings in") as connection:
            connection.executemany(
                query,
                [(format_trace(trace), orderly, key) for key, trace in drafts.items()],
            )

    def end(self, key: str) -> None:
        """A recording is over."""
        with self._database.writing("end a recording in") as connection:
            connection.execute("DELETE FROM recordings WHERE snapshot = ?", (key,))

    def unfinished(self) -> list[Unfinished]:
        """What other processes were recording; from now on it counts as interrupted, unless saved again."""
        with self._database.writing("take over recordings in") as connection:
            rows = connection.execute(
                "SELECT snapshot, upper, closure, paths, orderly, trace FROM recordings"
            ).fetchall()
            connection.execute("UPDATE recordings SET orderly = 0")
        found = []
        for key, upper, closure, names, orderly, text in rows:
            paths = frozenset(map(StorePath.parse_base_name, names.splitlines()))
            trace = _parsed(text)
            if trace is not None:
                start = Start(key, upper, ClosureDigest(closure), paths, paths)
                found.append(Unfinished(start, bool(orderly), trace))
        return found

    # ------------------------------------------------------- what was shown

    def shown(self, boot: str) -> set[int]:
        """Ordinals of which the kernel may have something in its caches, since the ``boot`` of that name."""
        with self._database.writing("read what was shown from") as connection:
            if connection.execute("SELECT 1 FROM boots WHERE id = ?", (boot,)).fetchone() is None:
                connection.execute("DELETE FROM boots")
                connection.execute("DELETE FROM shown")
                connection.execute("INSERT INTO boots VALUES (?)", (boot,))
            return {ordinal for (ordinal,) in connection.execute("SELECT ordinal FROM shown")}

    def add_shown(self, ordinals: Iterable[int]) -> None:
        """The kernel was shown something of these."""
        with self._database.writing("note what was shown in") as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO shown VALUES (?)", [(ordinal,) for ordinal in ordinals]
            )


def _create(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise Unsupported(
            f"{path} has schema version {version}, expected at most {SCHEMA_VERSION}:"
            " another version of fusesnap wrote it"
        )
    for step in _STEPS[version:]:
        for statement in step.split(";"):
            connection.execute(statement)
    if version < SCHEMA_VERSION:  # nothing is written where nothing is new: the disk may be full
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _rank(stored: StoredTrace) -> tuple[str, bool, int]:
    circumstances = stored.trace.circumstances
    return (
        stored.trace.closure.hex,
        not circumstances.complete,
        list(Origin).index(stored.origin),
    )


def _merged(before: StartupTrace, trace: StartupTrace) -> StartupTrace:
    enough = before.circumstances.starts >= MERGED_STARTS
    if enough and (before.circumstances.complete or not trace.circumstances.complete):
        return before
    try:
        return merge_traces([before, trace])
    except (
        InvalidData
    ) as error:  # a path is another NAR by now, or it would be too much: the newer counts
        log.info("%s: recorded anew: %s", trace.closure, error)
        return trace


def _put(connection: sqlite3.Connection, trace: StartupTrace, origin: Origin, now: int) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO traces VALUES (?, ?, ?, ?)",
        (trace.closure.hex, origin, format_trace(trace), now),
    )
    connection.execute(
        "DELETE FROM traces WHERE closure NOT IN (SELECT closure FROM traces GROUP BY closure"
        " ORDER BY max(used) DESC LIMIT ?)",
        (KEPT_CLOSURES,),
    )


def _parsed(text: bytes) -> StartupTrace | None:
    try:
        return parse_trace(text)
    except InvalidData as error:
        log.warning("a trace in the database is not used: %s", error)
        return None
