from __future__ import annotations

import errno
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusesnap.errors import StorageFailure
from fusesnap.store.database import Database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "db", wait_seconds=0.05)
    with database.writing("create tables in") as connection:
        connection.execute("CREATE TABLE numbers (number INTEGER UNIQUE)")
    yield database
    database.close()


def add(database: Database, number: int) -> None:
    with database.writing("add to") as connection:
        connection.execute("INSERT INTO numbers VALUES (?)", (number,))


def numbers(database: Database) -> list[int]:
    with database.reading("read") as connection:
        return [number for (number,) in connection.execute("SELECT number FROM numbers")]


def test_what_is_written_is_read(database: Database) -> None:
    add(database, 1)
    assert numbers(database) == [1]


def test_the_settings_are_those_of_nix(database: Database) -> None:
    with database.reading("read") as connection:
        pragmas = {
            name: connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "foreign_keys", "synchronous")
        }
    assert pragmas == {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 1}


def test_an_error_rolls_back(database: Database) -> None:
    with pytest.raises(KeyError), database.writing("add to") as connection:
        connection.execute("INSERT INTO numbers VALUES (1)")
        raise KeyError
    add(database, 2)
    assert numbers(database) == [2]


def test_a_reader_sees_one_state_and_does_not_wait(database: Database) -> None:
    add(database, 1)
    with database.reading("read") as reading:
        count = "SELECT count(*) FROM numbers"
        assert reading.execute(count).fetchone() == (1,)
        with database.writing("add to") as writing:
            writing.execute("INSERT INTO numbers VALUES (2)")
            assert reading.execute(count).fetchone() == (1,)
            assert numbers(database) == [1]
        assert reading.execute(count).fetchone() == (1,)
    assert numbers(database) == [1, 2]


def test_another_process_may_not_write_for_ever(database: Database) -> None:
    other = Database(database.path)
    with other.writing("hold"), pytest.raises(StorageFailure, match="cannot add to") as caught:
        add(database, 1)
    assert caught.value.errno == errno.EBUSY
    other.close()
    add(database, 1)


def test_another_thread_may_not_write_for_ever(database: Database) -> None:
    caught: list[StorageFailure] = []

    def work() -> None:
        try:
            add(database, 1)
        except StorageFailure as error:
            caught.append(error)

    with database.writing("hold"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert [error.errno for error in caught] == [errno.EBUSY]
    add(database, 1)


def test_errors_name_the_operation_and_the_file(database: Database) -> None:
    add(database, 1)
    with pytest.raises(StorageFailure, match=r"cannot add to .*/db: UNIQUE") as caught:
        add(database, 1)
    assert caught.value.errno == errno.EIO
    assert isinstance(caught.value.__cause__, sqlite3.IntegrityError)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(StorageFailure, match=r"cannot open .*/no/db: unable to open") as caught:
        Database(tmp_path / "no" / "db")
    assert caught.value.errno == errno.EACCES


def test_a_connection_in_use_closes_when_it_is_given_back(database: Database) -> None:
    with database.reading("read") as connection:
        database.close()
        assert connection.execute("SELECT 1").fetchone() == (1,)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")
