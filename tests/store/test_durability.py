"""What is flushed before a path gets its name. A test cannot cut the power; it sees what the kernel is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from fusesnap.errors import StorageFailure
from fusesnap.nix.store_path import StorePath
from fusesnap.store import durability
from fusesnap.store.durability import FSYNC_AT_MOST
from fusesnap.store.local_store import LocalStore, StagedPath

Make = Callable[..., Any]
Commit = Callable[..., StorePath]
Staged = Callable[..., AbstractContextManager[list[StagedPath]]]


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed, in order: the last part of each name, or "all" for the whole file system."""
    seen: list[str] = []
    fsync, sync_all = os.fsync, durability._sync_file_system

    def watch(descriptor: int) -> None:
        seen.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def watch_all(path: Path) -> None:
        seen.append("all")
        sync_all(path)

    monkeypatch.setattr(os, "fsync", watch)
    monkeypatch.setattr(durability, "_sync_file_system", watch_all)
    return seen


def test_a_small_path_is_flushed_file_by_file(
    store: LocalStore, make: Make, commit: Commit, flushed: list[str]
) -> None:
    tree = {"d": {"f": b"1", "l": "f"}, "g": b"2"}
    path = commit(store, make("small", tree))
    assert sorted(flushed[:-1]) == sorted(["f", "d", "g", path.base_name])
    assert flushed[-1] == ".fusesnap-store"


@pytest.mark.parametrize(("tree", "count"), [(b"file", 1), ("link", 0), ({}, 1)], ids=repr)
def test_a_single_object_is_flushed(
    store: LocalStore, make: Make, commit: Commit, flushed: list[str], tree: object, count: int
) -> None:
    path = commit(store, make("single", tree))
    assert flushed == [path.base_name] * count + [".fusesnap-store"]


def test_a_path_of_many_files_is_flushed_with_one_call(
    store: LocalStore, make: Make, commit: Commit, flushed: list[str]
) -> None:
    commit(store, make("many", {f"{number}": b"" for number in range(FSYNC_AT_MOST)}))
    assert flushed == ["all", ".fusesnap-store"]


def test_paths_that_are_committed_together_share_one_flush(
    store: LocalStore, make: Make, staged: Staged, flushed: list[str]
) -> None:
    with staged(store, *(make(f"path-{number}", {"f": b"1"}) for number in range(3))) as paths:
        assert store.commit(paths) == [None] * 3
    assert flushed == ["all", ".fusesnap-store"]


def test_a_write_that_the_disk_lost_is_no_commit(
    store: LocalStore, make: Make, commit: Commit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    made = make("lost", b"1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StorageFailure, match=r"cannot flush .*: Input/output") as caught:
            commit(store, made)
    assert caught.value.errno == 5
    assert not store.is_committed(made[0].store_path)
    assert list(store.real.iterdir()) == []
