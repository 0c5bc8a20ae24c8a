"""Views: which paths each ``files`` layer of a container's overlay shows.

A view is a set of store paths under a number that is never reused. The services process writes them, the worker reads
them: they meet in this database.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path

from fusesnap.errors import Unsupported
from fusesnap.filesystem.inode import MAX_VIEW
from fusesnap.nix.store_path import StorePath
from fusesnap.store.storage_errors import storage

# What a view shows is looked up for each name in it; each holds some 100 bytes a path. More are not in use at once.
KEPT = 256

SCHEMA = """
CREATE TABLE IF NOT EXISTS views (
    ordinal INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE,      -- SHA-256 of the sorted paths, one a line
    paths TEXT NOT NULL            -- sorted base names, one a line
);
"""


class Views:
    """The views of one state directory. Thread-safe; each call is one short statement.

    Methods raise ``StorageFailure``.
    """

    def __init__(self, database: Path) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._known: dict[int, frozenset[StorePath]] = {}
        with storage("open", database):
            self._connection = sqlite3.connect(
                database, isolation_level=None, check_same_thread=False, timeout=30
            )
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.executescript(SCHEMA)

    def ordinal(self, paths: Iterable[StorePath]) -> int:
        """The number of the view that shows exactly ``paths``.

        Raises ``Unsupported`` where the numbers are used up: an inode has no room for more.
        """
        text = "\n".join(sorted(path.base_name for path in paths))
        key = hashlib.sha256(text.encode()).hexdigest()
        with self._lock, storage("number a view in", self._database):
            known = self._ordinal_of(key)
            if known is None:
                # Not for each question: a view that is known can be had on a full disk too.
                self._connection.execute(
                    "INSERT OR IGNORE INTO views (key, paths) VALUES (?, ?)", (key, text)
                )
                known = self._ordinal_of(key) or 0
        if known > MAX_VIEW:
            # Answered nevertheless, it would be a layer of which the kernel says "no such file".
            raise Unsupported(
                f"{self._database}: view {known} is beyond {MAX_VIEW}, the last that an inode number can hold: "
                "start with a new state directory"
            )
        return known

    def _ordinal_of(self, key: str) -> int | None:
        row = self._connection.execute("SELECT ordinal FROM views WHERE key = ?", (key,)).fetchone()
        return None if row is None else int(row[0])

    def paths(self, ordinal: int) -> frozenset[StorePath] | None:
        """What view ``ordinal`` shows; ``None`` if there is no such view. A view never changes."""
        known = self._known.get(ordinal)
        if known is not None:
            return known
        with self._lock, storage("look for a view in", self._database):
            row = self._connection.execute(
                "SELECT paths FROM views WHERE ordinal = ?", (ordinal,)
            ).fetchone()
        if row is None:
            return None
        paths = frozenset(StorePath.parse_base_name(line) for line in row[0].splitlines())
        if len(self._known) >= KEPT:
            self._known.clear()
        self._known[ordinal] = paths
        return paths

    def close(self) -> None:
        """Close the database."""
        self._connection.close()
