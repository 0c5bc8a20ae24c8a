"""What caches said of store paths, kept on disk.

As Nix keeps it (``src/libstore/nar-info-disk-cache.cc``): a narinfo for 30 days, its absence for an
hour, and what a cache says of itself for 7 days. It is only ever a saving: where the file cannot be
used, that is logged and the caches are asked.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fusesnap.errors import InvalidData
from fusesnap.nix.cache_info import CacheInfo
from fusesnap.nix.narinfo import NarInfo, parse_narinfo
from fusesnap.nix.store_path import HashPart, StoreDir, StorePath
from fusesnap.substituter.answers import read_narinfo

DAY: Final = 24 * 3600.0
_SCHEMA_VERSION: Final = 1
_SCHEMA: Final = f"""
    CREATE TABLE IF NOT EXISTS narinfos (
        url TEXT NOT NULL,
        hash_part TEXT NOT NULL,
        asked_at REAL NOT NULL,
        narinfo BLOB,
        PRIMARY KEY (url, hash_part)
    ) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS narinfos_by_age ON narinfos (asked_at);
    CREATE TABLE IF NOT EXISTS cache_infos (
        url TEXT PRIMARY KEY,
        asked_at REAL NOT NULL,
        store_dir TEXT NOT NULL,
        want_mass_query INTEGER NOT NULL,
        priority INTEGER
    ) WITHOUT ROWID;
    PRAGMA user_version = {_SCHEMA_VERSION};
