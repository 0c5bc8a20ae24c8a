"""Several paths are committed together: one after the other is what it must look like."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fusesnap.errors import ContentMismatch, InvalidData, StorageFailure
from fusesnap.nix.store_path import StorePath
from fusesnap.store import durability
from fusesnap.store.commit import COMMIT_STEPS
from fusesnap.store.commit import Commit as CommitOf
from fusesnap.store.local_store import LocalStore, StagedPath
from fusesnap.store.locks import path_lock
from fusesnap.store.nix_database import Registrar
from fusesnap.store.state_database import StateDatabase

Make = Callable[..., Any]
Commit = Callable[..., StorePath]
Staged = Callable[..., AbstractContextManager[list[StagedPath]]]
Verify = Callable[[LocalStore], None]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that are taken."""
    seen: list[str] = []

    def watch(step: str) -> None:
        original = getattr(CommitOf, step)

        def wrapper(self: CommitOf) -> None:
            seen.append(step)
            original(self)

        monkeypatch.setattr(CommitOf, step, wrapper)

    for step in COMMIT_STEPS:
        watch(step)
    return seen


def names(store: LocalStore) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in store.real.iterdir())


def test_the_steps_of_a_commit_come_in_their_order(
    store: LocalStore, make: Make, commit: Commit, steps: list[str]
) -> None:
    """The drill that kills between them relies on it."""
    commit(store, make("steps"))
    assert tuple(steps) == COMMIT_STEPS


def test_a_group_takes_each_step_once(
    store: LocalStore, make: Make, staged: Staged, steps: list[str], verify_clean: Verify
) -> None:
    group = [make("a", {"f": b"a"}, ["b"]), make("b", b"b", ["c"]), make("c", "target")]
    with staged(store, *group) as paths:
        assert store.commit(paths) == [None] * 3
    assert tuple(steps) == COMMIT_STEPS
    assert names(store) == ["a", "b", "c"]
    assert store.counts().valid == 3
    verify_clean(store)


