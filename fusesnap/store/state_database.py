"""Our own database: which paths have an ordinal, what their narinfos say, and who waits for whom to become valid."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, TypeAlias

from fusesnap.errors import Unsupported
from fusesnap.nix.narinfo import NarInfo, parse_narinfo
from fusesnap.nix.store_path import HashPart, StoreDir, StorePath
from fusesnap.store.database import Database

SCHEMA_VERSION: Final = 3

# store_path is a base name. Ordinals are part of inode numbers, which live as long as a mount does: AUTOINCREMENT, so
# that none is ever used again. A path may be known by several NAR hashes, but is in the store with one.
_SCHEMA: Final = """
CREATE TABLE paths (
    ordinal INTEGER PRIMARY KEY AUTOINCREMENT,
    store_path TEXT NOT NULL,
    nar_hash TEXT NOT NULL,
    narinfo TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pinned', 'recorded')),
    size INTEGER,                      -- bytes on disk of what is recorded, once measured
    used INTEGER NOT NULL DEFAULT 0,   -- seconds since 1970: when it was recorded, or a root last let go of it
    UNIQUE (store_path, nar_hash)
);
CREATE UNIQUE INDEX paths_recorded ON paths (store_path) WHERE state = 'recorded';
CREATE INDEX paths_named ON paths (substr(store_path, 34)) WHERE state = 'recorded';
CREATE TABLE path_references (
    referrer INTEGER NOT NULL REFERENCES paths (ordinal) ON DELETE CASCADE,
    reference TEXT NOT NULL,
    PRIMARY KEY (referrer, reference)
) WITHOUT ROWID;
CREATE TABLE waiting (
    referrer INTEGER PRIMARY KEY REFERENCES paths (ordinal) ON DELETE CASCADE,
    missing TEXT NOT NULL
);
CREATE INDEX waiting_missing ON waiting (missing);
"""
# From one version to the next.
_UPGRADES: Final = {
    1: "ALTER TABLE paths ADD COLUMN size INTEGER;"
    " ALTER TABLE paths ADD COLUMN used INTEGER NOT NULL DEFAULT 0",
    2: "CREATE INDEX paths_named ON paths (substr(store_path, 34)) WHERE state = 'recorded'",
}


# Ordinal, state and narinfo of a path with one NAR hash.
_Row: TypeAlias = tuple[int, str, str]


class PathState(StrEnum):
    """``recorded`` is written before the path's bytes get their name in the store directory.

    So a path is committed if it is recorded and there; one that is recorded and not there never arrived.
    """

    PINNED = "pinned"
    RECORDED = "recorded"


@dataclass(frozen=True, slots=True)
class Pin:
    """A store path with one NAR hash, and the number that stands for the two in inode numbers.

    ``info`` is a narinfo that was trusted when the path was pinned.
    """

    ordinal: int
    info: NarInfo


@dataclass(frozen=True, slots=True)
class StoredPath:
    """A recorded path. ``size`` in bytes on disk, 0 where it was not measured; ``used`` in seconds since 1970."""

    ordinal: int
    base_name: str
    size: int
    used: int


class StateDatabase:
    """The file ``fusesnap.sqlite``. Methods raise :class:`StorageFailure`."""

    def __init__(self, path: Path, store_dir: StoreDir) -> None:
        """Open or create; raises :class:`Unsupported` where a version that we do not know wrote the file."""
        self._store_dir = store_dir
        self._database = Database(path)
        try:
            self._create()
        except BaseException:
            self._database.close()
            raise

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    def pins(self, infos: Iterable[NarInfo]) -> list[Pin]:
        """Return the pins of ``infos``, in their order, giving ordinals to those that have none, all or none.

        A pin follows the newest narinfo of its NAR until it is recorded; from then on it keeps the one recorded.
        """
        wanted = list(infos)
        with self._database.reading("read pins from") as connection:
            pins = self._existing_pins(connection, wanted)
        if pins is None:
            with self._database.writing("pin paths in") as connection:
                return [self._pin(connection, info) for info in wanted]
        return pins

    def pinned(self, path: StorePath) -> Pin | None:
        """Return the pin that is recorded, else the one that was made last, if there is any."""
        return self.pinned_among([path]).get(path)

    def pinned_among(self, paths: Iterable[StorePath]) -> dict[StorePath, Pin]:
        """Return those of ``paths`` for which :meth:`pinned` has a pin, with it."""
        query = (
            "SELECT ordinal, narinfo FROM paths WHERE store_path = ?"
            " ORDER BY state = 'recorded' DESC, ordinal DESC LIMIT 1"
        )
        with self._database.reading("look for paths in") as connection:
            rows = {path: connection.execute(query, (path.base_name,)).fetchone() for path in paths}
        return {path: self._pin_from(*row) for path, row in rows.items() if row is not None}

    def pin_of(self, ordinal: int) -> Pin | None:
        """Return the pin with this ordinal."""
        return self._select("ordinal = ?", ordinal)

    def recorded(self, path: StorePath) -> Pin | None:
        """Return the pin that is recorded for ``path``."""
        return self._select("store_path = ? AND state = 'recorded'", path.base_name)

    def recorded_among(self, base_names: Iterable[str]) -> set[str]:
        """Return those of ``base_names`` that are recorded."""
        query = "SELECT 1 FROM paths WHERE store_path = ? AND state = 'recorded'"
        with self._database.reading("look for paths in") as connection:
            return {name for name in base_names if connection.execute(query, (name,)).fetchone()}

    def with_hash_part(self, part: HashPart) -> StorePath | None:
        """Return the path with this hash part that is recorded, else one that is pinned."""
        pin = self._select(
            "store_path >= ? AND store_path < ? ORDER BY state = 'recorded' DESC, ordinal DESC",
            f"{part}-",
            f"{part}.",  # the next character
        )
        return None if pin is None else pin.info.store_path

    def recorded_of(self, package: str) -> list[str]:
        """Return the base names of recorded paths whose name is ``package``, or begins with it and a dash.

        The newest first.
        """
        # By the index: the unary plus keeps SQLite from going through all rows in the order of ordinals.
        query = (
            "SELECT store_path FROM paths WHERE state = 'recorded'"
            " AND substr(store_path, 34) >= ? AND substr(store_path, 34) < ? ORDER BY +ordinal DESC"
        )
        bounds = (package, f"{package}.")  # the character after the dash
        with self._database.reading("look for paths in") as connection:
            names = [str(name) for (name,) in connection.execute(query, bounds)]
        return [name for name in names if f"{name[33:]}-".startswith(f"{package}-")]

    def all_recorded(self) -> dict[str, int]:
        """Return the base names of all recorded paths with their ordinals."""
        query = "SELECT store_path, ordinal FROM paths WHERE state = 'recorded'"
        with self._database.reading("list paths in") as connection:
            return dict(connection.execute(query))

    def count(self, state: PathState) -> int:
        """Return how many rows are in ``state``."""
        query = "SELECT count(*) FROM paths WHERE state = ?"
        with self._database.reading("count paths in") as connection:
            return _number(connection.execute(query, (state,)))

    def record(self, pins: Iterable[Pin], now: int) -> None:
        """Note that verified bytes of paths are about to get their names, with what registration will need.

        All or none. ``now`` is in seconds since 1970.
        """
        with self._database.writing("record paths in") as connection:
            for pin in pins:
                _record(connection, pin, now)

    def forget_recorded(self, base_names: Iterable[str]) -> None:
        """Note that paths are not in the store. They stay pinned: a mount may still use their ordinals."""
        recorded = "SELECT ordinal FROM paths WHERE store_path = ? AND state = 'recorded'"
        forget = (
            "UPDATE paths SET state = 'pinned', size = NULL WHERE ordinal = ?",
            "DELETE FROM path_references WHERE referrer = ?",
            "DELETE FROM waiting WHERE referrer = ?",
        )
        with self._database.writing("drop paths from") as connection:
            for name in base_names:
                for row in connection.execute(recorded, (name,)).fetchall():
                    for statement in forget:
                        connection.execute(statement, row)

    def stored(self) -> list[StoredPath]:
        """Return all recorded paths, the least recently used first."""
        query = (
            "SELECT ordinal, store_path, coalesce(size, 0), used FROM paths"
            " WHERE state = 'recorded' ORDER BY used, store_path"
        )
        with self._database.reading("list paths in") as connection:
            return [StoredPath(*row) for row in connection.execute(query)]

    def references(self) -> dict[str, list[str]]:
        """Return what the recorded paths that reference anything reference, by base names."""
        query = (
            "SELECT store_path, reference FROM path_references JOIN paths ON ordinal = referrer"
            " WHERE state = 'recorded'"
        )
        references: dict[str, list[str]] = {}
        with self._database.reading("read references from") as connection:
            for referrer, reference in connection.execute(query):
                references.setdefault(referrer, []).append(reference)
        return references

    def total_size(self) -> int:
        """Return how many bytes the recorded paths take that were measured."""
        query = "SELECT coalesce(sum(size), 0) FROM paths WHERE state = 'recorded'"
        with self._database.reading("add up paths in") as connection:
            return _number(connection.execute(query))

    def unmeasured(self) -> list[StoredPath]:
        """Return the recorded paths whose size is not known."""
        query = (
            "SELECT ordinal, store_path, 0, used FROM paths WHERE state = 'recorded'"
            " AND size IS NULL ORDER BY ordinal"
        )
        with self._database.reading("list paths in") as connection:
            return [StoredPath(*row) for row in connection.execute(query)]

    def set_sizes(self, sizes: Mapping[int, int]) -> None:
        """Note by ordinal how many bytes recorded paths take on disk."""
        query = "UPDATE paths SET size = ? WHERE ordinal = ? AND state = 'recorded'"
        with self._database.writing("note sizes in") as connection:
            connection.executemany(query, [(size, ordinal) for ordinal, size in sizes.items()])

    def touch(self, base_names: Iterable[str], now: int) -> None:
        """Note that paths were in use until ``now``, in seconds since 1970."""
        query = "UPDATE paths SET used = ? WHERE store_path = ? AND state = 'recorded'"
        with self._database.writing("note the use of paths in") as connection:
            connection.executemany(query, [(now, name) for name in base_names])

    def recorded_name(self, ordinal: int) -> str | None:
        """Return the base name of this ordinal's path if it is recorded."""
        query = "SELECT store_path FROM paths WHERE ordinal = ? AND state = 'recorded'"
        with self._database.reading("look for a path in") as connection:
            row = connection.execute(query, (ordinal,)).fetchone()
        return None if row is None else str(row[0])

    def waiting_for(self, base_name: str) -> list[int]:
        """Return the ordinals of the paths that cannot become valid before ``base_name`` is."""
        query = "SELECT referrer FROM waiting WHERE missing = ?"
        with self._database.reading("look for waiting paths in") as connection:
            return [ordinal for (ordinal,) in connection.execute(query, (base_name,))]

    def awaited_by(self, ordinal: int) -> str | None:
        """Return the base name that this path was last seen to wait for."""
        query = "SELECT missing FROM waiting WHERE referrer = ?"
        with self._database.reading("look for waiting paths in") as connection:
            row = connection.execute(query, (ordinal,)).fetchone()
        return None if row is None else str(row[0])

    def first_reference(
        self, ordinal: int, wanted: Callable[[str], bool], after: str = ""
    ) -> str | None:
        """Return the first reference behind ``after``, in the order of base names, that ``wanted`` says yes to."""
        query = (
            "SELECT reference FROM path_references WHERE referrer = ? AND reference > ?"
            " ORDER BY reference"
        )
        with self._database.reading("read references from") as connection:
            names: Iterator[tuple[str]] = connection.execute(query, (ordinal, after))
            return next((name for (name,) in names if wanted(name)), None)

    def set_waiting(self, missing: Mapping[int, str]) -> None:
        """Note for each ordinal the base name that it waits for."""
        news = [item for item in missing.items() if self.awaited_by(item[0]) != item[1]]
        if news:  # a start with nothing new writes nothing, and so works on a full disk
            query = "INSERT OR REPLACE INTO waiting VALUES (?, ?)"
            with self._database.writing("note waiting paths in") as connection:
                connection.executemany(query, news)

    def clear_waiting(self, ordinals: Iterable[int]) -> None:
        """Note that paths wait no longer."""
        query = "DELETE FROM waiting WHERE referrer = ?"
        with self._database.writing("note valid paths in") as connection:
            connection.executemany(query, [(ordinal,) for ordinal in ordinals])

    def _create(self) -> None:
        with self._database.writing("create tables in") as connection:
            version = _number(connection.execute("PRAGMA user_version"))
            if version == SCHEMA_VERSION:
                return  # nothing is written, and so it can be opened on a full disk
            if version not in (0, *_UPGRADES):
                raise Unsupported(
                    f"{self._database.path} has schema version {version}, expected {SCHEMA_VERSION}:"
                    " another version of fusesnap wrote it"
                )
            steps = [_UPGRADES[step] for step in range(version, SCHEMA_VERSION) if version]
            for statement in ";".join(steps or [_SCHEMA]).split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _existing_pins(
        self, connection: sqlite3.Connection, infos: Iterable[NarInfo]
    ) -> list[Pin] | None:
        """Return the pins of ``infos`` unless there is something to write."""
        pins = []
        for info in infos:
            pin = self._kept(_row_of(connection, info), info, info.to_text())
            if pin is None:
                return None
            pins.append(pin)
        return pins

    def _kept(self, row: _Row | None, info: NarInfo, text: str) -> Pin | None:
        """The pin in ``row``, if it stays as it is; ``text`` is what ``info`` is written as."""
        if row is None:
            return None
        ordinal, state, narinfo = row
        if narinfo == text:
            return Pin(ordinal, info)
        return self._pin_from(ordinal, narinfo) if state == PathState.RECORDED else None

    def _pin(self, connection: sqlite3.Connection, info: NarInfo) -> Pin:
        # Not INSERT ... ON CONFLICT: that uses up an ordinal each time, and inode numbers have few bits for them.
        row, text = _row_of(connection, info), info.to_text()
        pin = self._kept(row, info, text)
        if pin is not None:
            return pin
        if row is None:
            insert = "INSERT INTO paths (store_path, nar_hash, narinfo, state) VALUES (?, ?, ?, 'pinned')"
            values = info.store_path.base_name, str(info.nar_hash), text
            return Pin(connection.execute(insert, values).lastrowid or 0, info)
        connection.execute("UPDATE paths SET narinfo = ? WHERE ordinal = ?", (text, row[0]))
        return Pin(row[0], info)

    def _select(self, condition: str, *values: str | int) -> Pin | None:
        query = f"SELECT ordinal, narinfo FROM paths WHERE {condition} LIMIT 1"  # noqa: S608 - all are ours
        with self._database.reading("look for a path in") as connection:
            row = connection.execute(query, values).fetchone()
        return None if row is None else self._pin_from(*row)

    def _pin_from(self, ordinal: int, narinfo: str) -> Pin:
        return Pin(ordinal, parse_narinfo(narinfo.encode(), self._store_dir))


def _record(connection: sqlite3.Connection, pin: Pin, now: int) -> None:
    # Another NAR of the path that was recorded and never arrived.
    connection.execute(
        "UPDATE paths SET state = 'pinned' WHERE store_path = ? AND state = 'recorded'",
        (pin.info.store_path.base_name,),
    )
    connection.execute(
        "UPDATE paths SET state = 'recorded', narinfo = ?, size = NULL, used = ? WHERE ordinal = ?",
        (pin.info.to_text(), now, pin.ordinal),
    )
    connection.execute("DELETE FROM path_references WHERE referrer = ?", (pin.ordinal,))
    connection.executemany(
        "INSERT OR IGNORE INTO path_references VALUES (?, ?)",
        [(pin.ordinal, reference.base_name) for reference in pin.info.references],
    )


def _row_of(connection: sqlite3.Connection, info: NarInfo) -> _Row | None:
    row: _Row | None = connection.execute(
        "SELECT ordinal, state, narinfo FROM paths WHERE store_path = ? AND nar_hash = ?",
        (info.store_path.base_name, str(info.nar_hash)),
    ).fetchone()
    return row


def _number(rows: Iterable[Sequence[int]]) -> int:
    return next(iter(rows))[0]