"""
# Seconds that a write, in its thread, waits for another process's. With a write-ahead log a read
# waits for nobody but a process that recovers the file after a crash.
_WRITE_TIMEOUT: Final = 5.0
_READ_TIMEOUT: Final = 0.1
# An image decides how many paths are asked for. What was written is purged by age when the file is
# opened, and again after this many rows.
_PURGE_EVERY: Final = 20_000
_IN_MEMORY: Final = ":memory:"
_UNUSABLE: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})

_logger = logging.getLogger(__name__)

_Key = tuple[str, str]
_Row = tuple[float, bytes | None]
_InfoRow = tuple[float, str, bool, int | None]


class _OtherSchema(sqlite3.DatabaseError):
    """The file is of another version of fusesnap."""


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """What a cache answered: a narinfo, or that it has none (``info`` is None)."""

    info: NarInfo | None


class NarInfoCache:
    """A file that several processes may use at once; ``":memory:"`` for one that nobody keeps.

    ``clock`` gives seconds since 1970. Lookups are single reads by primary key, cheap enough for
    an event loop. What is remembered waits in memory for :meth:`flush`, which writes all of it in
    one transaction and is to be called from a thread. Whether a narinfo is trusted is not recorded
    here, because the keys may change: it is to be checked each time.
    """

    def __init__(
        self,
        path: Path | str,
        clock: Callable[[], float],
        *,
        positive_ttl: float = 30 * DAY,
        negative_ttl: float = DAY / 24,
        cache_info_ttl: float = 7 * DAY,
    ) -> None:
        self._path = str(path)
        self._clock = clock
        self._positive_ttl = positive_ttl
        self._negative_ttl = negative_ttl
        self._cache_info_ttl = cache_info_ttl
        self._pending: dict[_Key, _Row] = {}
        self._writing: dict[_Key, _Row] = {}
        self._pending_infos: dict[str, _InfoRow] = {}
        self._since_purge = 0
        self._damaged = False
        self._closed = False
        # Held for a single read or change, and while connections are exchanged: never for long.
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._writer, self._reader = self._open()

    @property
    def pending(self) -> int:
        """How many answers wait for :meth:`flush`."""
        return len(self._pending) + len(self._pending_infos)

    def answer(
        self, url: str, path: StorePath | HashPart, store_dir: StoreDir
    ) -> CachedAnswer | None:
        """What the cache ``url`` said of ``path``, or None where that is not known or too old."""
        key = (url, path.hash_part)
        row = self._unwritten(key) or self._stored(key)
        if row is None:
            return None
        asked_at, narinfo = row
        ttl = self._negative_ttl if narinfo is None else self._positive_ttl
        if not self._is_fresh(asked_at, ttl):
            return None
        if narinfo is None:
            return CachedAnswer(None)
        try:
            return CachedAnswer(read_narinfo(url, path, narinfo, store_dir))
        except InvalidData as error:  # of another name with the same hash, or damaged on disk
            _logger.info("%s: remembered narinfo is not used: %s", self._path, error)
            return None

    def newest_path(self, url: str, store_dir: StoreDir) -> StorePath | None:
        """The path that the cache ``url`` was last known to have, if any."""
        row = self._read_row(
            "SELECT narinfo FROM narinfos WHERE url = ? AND narinfo IS NOT NULL"
            " ORDER BY asked_at DESC LIMIT 1",
            (url,),
        )
        try:
            return None if row is None else parse_narinfo(row[0], store_dir).store_path
        except InvalidData:  # of another store directory, or damaged on disk
            return None

    def remember(self, url: str, path: StorePath | HashPart, info: NarInfo | None) -> None:
        """Keep an answer of the cache ``url``; None is that it has no such path."""
        narinfo = None if info is None else info.to_text().encode()
        self._change((url, path.hash_part), (self._clock(), narinfo))

    def forget(self, url: str, path: StorePath | HashPart) -> None:
        """Drop what the cache ``url`` said of ``path``."""
        # Beyond any lifetime, so that it is a miss at once and gone with the next purge.
        self._change((url, path.hash_part), (float("-inf"), None))

    def cache_info(self, url: str) -> CacheInfo | None:
        """What the cache ``url`` said of itself, or None where that is not known or too old."""
        row = self._pending_infos.get(url) or self._read_row(
            "SELECT asked_at, store_dir, want_mass_query, priority FROM cache_infos WHERE url = ?",
            (url,),
        )
        if row is None or not self._is_fresh(row[0], self._cache_info_ttl):
            return None
        return CacheInfo(row[1], bool(row[2]), row[3])

    def remember_cache_info(self, url: str, info: CacheInfo) -> None:
        """Keep what the cache ``url`` says of itself."""
        row = (self._clock(), info.store_dir, info.want_mass_query, info.priority)
        with self._lock:
            self._pending_infos[url] = row

    def flush(self) -> None:
        """Write what is pending, in one transaction. Call it from a thread."""
        with self._flushing:
            if self._closed:
                return
            with self._lock:
                self._writing, self._pending = self._pending, {}
                infos, self._pending_infos = self._pending_infos, {}
            try:
                with self._writer:
                    self._write(self._writing, infos)
            except sqlite3.Error as error:  # what it would have kept is asked for again
                self._note(error, "written")
            finally:
                self._writing = {}
            if self._damaged:
                with self._lock:
                    self._close()
                    self._writer, self._reader = self._remake()

    def close(self) -> None:
        """Write what is pending and close the file."""
        self.flush()
        with self._flushing, self._lock:
            self._closed = True
            self._close()

    def _is_fresh(self, asked_at: float, ttl: float) -> bool:
        # An answer from the future was given while the clock was wrong: it could live for ever.
        return 0 <= self._clock() - asked_at < ttl

    def _change(self, key: _Key, row: _Row) -> None:
        with self._lock:
            self._pending[key] = row

    def _unwritten(self, key: _Key) -> _Row | None:
        with self._lock:
            return self._pending.get(key) or self._writing.get(key)

    def _stored(self, key: _Key) -> _Row | None:
        row: _Row | None = self._read_row(
            "SELECT asked_at, narinfo FROM narinfos WHERE url = ? AND hash_part = ?", key
        )
        return row

    def _read_row(self, query: str, key: tuple[str, ...]) -> Any:
        try:
            with self._lock:
                return self._reader.execute(query, key).fetchone()
        except sqlite3.Error as error:
            self._note(error, "read")
            return None

    def _note(self, error: sqlite3.Error, done: str) -> None:
        _logger.warning("narinfo cache %s cannot be %s: %s", self._path, done, error)
        self._damaged = self._damaged or _is_damage(error)

    def _write(self, rows: dict[_Key, _Row], infos: dict[str, _InfoRow]) -> None:
        self._writer.executemany(
            "INSERT OR REPLACE INTO cache_infos VALUES (?, ?, ?, ?, ?)",
            [(url, *row) for url, row in infos.items()],
        )
        self._writer.executemany(
            "INSERT OR REPLACE INTO narinfos VALUES (?, ?, ?, ?)",
            [(*key, *row) for key, row in rows.items()],
        )
        self._since_purge += len(rows)
        if self._since_purge > _PURGE_EVERY:
            self._since_purge = 0
            self._purge(self._writer)

    def _purge(self, connection: sqlite3.Connection) -> None:
        now = self._clock()
        connection.execute(
            "DELETE FROM narinfos WHERE asked_at <= ? OR (asked_at <= ? AND narinfo IS NULL)",
            (now - self._positive_ttl, now - self._negative_ttl),
        )

    def _open(self) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        """Open the file; return the connection that writes and the one that reads."""
        try:
            return self._connect(self._path)
        except sqlite3.Error as error:
            _logger.warning("narinfo cache %s cannot be used: %s", self._path, error)
            return self._remake() if _is_damage(error) else self._connect(_IN_MEMORY)

    def _remake(self) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        """Throw the file away and begin anew, in memory if nothing else is possible."""
        self._damaged = False
        try:
            for suffix in ("", "-wal", "-shm"):
                Path(self._path + suffix).unlink(missing_ok=True)
            connections = self._connect(self._path)
        except (OSError, sqlite3.Error) as error:
            _logger.warning("narinfo cache %s is kept in memory: %s", self._path, error)
            return self._connect(_IN_MEMORY)
        _logger.warning("narinfo cache %s was thrown away and made anew", self._path)
        return connections

    def _connect(self, path: str) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        writer = _connection(path, _WRITE_TIMEOUT)
        try:
            _make_schema(writer)
            with writer:
                self._purge(writer)
            # A database in memory belongs to its connection.
            return writer, writer if path == _IN_MEMORY else _connection(path, _READ_TIMEOUT)
        except sqlite3.Error:
            writer.close()
            raise

    def _close(self) -> None:
        for connection in (self._reader, self._writer):
            with suppress(sqlite3.Error):  # of a damaged file, which is given up anyway
                connection.close()


def _connection(path: str, timeout: float) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=timeout, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _make_schema(connection: sqlite3.Connection) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == 0:
        connection.executescript(_SCHEMA)
    elif version != _SCHEMA_VERSION:
        raise _OtherSchema(f"its schema has version {version}, expected {_SCHEMA_VERSION}")


def _is_damage(error: sqlite3.Error) -> bool:
    """Whether the file itself is at fault, rather than a full disk or another process."""
    return isinstance(error, _OtherSchema) or getattr(error, "sqlite_errorcode", None) in _UNUSABLE
