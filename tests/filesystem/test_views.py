"""Views: a number a set of paths, for every process, and never a number that an inode cannot hold."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from fusesnap.errors import StorageFailure, Unsupported
from fusesnap.filesystem.inode import MAX_VIEW
from fusesnap.filesystem.views import KEPT, Views
from fusesnap.nix.store_path import StorePath

ONE = StorePath("0" * 32, "one")
TWO = StorePath("1" * 32, "two")


def test_a_set_of_paths_has_one_number_for_every_process(tmp_path: Path) -> None:
    ours, theirs = Views(tmp_path / "views.sqlite"), Views(tmp_path / "views.sqlite")
    number = ours.ordinal([ONE, TWO])
    assert theirs.ordinal([TWO, ONE]) == number
    assert theirs.ordinal([TWO]) == number + 1
    assert theirs.paths(number) == frozenset({ONE, TWO})
    assert ours.paths(number + 1) == frozenset({TWO})
    assert ours.paths(number + 2) is None
    ours.close()
    theirs.close()


def test_a_number_that_no_inode_can_hold_is_refused(tmp_path: Path) -> None:
    views = Views(tmp_path / "views.sqlite")
    first = views.ordinal([ONE])
    with sqlite3.connect(tmp_path / "views.sqlite") as database:
        database.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'views'", (MAX_VIEW,))
    database.close()
    with pytest.raises(Unsupported, match=f"view {MAX_VIEW + 1} is beyond {MAX_VIEW}"):
        views.ordinal([TWO])
    with pytest.raises(Unsupported, match=f"view {MAX_VIEW + 1} is beyond {MAX_VIEW}"):
        views.ordinal([TWO])
    assert views.ordinal([ONE]) == first
    views.close()


def test_of_many_views_each_shows_its_own(tmp_path: Path) -> None:
    views = Views(tmp_path / "views.sqlite")
    paths = [StorePath(ONE.hash_part, f"path-{number}") for number in range(2 * KEPT)]
    ordinals = [views.ordinal([path]) for path in paths]
    for _ in range(2):
        assert [views.paths(ordinal) for ordinal in ordinals] == [
            frozenset([path]) for path in paths
        ]
    views.close()


def test_a_database_that_cannot_be_used_is_a_storage_failure(tmp_path: Path) -> None:
    (tmp_path / "views.sqlite").write_bytes(b"not a database" * 1000)
    with pytest.raises(
        StorageFailure, match=r"cannot open .*views\.sqlite: file is not a database"
    ):
        Views(tmp_path / "views.sqlite")
    views = Views(tmp_path / "other.sqlite")
    with sqlite3.connect(tmp_path / "other.sqlite") as database:
        database.execute("DROP TABLE views")
    database.close()
    with pytest.raises(StorageFailure, match=r"cannot number a view in .*other\.sqlite"):
        views.ordinal([ONE])
    with pytest.raises(StorageFailure, match=r"cannot look for a view in .*other\.sqlite"):
        views.paths(1)
    views.close()
