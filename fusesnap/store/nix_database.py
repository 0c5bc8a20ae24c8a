"""Nix's database: which paths are valid, in the schema that Nix has used since 2010 as version 10.

Source: ``schema.sql`` and ``local-store.cc`` in ``src/libstore`` of Nix. The rules that it rests on:

* a path is valid if and only if it has a row in ``ValidPaths``, and then its files are there, in full;
* the references of a valid path are valid too; a path may refer to itself;
* ``hash`` is the SHA-256 of the NAR in base 16, with the prefix ``sha256:``; ``path`` and ``deriver`` are full store
  paths; ``sigs`` is separated by spaces; a derivation's outputs are in ``DerivationOutputs``;
* whoever has the database open holds a shared lock on ``big-lock``, and the file ``schema`` says the version.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fusesnap.errors import InvalidData, StorageFailure, Unsupported
from fusesnap.nix.content_address import ContentAddress
from fusesnap.nix.hash import Hash
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.signature import Signature
from fusesnap.nix.store_path import HashPart, StoreDir, StorePath
from fusesnap.store.database import Database
from fusesnap.store.storage_errors import storage

SCHEMA_VERSION: Final = "10"

_SCHEMA: Final = (
    """CREATE TABLE IF NOT EXISTS ValidPaths (
        id integer PRIMARY KEY AUTOINCREMENT NOT NULL,
        path text UNIQUE NOT NULL,
        hash text NOT NULL,
        registrationTime integer NOT NULL,
        deriver text,
        narSize integer,
        ultimate integer,
        sigs text,
        ca text
    )""",
    """CREATE TABLE IF NOT EXISTS Refs (
        referrer integer NOT NULL,
        reference integer NOT NULL,
        PRIMARY KEY (referrer, reference),
        FOREIGN KEY (referrer) REFERENCES ValidPaths(id) ON DELETE CASCADE,
        FOREIGN KEY (reference) REFERENCES ValidPaths(id) ON DELETE RESTRICT
    )""",
    "CREATE INDEX IF NOT EXISTS IndexReferrer ON Refs(referrer)",
    "CREATE INDEX IF NOT EXISTS IndexReference ON Refs(reference)",
    # A reference to itself would restrict a path from ever being deleted.
    """CREATE TRIGGER IF NOT EXISTS DeleteSelfRefs BEFORE DELETE ON ValidPaths
        BEGIN DELETE FROM Refs WHERE referrer = old.id AND reference = old.id; END""",
    """CREATE TABLE IF NOT EXISTS DerivationOutputs (
        drv integer NOT NULL,
        id text NOT NULL,
        path text NOT NULL,
        PRIMARY KEY (drv, id),
        FOREIGN KEY (drv) REFERENCES ValidPaths(id) ON DELETE CASCADE
    )""",
    "CREATE INDEX IF NOT EXISTS IndexDerivationOutputs ON DerivationOutputs(path)",
)
_REFERENCES: Final = (
    "SELECT path FROM Refs JOIN ValidPaths ON reference = id WHERE referrer = ? ORDER BY path"
)
_CLOSURE: Final = """
    WITH RECURSIVE closure (id) AS (
        SELECT id FROM ValidPaths WHERE path = ?
        UNION SELECT reference FROM Refs JOIN closure ON referrer = closure.id
    )
    SELECT path FROM ValidPaths JOIN closure USING (id) ORDER BY path"""
_REFERRERS: Final = """
    WITH RECURSIVE dependents (id) AS (
        SELECT id FROM ValidPaths WHERE path = ?
        UNION SELECT referrer FROM Refs JOIN dependents ON reference = dependents.id
    )
    SELECT id, path FROM dependents JOIN ValidPaths USING (id)"""


@dataclass(frozen=True, slots=True)
class ValidPathInfo:
    """What Nix knows of a valid path.

    ``nar_size`` is in bytes, 0 where Nix does not know it; ``registration_time`` in seconds since 1970. ``ultimate``
    says that the path was built here, not substituted.
    """

    store_path: StorePath
    nar_hash: Hash
    nar_size: int
    references: tuple[StorePath, ...]
    deriver: StorePath | None
    registration_time: int
    ultimate: bool
    signatures: tuple[Signature, ...]
    ca: str | None

    def as_narinfo(self, store_dir: StoreDir) -> NarInfo:
        """This, as a cache would have said it. No file has this URL: none is asked for."""
        return NarInfo(
            store_path=self.store_path,
            url=f"nar/{self.store_path.hash_part}.nar",
            compression="none",
            file_hash=None,
            file_size=None,
            nar_hash=self.nar_hash,
            nar_size=self.nar_size,
            references=self.references,
            deriver=self.deriver,
            system=None,
            signatures=self.signatures,
            ca=self.ca,
            unknown=(),
            store_dir=store_dir,
        )


class NixDatabase:
    """The file ``db/db.sqlite`` in a state directory of Nix's. Methods raise :class:`StorageFailure`."""

    def __init__(self, nix_state: Path, store_dir: StoreDir) -> None:
        """Open or create; raises :class:`Unsupported` where the schema is of another version."""
        self._store_dir = store_dir
        self._directory = nix_state / "db"
        self._big_lock = self._take_big_lock()
        try:
            self._check_version()
            self._database = Database(self._directory / "db.sqlite")
            try:
                self._create()
            except BaseException:
                self._database.close()
                raise
        except BaseException:
            os.close(self._big_lock)
            raise

    def close(self) -> None:
        """Close the connections and let go of Nix's lock."""
        self._database.close()
        if self._big_lock >= 0:
            os.close(self._big_lock)
            self._big_lock = -1

    def valid_path_info(self, path: StorePath) -> ValidPathInfo | None:
        """Return what is registered of ``path``, None where it is not valid."""
        query = (
            "SELECT id, hash, narSize, deriver, registrationTime, ultimate, sigs, ca"
            " FROM ValidPaths WHERE path = ?"
        )
        with self._database.reading("look for a path in") as connection:
            row = connection.execute(query, (self._store_dir.format(path),)).fetchone()
            if row is None:
                return None
            references = [name for (name,) in connection.execute(_REFERENCES, row[:1])]
        _, nar_hash, nar_size, deriver, time, ultimate, signatures, ca = row
        return ValidPathInfo(
            store_path=path,
            nar_hash=Hash.parse(nar_hash),
            nar_size=nar_size or 0,
            references=tuple(map(self._store_dir.parse, references)),
            deriver=self._store_dir.parse(deriver) if deriver else None,
            registration_time=time,
            ultimate=bool(ultimate),
            signatures=tuple(map(Signature.parse, (signatures or "").split())),
            ca=ca or None,
        )

    def valid_among(self, base_names: Iterable[str]) -> set[str]:
        """Return those of ``base_names`` that are valid."""
        with self._database.reading("look for paths in") as connection:
            return {name for name in base_names if self._id(connection, name) is not None}

    def all_valid(self) -> set[str]:
        """Return the base names of all valid paths."""
        prefix = self._store_dir.path + "/"
        with self._database.reading("list paths in") as connection:
            paths = connection.execute("SELECT path FROM ValidPaths")
            return {path.removeprefix(prefix) for (path,) in paths}

    def count(self) -> int:
        """Return how many paths are valid."""
        with self._database.reading("count paths in") as connection:
            row = connection.execute("SELECT count(*) FROM ValidPaths").fetchone()
        return int(row[0])

    def with_hash_part(self, part: HashPart) -> StorePath | None:
        """Return the valid path that has this hash part."""
        first = f"{self._store_dir.path}/{part.hash_part}-"
        query = "SELECT path FROM ValidPaths WHERE path >= ? ORDER BY path LIMIT 1"
        with self._database.reading("look for a path in") as connection:
            row = connection.execute(query, (first,)).fetchone()
        return self._store_dir.parse(row[0]) if row and row[0].startswith(first) else None

    def closure(self, path: StorePath) -> list[StorePath]:
        """Return the closure of ``path``, itself included, sorted; empty where it is not valid."""
        with self._database.reading("read a closure from") as connection:
            rows = connection.execute(_CLOSURE, (self._store_dir.format(path),)).fetchall()
        return [self._store_dir.parse(text) for (text,) in rows]

    @contextmanager
    def registering(self) -> Iterator[Registrar]:
        """Give what changes the valid paths, all at the end of the ``with`` block or nothing.

        Nobody else changes them meanwhile.
        """
        with self._database.writing("register paths in") as connection:
            yield Registrar(connection, self._store_dir)

    def _id(self, connection: sqlite3.Connection, base_name: str) -> int | None:
        return _path_id(connection, f"{self._store_dir.path}/{base_name}")

    def _take_big_lock(self) -> int:
        path = self._directory / "big-lock"
        with storage("lock", path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise StorageFailure(
                    f"cannot lock {path}: Nix is upgrading this store's database", errno.EBUSY
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
        return descriptor

    def _check_version(self) -> None:
        path = self._directory / "schema"
        with storage("read", path):
            if path.exists():
                version = path.read_text("ascii", "replace").strip()
                if version != SCHEMA_VERSION:
                    raise Unsupported(
                        f"{path} says that Nix's database has schema version {version!r},"
                        f" expected {SCHEMA_VERSION!r}"
                    )

    def _create(self) -> None:
        path = self._directory / "schema"
        with storage("create", path):
            if path.exists():
                return
            with self._database.writing("create tables in") as connection:
                for statement in _SCHEMA:
                    connection.execute(statement)
            # Nix takes a database without this file for one that was never finished, so it is written last.
            unfinished = path.with_name("schema.new")
            unfinished.write_text(SCHEMA_VERSION, "ascii")
            unfinished.rename(path)


class Registrar:
    """Changes the set of valid paths within one transaction; see :meth:`NixDatabase.registering`."""

    def __init__(self, connection: sqlite3.Connection, store_dir: StoreDir) -> None:
        self._connection = connection
        self._store_dir = store_dir

    def is_valid(self, base_name: str) -> bool:
        """Tell whether a path is valid, as far as this transaction has come."""
        return _path_id(self._connection, f"{self._store_dir.path}/{base_name}") is not None

    def register(
        self, info: NarInfo, registration_time: int, outputs: Iterable[tuple[str, str]]
    ) -> None:
        """Make a path valid that is not. Its references, but for itself, must be valid.

        ``registration_time`` is in seconds since 1970; ``outputs`` are those of a derivation, as name and full path.
        """
        identifier = self._insert(info, registration_time)
        references = [
            (identifier, _path_id(self._connection, self._store_dir.format(path)))
            for path in info.references
        ]
        self._connection.executemany("INSERT OR REPLACE INTO Refs VALUES (?, ?)", references)
        self._connection.executemany(
            "INSERT OR REPLACE INTO DerivationOutputs VALUES (?, ?, ?)",
            [(identifier, name, path) for name, path in outputs],
        )

    def invalidate(self, base_name: str) -> set[str]:
        """Make a path invalid, and before it what refers to it, directly or not; return who was valid."""
        rows = self._connection.execute(
            _REFERRERS, (f"{self._store_dir.path}/{base_name}",)
        ).fetchall()
        for statement in (
            "DELETE FROM Refs WHERE referrer = ?",
            "DELETE FROM ValidPaths WHERE id = ?",
        ):
            self._connection.executemany(statement, [(identifier,) for identifier, _ in rows])
        return {self._store_dir.parse(path).base_name for _, path in rows}

    def _insert(self, info: NarInfo, registration_time: int) -> int | None:
        deriver = None if info.deriver is None else self._store_dir.format(info.deriver)
        return self._connection.execute(
            "INSERT INTO ValidPaths (path, hash, registrationTime, deriver, narSize, sigs, ca)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                self._store_dir.format(info.store_path),
                f"sha256:{info.nar_hash.base16()}",
                registration_time,
                deriver,
                info.nar_size,
                " ".join(map(str, info.signatures)) or None,
                _content_address(info),
            ),
        ).lastrowid


def _content_address(info: NarInfo) -> str | None:
    """Return the content address unless Nix could not read it: one such row would fail its every query."""
    try:
        return info.ca and str(ContentAddress.parse(info.ca))
    except InvalidData:
        return None


def _path_id(connection: sqlite3.Connection, path: str) -> int | None:
    row = connection.execute("SELECT id FROM ValidPaths WHERE path = ?", (path,)).fetchone()
    return None if row is None else int(row[0])
