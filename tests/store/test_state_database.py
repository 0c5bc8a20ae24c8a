from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fusesnap.errors import StorageFailure, Unsupported
from fusesnap.nix.store_path import StoreDir
from fusesnap.store.state_database import PathState, Pin, StateDatabase, StoredPath

Make = Callable[..., Any]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[StateDatabase]:
    database = StateDatabase(tmp_path / "fusesnap.sqlite", StoreDir())
    yield database
    database.close()


def test_a_pin_stands_for_path_and_nar_hash(database: StateDatabase, make: Make) -> None:
    one, _ = make("a", b"one")
    other, _ = make("a", b"other")
    first, second, again = database.pins([one, other, one])
    assert first.ordinal == again.ordinal != second.ordinal
    assert database.pins([one]) == [first]
    assert database.pin_of(first.ordinal) == Pin(first.ordinal, one)
    assert database.pin_of(second.ordinal) == Pin(second.ordinal, other)
    assert database.pin_of(99) is None
    assert database.pinned(one.store_path) == second
    unknown = make("b")[0].store_path
    assert database.pinned(unknown) is None
    assert database.pinned_among([unknown, one.store_path]) == {one.store_path: second}


def test_ordinals_are_neither_reused_nor_used_up(database: StateDatabase, make: Make) -> None:
    infos = [make(f"p-{number}")[0] for number in range(20)]
    for _ in range(5):
        assert [pin.ordinal for pin in database.pins(infos)] == list(range(1, 21))
    changed = [replace(info, url="nar/elsewhere") for info in infos]
    assert [pin.ordinal for pin in database.pins(changed)] == list(range(1, 21))
    with database._database.writing("delete from") as connection:
        connection.execute("DELETE FROM paths")
    assert database.pins([make("new")[0]])[0].ordinal == 21


def test_a_pin_follows_the_newest_narinfo_until_it_is_recorded(
    database: StateDatabase, make: Make
) -> None:
    old = make("a", None, ["b", "c"])[0]
    new = replace(old, url="nar/new", compression="xz")
    newest = replace(old, url="nar/newest")
    assert database.pins([old])[0].info == old
    pin = database.pins([new])[0]
    assert pin.info == new
    assert database.pinned(old.store_path) == pin
    database.record([pin], 5)
    assert database.pins([newest]) == [pin]
    assert database.pinned(old.store_path) == pin


def test_the_recorded_pin_comes_first(database: StateDatabase, make: Make) -> None:
    one, other = (make("a", data)[0] for data in (b"one", b"other"))
    first, second = database.pins([one, other])
    database.record([first], 5)
    assert database.pinned(one.store_path) == first == database.recorded(one.store_path)
    assert database.count(PathState.RECORDED) == database.count(PathState.PINNED) == 1
    database.record([second], 5)  # the first never arrived
    assert database.pinned(one.store_path) == second
    assert database.all_recorded() == {one.store_path.base_name: second.ordinal}
    database.forget_recorded([one.store_path.base_name])
    assert database.recorded(one.store_path) is None
    assert database.pin_of(second.ordinal) == second


def test_references_in_their_order(database: StateDatabase, make: Make) -> None:
    info = make("a", None, ["b", "c", "d"])[0]
    pin = database.pins([info])[0]
    database.record([pin], 5)
    names = [path.base_name for path in info.references]
    assert database.first_reference(pin.ordinal, lambda name: True) == names[0]
    assert database.first_reference(pin.ordinal, lambda name: True, after=names[0]) == names[1]
    assert database.first_reference(pin.ordinal, lambda name: name == names[2]) == names[2]
    assert database.first_reference(pin.ordinal, lambda name: True, after=names[2]) is None


def test_who_waits_for_whom(database: StateDatabase, make: Make) -> None:
    first, second = database.pins([make("a")[0], make("b")[0]])
    database.set_waiting({first.ordinal: "x", second.ordinal: "x"})
    assert database.waiting_for("x") == [first.ordinal, second.ordinal]
    database.set_waiting({first.ordinal: "y"})
    assert database.waiting_for("x") == [second.ordinal]
    assert database.awaited_by(first.ordinal) == "y"
    database.clear_waiting([first.ordinal, second.ordinal])
    assert database.waiting_for("x") == database.waiting_for("y") == []
    assert database.awaited_by(first.ordinal) is None


