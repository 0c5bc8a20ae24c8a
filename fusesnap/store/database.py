"""An SQLite file with transactions as context managers, for several threads and several processes."""

from __future__ import annotations

import errno
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from fusesnap.errors import StorageFailure
from fusesnap.store.storage_errors import storage

# Transactions of ours take milliseconds; Nix's garbage collector may hold its own for seconds.
WAIT_SECONDS: Final = 60.0


class Database:
    """One SQLite file in write-ahead-log mode: writers take turns, and readers never wait for them.

    The mode is also Nix's own (its setting ``use-sqlite-wal``), so that Nix may have the file open at the same time.
    ``synchronous = NORMAL``: a transaction survives the death of any process, kill -9 included. After a loss of power
    the newest transactions may be gone, but never the file's consistency (https://www.sqlite.org/wal.html).
    """

    def __init__(self, path: Path, *, wait_seconds: float = WAIT_SECONDS) -> None:
        """Open the file, and create it where it is missing. Raises :class:`StorageFailure`."""
        self.path = path
        self._wait_seconds = wait_seconds
        self._turn = threading.Lock()
        self._idle_lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        with storage("open", path):
            self._writer = self._connect()

    def close(self) -> None:
        """Close the connections; one that is being read closes when its reader is done."""
        with self._idle_lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in (*idle, self._writer):
            connection.close()

    @contextmanager
    def reading(self, operation: str) -> Iterator[sqlite3.Connection]:
        """Give a connection that sees one state of the database throughout.

        ``operation`` completes the sentence "cannot ..." of a :class:`StorageFailure`.
        """
        with storage(operation, self.path):
            connection = self._take()
            try:
                connection.execute("BEGIN")
                yield connection
            finally:
                self._give_back(connection)

    @contextmanager
    def writing(self, operation: str) -> Iterator[sqlite3.Connection]:
        """Give the connection that writes; commit at the end, roll back where an exception leaves.

        Raises :class:`StorageFailure`, also where the turn does not come within the wait.
        """
        if not self._turn.acquire(timeout=self._wait_seconds):
            raise StorageFailure(
                f"cannot {operation} {self.path}: another thread writes for {self._wait_seconds} s",
                errno.EBUSY,
            )
        try:
            with storage(operation, self.path):
                self._writer.execute("BEGIN IMMEDIATE")
                try:
                    yield self._writer
                    self._writer.execute("COMMIT")
                except BaseException:
                    _roll_back(self._writer)
                    raise
        finally:
            self._turn.release()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path,
            timeout=self._wait_seconds,
            isolation_level=None,  # transactions begin and end where this module says so
            check_same_thread=False,
        )
        try:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = NORMAL")
            if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                connection.execute("PRAGMA journal_mode = WAL")
        except BaseException:
            connection.close()
            raise
        return connection

    def _take(self) -> sqlite3.Connection:
        with self._idle_lock:
            if self._idle:
                return self._idle.pop()
        return self._connect()

    def _give_back(self, connection: sqlite3.Connection) -> None:
        _roll_back(connection)
        with self._idle_lock:
            if not self._closed and not connection.in_transaction:
                self._idle.append(connection)
                return
        connection.close()


def _roll_back(connection: sqlite3.Connection) -> None:
    """End the transaction, if there still is one: SQLite has ended it itself after some errors."""
    with suppress(sqlite3.Error):  # the error that led here is the one to be told
        connection.rollback()