def test_a_large_group_is_locked_piece_by_piece_and_flushed_once(
    store: LocalStore,
    make: Make,
    staged: Staged,
    steps: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fusesnap.store.commit.LOCKED_TOGETHER", 2)
    with staged(store, *(make(name, {"f": b""}) for name in "abcde")) as paths:
        assert store.commit(paths) == [None] * 5
    naming = ["record", "rename", "seal"]
    assert steps == ["flush", *naming * 3, "flush_name", "register"]
    assert names(store) == list("abcde")
    assert all(path.stat().st_mode & 0o777 == 0o555 for path in store.real.iterdir())
    assert store.counts().valid == 5


def test_contents_are_on_the_disk_before_names_and_names_before_nix_hears_of_them(
    store: LocalStore, make: Make, staged: Staged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a loss of power leaves depends on this order alone."""
    seen: list[str] = []

    def watch(owner: object, name: str, what: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def wrapper(*arguments: Any) -> Any:
            seen.append(what(*arguments))
            return original(*arguments)

        monkeypatch.setattr(owner, name, wrapper)

    with staged(store, make("a", {"f": b""}, ["b"]), make("b", b"")) as paths:
        watch(durability, "_sync_file_system", lambda _: "contents")
        watch(StateDatabase, "record", lambda _, pins, __: f"record {len(pins)}")
        watch(Path, "rename", lambda _, target: f"rename {target.name.partition('-')[2]}")
        watch(os, "fsync", lambda descriptor: Path(f"/proc/self/fd/{descriptor}").readlink().name)
        watch(Registrar, "register", lambda _, info, *__: f"register {info.store_path.name}")
        assert store.commit(paths) == [None, None]
    before, after = seen[:-3], seen[-3:]
    assert before[:2] == ["contents", "record 2"]
    assert sorted(before[2:]) == ["rename a", "rename b"]
    assert after == [".fusesnap-store", "register b", "register a"]


def test_one_that_is_not_what_it_was_fails_alone(
    store: LocalStore, make: Make, commit: Commit, staged: Staged, verify_clean: Verify
) -> None:
    commit(store, make("twice", b"one"))
    group = [make("a", {"f": b"a"}), make("twice", b"other"), make("z", b"z", ["a"])]
    with staged(store, *group) as paths:
        first, second, third = store.commit(paths)
    assert isinstance(second, ContentMismatch)
    assert "twice is in the store with NAR hash sha256:" in str(second)
    assert (first, third) == (None, None)
    assert names(store) == ["a", "twice", "z"]
    assert store.counts().valid == 3
    verify_clean(store)


def test_one_whose_nar_has_not_ended_fails_alone(
    store: LocalStore, make: Make, staged: Staged
) -> None:
    info, events = make("early", b"contents")
    with staged(store, make("a"), (info, events[:-1])) as paths:
        first, second = store.commit(paths)
    assert first is None
    assert isinstance(second, InvalidData)
    assert names(store) == ["a"]


def test_one_that_cannot_be_renamed_fails_alone(
    store: LocalStore,
    make: Make,
    staged: Staged,
    monkeypatch: pytest.MonkeyPatch,
    verify_clean: Verify,
) -> None:
    """Those that had their names by then are whole, sealed and valid."""
    rename = Path.rename

    def rename_or_fail(self: Path, target: Path) -> Path:
        if target.name.endswith("-b"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    group = [make(name, {"f": name.encode()}) for name in "abc"]
    with staged(store, *group) as paths:
        monkeypatch.setattr(Path, "rename", rename_or_fail)
        first, second, third = store.commit(paths)
        monkeypatch.undo()
    assert (first, third) == (None, None)
    assert isinstance(second, StorageFailure)
    assert second.errno == errno.ENOSPC
    assert names(store) == ["a", "c"]
    assert all(path.stat().st_mode & 0o777 == 0o555 for path in store.real.iterdir())
    assert store.counts().valid == 2
    verify_clean(store)


def test_one_that_another_adds_is_waited_for_after_the_others(
    store: LocalStore, make: Make, staged: Staged, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = [make("a"), make("b")]
    held = path_lock(store.real, group[0][0].store_path.base_name)
    taken: list[str] = []

    def lock(real: Path, base_name: str) -> AbstractContextManager[None]:
        if not taken:
            held.__exit__(None, None, None)
        taken.append(base_name)
        return path_lock(real, base_name)

    monkeypatch.setattr("fusesnap.store.commit.path_lock", lock)
    held.__enter__()
    with staged(store, *group) as paths:
        assert store.commit(paths) == [None, None]
    assert taken == [info.store_path.base_name for info, _ in group]
    assert names(store) == ["a", "b"]


def test_the_same_path_twice_in_a_group(store: LocalStore, make: Make, staged: Staged) -> None:
    with staged(store, make("a", {"f": b""}), make("a", {"f": b""})) as paths:
        assert store.commit(paths) == [None, None]
    assert names(store) == ["a"]
    assert store.counts().valid == 1


def test_a_row_that_cannot_be_written_fails_alone(
    store: LocalStore, make: Make, staged: Staged, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = StateDatabase.record

    def record_or_fail(self: StateDatabase, pins: Any, now: int) -> None:
        if any(pin.info.store_path.name == "b" for pin in pins):
            raise StorageFailure("no room", errno.ENOSPC)
        record(self, pins, now)

    monkeypatch.setattr(StateDatabase, "record", record_or_fail)
    with staged(store, make("a"), make("b"), make("c")) as paths:
        outcomes = store.commit(paths)
    assert [outcome is None for outcome in outcomes] == [True, False, True]
    assert names(store) == ["a", "c"]


def test_nothing_is_no_commit(store: LocalStore, steps: list[str]) -> None:
    assert store.commit([]) == []
    assert steps == []


def test_an_unexpected_error_is_not_hidden(
    store: LocalStore, make: Make, staged: Staged, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: CommitOf) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(CommitOf, "record", fail)
    info, events = make("a")
    other = replace(info, store_path=StorePath("0" * 32, "b"))
    with staged(store, (info, events), (other, events)) as paths, pytest.raises(ZeroDivisionError):
        store.commit(paths)
    assert names(store) == []