def test_threads_that_pin_the_same_paths_agree(database: StateDatabase, make: Make) -> None:
    infos = [make(f"p-{number}")[0] for number in range(30)]
    start = threading.Barrier(8)
    answers: list[list[Pin]] = []

    def work() -> None:
        start.wait()
        answers.append(database.pins(infos))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert all(answer == answers[0] for answer in answers)
    assert database.count(PathState.PINNED) == 30


def test_pins_are_made_together_or_not_at_all(database: StateDatabase, make: Make) -> None:
    good = make("good")[0]
    broken = replace(make("broken")[0], compression="\udcff")  # SQLite has no such text
    with pytest.raises(UnicodeEncodeError):
        database.pins([good, broken])
    assert database.count(PathState.PINNED) == 0


def test_pins_are_there_when_opened_again(tmp_path: Path, make: Make) -> None:
    info = make("a", None, ["b"])[0]
    for _ in range(2):
        database = StateDatabase(tmp_path / "db", StoreDir())
        assert database.pins([info]) == [Pin(1, info)]
        database.close()


def test_a_database_of_another_version_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "db")
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(Unsupported, match=r"/db has schema version 7, expected 3"):
        StateDatabase(tmp_path / "db", StoreDir())


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "db").write_bytes(b"not a database" * 100)
    with pytest.raises(StorageFailure, match=r"cannot open .*/db: file is not a database"):
        StateDatabase(tmp_path / "db", StoreDir())


def test_a_database_of_the_version_before_is_upgraded(tmp_path: Path, make: Make) -> None:
    connection = sqlite3.connect(tmp_path / "db")
    connection.executescript(
        """
        CREATE TABLE paths (
            ordinal INTEGER PRIMARY KEY AUTOINCREMENT,
            store_path TEXT NOT NULL,
            nar_hash TEXT NOT NULL,
            narinfo TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('pinned', 'recorded')),
            UNIQUE (store_path, nar_hash)
        );
        PRAGMA user_version = 1;
        """
    )
    info = make("a")[0]
    row = (info.store_path.base_name, str(info.nar_hash), info.to_text())
    connection.execute(
        "INSERT INTO paths (store_path, nar_hash, narinfo, state) VALUES (?, ?, ?, 'recorded')", row
    )
    connection.commit()
    connection.close()
    for _ in range(2):
        database = StateDatabase(tmp_path / "db", StoreDir())
        assert database.recorded(info.store_path) == Pin(1, info)
        assert database.unmeasured() == [StoredPath(1, row[0], 0, 0)]
        database.close()


def test_sizes_and_uses_are_of_what_is_recorded(database: StateDatabase, make: Make) -> None:
    a, b = database.pins([make(name)[0] for name in "ab"])
    database.record([a], 5)
    database.record([b], 7)
    names = [pin.info.store_path.base_name for pin in (a, b)]
    assert [path.ordinal for path in database.unmeasured()] == [1, 2]
    database.set_sizes({1: 4096, 2: 8192})
    database.touch(names[:1], 9)
    assert database.unmeasured() == []
    assert database.stored() == [StoredPath(2, names[1], 8192, 7), StoredPath(1, names[0], 4096, 9)]
    assert database.total_size() == 12288
    database.forget_recorded(names[:1])
    database.set_sizes({1: 1})
    assert database.total_size() == 8192
    database.record([a], 11)
    assert database.unmeasured() == [StoredPath(1, names[0], 0, 11)]


def test_recorded_paths_of_a_package_are_found_the_newest_first(
    database: StateDatabase, make: Make
) -> None:
    names = ("app-1.0", "app", "application-1.0", "app-2.0", "app-pinned", "apo-1.0", "app+x-1")
    pins = database.pins([make(name)[0] for name in names])
    database.record([pin for pin in pins if "pinned" not in pin.info.store_path.name], 1)
    found = [name[33:] for name in database.recorded_of("app")]
    assert found == ["app-2.0", "app", "app-1.0"]
