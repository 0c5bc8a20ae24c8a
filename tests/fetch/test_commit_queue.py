"""What comes while a commit is under way is committed together next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fusesnap.errors import FusesnapError
from fusesnap.fetch import commit_queue
from fusesnap.fetch.commit_queue import CommitQueue
from fusesnap.fetch.unpack import Unpacker
from fusesnap.store.local_store import LocalStore, StagedPath

from ..substituter.samples import sample

MOST = 8
Stage = Callable[[str], StagedPath]
Outcomes = dict[int, FusesnapError | None]


@pytest.fixture
def stage(store: LocalStore) -> Stage:
    """Unpack a path; whoever commits it leaves it."""

    def make(name: str) -> StagedPath:
        each = sample(name)
        staged = store.stage(store.pin(each.info))
        unpacker = Unpacker(each.info, staged)
        unpacker.feed(each.file)
        unpacker.finish()
        return staged

    return make


@pytest.fixture(autouse=True)
def most_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_queue, "MOST_TOGETHER", MOST)


class SlowStore:
    """Lets a test say when the first commit goes on, and sees what is committed together."""

    def __init__(self, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[int] = []
        self.begun, self.go_on = threading.Event(), threading.Event()
        commit = store.commit

        def slowly(staged: Sequence[StagedPath]) -> list[FusesnapError | None]:
            self.groups.append(len(staged))
            self.begun.set()
            assert self.go_on.wait(30)
            return commit(staged)

        monkeypatch.setattr(store, "commit", slowly)


def staging(store: LocalStore) -> list[Path]:
    return list((store.layer.parent / "staging").iterdir())


def test_a_group_is_what_came_meanwhile(
    store: LocalStore, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, outcomes = SlowStore(store, monkeypatch), Outcomes()
    staged = [stage(f"path-{number}") for number in range(MOST + 3)]
    with CommitQueue(store, outcomes.__setitem__) as queue:
        queue.put(0, staged[0])
        assert slow.begun.wait(30)
        for number, path in enumerate(staged[1:], 1):
            queue.put(number, path)
        slow.go_on.set()
    assert slow.groups == [1, MOST, 2]
    assert outcomes == dict.fromkeys(range(len(staged)))
    assert store.counts().valid == len(staged)
    assert staging(store) == []


def test_one_that_lingers_is_committed_with_those_that_come_meanwhile(
    store: LocalStore, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the group is full, or nothing more comes; not for an hour."""
    slow, outcomes = SlowStore(store, monkeypatch), Outcomes()
    slow.go_on.set()
    staged = [stage(f"path-{number}") for number in range(MOST + 2)]
    with CommitQueue(store, outcomes.__setitem__, linger=3600.0) as queue:
        for number, path in enumerate(staged[:-2]):
            queue.put(number, path)
        assert slow.begun.wait(30)
        for number, path in enumerate(staged[-2:], MOST):
            queue.put(number, path)
    assert slow.groups == [MOST, 2]
    assert outcomes == dict.fromkeys(range(len(staged)))


def test_the_last_one_lingers_for_nobody(
    store: LocalStore, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit_queue, "LOOKS", 360_000)
    slow = SlowStore(store, monkeypatch)
    slow.go_on.set()
    with CommitQueue(store, Outcomes().__setitem__, linger=3600.0) as queue:
        queue.put(0, stage("path"))
        assert slow.begun.wait(30)


def test_what_should_not_happen_is_told_to_all_of_the_group(
    store: LocalStore,
    stage: Stage,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(staged: Sequence[StagedPath]) -> list[FusesnapError | None]:
        raise ZeroDivisionError("mine")

    monkeypatch.setattr(store, "commit", fail)
    outcomes = Outcomes()
    with CommitQueue(store, outcomes.__setitem__) as queue:
        queue.put(7, stage("a"))
    assert str(outcomes[7]) == "unexpected ZeroDivisionError: mine"
    assert "committing failed in a way that it should not" in caplog.text
    assert staging(store) == []
