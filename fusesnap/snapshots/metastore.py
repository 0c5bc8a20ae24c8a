"""What is known of snapshots, in one SQLite file: a row exists exactly as long as its snapshot does.

The order of steps makes that true after kill -9 at any instruction: a directory is there before its row is committed,
and goes after its row is gone. What no row owns is therefore rubbish, and a pass at start-up removes it.
"""

from __future__ import annotations

import errno
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from fusesnap.errors import StorageFailure, Unsupported
from fusesnap.snapshots.records import Chain
from fusesnap.snapshots.transaction import Transaction
from fusesnap.store.storage_errors import storage

VERSION: Final = 1

_SCHEMA: Final = f"""
CREATE TABLE snapshots (
    -- Names the directory. Never reused: a directory that was left behind is never taken for another's.
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE,
    parent INTEGER REFERENCES snapshots (id),
    kind TEXT NOT NULL CHECK (kind IN ('view', 'active', 'committed')),
    labels TEXT NOT NULL,                   -- JSON object of strings
    created INTEGER NOT NULL,               -- ns since the epoch
    updated INTEGER NOT NULL,
    size INTEGER NOT NULL DEFAULT 0,        -- bytes, of a committed snapshot
    inodes INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX snapshots_by_parent ON snapshots (parent);

-- The store paths that a committed snapshot, being a Nix layer, stands for.
CREATE TABLE nix_paths (
    snapshot INTEGER NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE,
    base_name TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('directory', 'directory or link', 'file', 'unknown')),
    PRIMARY KEY (snapshot, base_name)
) STRICT, WITHOUT ROWID;

-- The store paths of layers below that a committed snapshot replaces, whites out or adds to.
CREATE TABLE overridden (
    snapshot INTEGER NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE,
    base_name TEXT NOT NULL,
    completed INTEGER NOT NULL CHECK (completed IN (0, 1)),  -- adds to it: its content is in the directory "base"
    PRIMARY KEY (snapshot, base_name)
) STRICT, WITHOUT ROWID;

-- The view layers that mounts of a snapshot were answered with; of a committed snapshot, those its newest child got.
CREATE TABLE generations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    snapshot INTEGER NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE,
    closure_farm TEXT NOT NULL,
    lazy_farm TEXT NOT NULL,                -- empty for none, as the following
    files_view TEXT NOT NULL,
    lazy_layer TEXT NOT NULL,
    UNIQUE (snapshot, closure_farm, lazy_farm, files_view, lazy_layer)
) STRICT;

PRAGMA user_version = {VERSION};
"""


class Metastore:
    """The metastore of one state directory. Thread-safe; several processes may have it open.

    ``synchronous = FULL``: what was acknowledged survives a loss of power (https://www.sqlite.org/wal.html).
    """

    def __init__(self, path: Path, *, wait_seconds: float = 60.0) -> None:
        """Open the file, and create it where it is missing. Raises ``StorageFailure`` and ``Unsupported``."""
        self._path = path
        self._wait_seconds = wait_seconds
        self._writer_turn = threading.Lock()
        self._reader_turn = threading.Lock()
        # A committed snapshot's chain never changes, and its id is never another's.
        self._chains: dict[int, Chain] = {}
        with storage("open", path):
            self._writer = self._connect()
            self._create_schema()
            self._reader = self._connect()

    def close(self) -> None:
        """Close the file. Closing twice is no error."""
        self._writer.close()
        self._reader.close()

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        """Give a transaction that sees one state throughout, and never waits for a writer of another process."""
        with self._turn(self._reader_turn, "read"), storage("read", self._path):
            self._reader.execute("BEGIN")
            try:
                yield Transaction(self._reader, self._chains)
            finally:
                _roll_back(self._reader)

    @contextmanager
    def writing(self) -> Iterator[Transaction]:
        """Give the one transaction that writes; commit at the end, roll back where an exception leaves.

        Raises ``StorageFailure``, also where the turn does not come within the wait.
        """
        with self._turn(self._writer_turn, "write"), storage("write", self._path):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield Transaction(self._writer, {})  # what it sees may be rolled back
                self._writer.execute("COMMIT")
            except BaseException:
                _roll_back(self._writer)
                raise

    @contextmanager
    def _turn(self, lock: threading.Lock, operation: str) -> Iterator[None]:
        if not lock.acquire(timeout=self._wait_seconds):
            raise StorageFailure(
                f"cannot {operation} {self._path}: no turn within {self._wait_seconds} s",
                errno.EBUSY,
            )
        try:
            yield
        finally:
            lock.release()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path,
            timeout=self._wait_seconds,
            isolation_level=None,  # transactions begin and end where this module says so
            check_same_thread=False,
        )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    def _create_schema(self) -> None:
        with _closed_on_error(self._writer):
            self._writer.execute("BEGIN IMMEDIATE")
            version = int(self._writer.execute("PRAGMA user_version").fetchone()[0])
            self._check_version(version)
            if version == 0:
                for statement in _SCHEMA.split(";\n"):
                    self._writer.execute(statement)
            self._writer.execute("COMMIT")

    def _check_version(self, version: int) -> None:
        if version not in (0, VERSION):
            raise Unsupported(f"{self._path} has version {version}, expected {VERSION}")


@contextmanager
def _closed_on_error(connection: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise


def _roll_back(connection: sqlite3.Connection) -> None:
    with suppress(sqlite3.Error):  # the error that led here is the one to be told
        connection.rollback()
