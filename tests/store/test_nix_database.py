from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fusesnap.errors import StorageFailure, Unsupported
from fusesnap.nix.signature import Signature
from fusesnap.nix.store_path import StoreDir
from fusesnap.store.nix_database import NixDatabase, ValidPathInfo

Make = Callable[..., Any]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "db").mkdir()
    return tmp_path


@pytest.fixture
def database(state: Path) -> Iterator[NixDatabase]:
    database = NixDatabase(state, StoreDir())
    yield database
    database.close()


def register(database: NixDatabase, *infos: Any) -> None:
    with database.registering() as registrar:
        for info in infos:
            registrar.register(info, 7, [])


def schema_of(path: Path) -> set[tuple[str, ...]]:
    """Tables with their columns, indexes and triggers, whatever their spelling."""
    with closing(sqlite3.connect(path)) as connection:
        names = connection.execute("SELECT type, name FROM sqlite_master").fetchall()
        described: set[tuple[str, ...]] = {(kind, name) for kind, name in names}
        for kind, table in names:
            if kind == "table":
                for pragma in ("table_info", "foreign_key_list", "index_list"):
                    rows = connection.execute(f"PRAGMA {pragma}({table})").fetchall()
                    described |= {(pragma, table, *map(str, row)) for row in rows}
    return described


def test_the_schema_is_the_one_of_nix(
    state: Path, database: NixDatabase, nix: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    url = f"local?store=/nix/store&real={theirs}/real&state={theirs}/state&log={theirs}/log"
    code, _, said = nix("nix-store", "--store", url, "--init", home=tmp_path)
    assert code == 0, said
    assert schema_of(state / "db/db.sqlite") == schema_of(theirs / "state/db/db.sqlite")
    version = (theirs / "state/db/schema").read_bytes()
    assert (state / "db/schema").read_bytes() == version


def test_what_is_registered_is_found_again(database: NixDatabase, make: Make) -> None:
    leaf = make("leaf")[0]
    deriver = make("top.drv")[0].store_path
    top = replace(
        make("top", None, ["leaf", "top"])[0],
        deriver=deriver,
        signatures=(Signature("a-1", b"1"), Signature("b-1", b"2")),
        ca=f"fixed:r:sha256:{'0' * 52}",
    )
    register(database, leaf, top)
    assert database.valid_path_info(top.store_path) == ValidPathInfo(
        store_path=top.store_path,
        nar_hash=top.nar_hash,
        nar_size=top.nar_size,
        references=top.references,
        deriver=deriver,
        registration_time=7,
        ultimate=False,
        signatures=top.signatures,
        ca=top.ca,
    )
    assert database.closure(top.store_path) == sorted([leaf.store_path, top.store_path])
    names = [leaf.store_path.base_name, top.store_path.base_name]
    assert database.all_valid() == set(names) == database.valid_among([*names, "absent"])
    assert database.count() == 2


def test_nothing_is_valid_before_its_references(database: NixDatabase, make: Make) -> None:
    with pytest.raises(StorageFailure, match=r"cannot register paths in .*NOT NULL"):
        register(database, make("leaf")[0], make("top", None, ["absent"])[0])
    assert database.count() == 0


def test_an_error_within_registers_nothing(database: NixDatabase, make: Make) -> None:
    with pytest.raises(KeyError), database.registering() as registrar:
        registrar.register(make("a")[0], 1, [])
        raise KeyError
    assert database.count() == 0


def test_what_refers_to_an_invalid_path_is_invalid(database: NixDatabase, make: Make) -> None:
    leaf, other = make("leaf")[0], make("other")[0]
    middle = make("middle", None, ["leaf", "middle"])[0]
    register(database, leaf, other, middle, make("top", None, ["middle", "other"])[0])
    with database.registering() as registrar:
        assert len(registrar.invalidate(leaf.store_path.base_name)) == 3
        assert registrar.invalidate(leaf.store_path.base_name) == set()
    assert database.all_valid() == {other.store_path.base_name}


def test_another_schema_is_refused(state: Path) -> None:
    (state / "db" / "schema").write_text("11")
    with pytest.raises(Unsupported, match=r"schema says .* version '11', expected '10'"):
        NixDatabase(state, StoreDir())


def test_a_database_that_nix_upgrades_is_refused(state: Path) -> None:
    with (state / "db" / "big-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StorageFailure, match="Nix is upgrading"):
            NixDatabase(state, StoreDir())
    NixDatabase(state, StoreDir()).close()


def test_nix_is_kept_from_upgrading_while_it_is_open(state: Path, database: NixDatabase) -> None:
    with (state / "db" / "big-lock").open("w") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        database.close()
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_an_unfinished_database_is_finished(state: Path, database: NixDatabase) -> None:
    database.close()
    (state / "db" / "schema").unlink()
    again = NixDatabase(state, StoreDir())
    assert again.count() == 0
    again.close()
