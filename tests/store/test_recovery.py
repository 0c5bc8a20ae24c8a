from __future__ import annotations

import fcntl
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusesnap.nix.store_path import StorePath
from fusesnap.store.commit import Commit as CommitOf
from fusesnap.store.local_store import LocalStore
from fusesnap.store.recovery import RecoveryReport

Make = Callable[..., Any]
Commit = Callable[..., StorePath]
Open = Callable[[], LocalStore]
Verify = Callable[[LocalStore], None]

NOTHING = RecoveryReport(0, 0, 0, 0)


def commit_until(
    store: LocalStore, made: Any, step: str, monkeypatch: pytest.MonkeyPatch
) -> StorePath:
    """Commit as a process does that dies before ``step``."""
    info, events = made

    def die(self: CommitOf) -> None:
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(CommitOf, step, die)
        with store.stage(store.pin(info)) as staged:
            for event in events:
                staged.receive(event)
            staged.commit()
    path: StorePath = info.store_path
    return path


def test_a_sound_store_is_left_alone(opened: Open, make: Make, commit: Commit) -> None:
    store = opened()
    commit(store, make("a", {"d": {}}))
    commit(store, make("b", b"", ["absent"]))
    assert opened().recovered == NOTHING


def test_what_is_neither_recorded_nor_valid_is_removed(
    opened: Open, make: Make, verify_clean: Verify, caplog: pytest.LogCaptureFixture
) -> None:
    real = opened().real
    unknown = real / make("unknown")[0].store_path.base_name
    (unknown / "sealed").mkdir(parents=True)
    (unknown / "sealed" / "file").write_bytes(b"")
    (unknown / "sealed").chmod(0o555)
    unknown.chmod(0o555)
    link = real / make("link")[0].store_path.base_name
    link.symlink_to("/etc")
    store = opened()
    assert store.recovered == RecoveryReport(0, 2, 0, 0)
    assert list(real.iterdir()) == []
    for path in (unknown, link):
        assert f"removing {path}: neither recorded nor valid" in caplog.text
    verify_clean(store)


def test_what_belongs_to_nix_is_left_alone(opened: Open, make: Make, commit: Commit) -> None:
    store = opened()
    commit(store, make("a"))
    (store.real / ".links").mkdir()
    (store.real / "tmp-1-2").mkdir()
    entries = sorted(store.real.iterdir())
    assert opened().recovered == NOTHING
    assert sorted(store.real.iterdir()) == entries


def test_a_path_that_is_being_added_is_left_alone(opened: Open, make: Make) -> None:
    real = opened().real
    added = real / make("added")[0].store_path.base_name
    added.mkdir()
    lock = Path(f"{added}.lock")
    with lock.open("w") as held:  # as Nix does
        fcntl.flock(held, fcntl.LOCK_EX)
        assert opened().recovered == NOTHING
        assert added.exists()
        assert lock.exists()
    assert opened().recovered == RecoveryReport(0, 1, 0, 0)
    assert list(real.iterdir()) == []


def test_lock_files_of_the_dead_are_removed(opened: Open, make: Make, commit: Commit) -> None:
    store = opened()
    path = commit(store, make("a"))
    Path(f"{store.location(path)}.lock").write_bytes(b"")
    assert opened().recovered == NOTHING
    assert list(store.real.iterdir()) == [store.location(path)]


def test_staging_of_the_dead_is_removed_and_of_the_living_kept(opened: Open, make: Make) -> None:
    store = opened()
    info, events = make("living", {"a": b"1", "b": b"2"})
    leftover = store.layer.parent / "staging" / "leftover"
    (leftover / "sealed").mkdir(parents=True)
    (leftover / "sealed" / "file").write_bytes(b"")
    (leftover / "sealed").chmod(0o555)
    with store.stage(store.pin(info)) as staged:
        for event in events[:3]:
            staged.receive(event)
        assert opened().recovered == RecoveryReport(1, 0, 0, 0)
        for event in events[3:]:
            staged.receive(event)
        staged.commit()
    assert not leftover.exists()
    assert (store.location(info.store_path) / "a").read_bytes() == b"1"


def test_recorded_but_never_renamed_is_forgotten(
    opened: Open, make: Make, commit: Commit, verify_clean: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make("a", {"f": b""})
    store = opened()
    path = commit_until(store, made, "rename", monkeypatch)
    assert not store.is_committed(path)
    ordinal = store.pin(made[0]).ordinal
    store = opened()
    assert store.recovered == RecoveryReport(0, 0, 1, 0)
    assert store.counts().committed == 0
    verify_clean(store)
    assert commit(store, made) == path
    assert store.pin(made[0]).ordinal == ordinal


def test_a_commit_under_way_elsewhere_is_left_alone(
    opened: Open, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process starts between record and rename."""
    store = opened()
    info, events = make("a", {"f": b""})
    rename = CommitOf.rename
    reports = []

    def rename_after_a_start(self: CommitOf) -> None:
        reports.append(opened().recovered)
        rename(self)

    monkeypatch.setattr(CommitOf, "rename", rename_after_a_start)
    with store.stage(store.pin(info)) as staged:
        for event in events:
            staged.receive(event)
        staged.commit()
    assert reports == [NOTHING]
    assert store.is_committed(info.store_path)
    assert store.counts().valid == 1


def test_a_start_with_nothing_new_writes_nothing(opened: Open, make: Make, commit: Commit) -> None:
    """So a worker can be replaced on a full disk."""
    store = opened()
    commit(store, make("waiting", b"", ["absent"]))
    commit(store, make("valid"))
    logs = [*store.layer.parent.rglob("*.sqlite-wal")]
    before = [(log.stat().st_size, log.read_bytes()) for log in logs]
    assert len(before) == 2
    assert opened().recovered == NOTHING
    assert [(log.stat().st_size, log.read_bytes()) for log in logs] == before


def test_another_nar_may_follow_one_that_never_arrived(
    store: LocalStore, make: Make, commit: Commit, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = commit_until(store, make("a", b"one"), "rename", monkeypatch)
    commit(store, make("a", b"other"))
    pin = store.pinned(path)
    assert pin is not None
    assert pin.info == make("a", b"other")[0]
    assert store.counts().committed == 1


@pytest.mark.parametrize("step", ["seal", "flush_name", "register"])
def test_renamed_but_not_registered_is_finished(
    opened: Open, make: Make, commit: Commit, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    store = opened()
    commit(store, make("top", {"f": b""}, ["dependency"]))
    path = commit_until(store, make("dependency", {"f": b""}), step, monkeypatch)
    assert store.is_committed(path)
    assert store.counts().valid == 0
    store = opened()
    assert store.recovered == RecoveryReport(0, 0, 0, 2)
    assert store.counts().valid == 2
    assert stat.S_IMODE(store.location(path).stat().st_mode) == 0o555


def test_a_second_commit_makes_up_for_the_registration(
    store: LocalStore, make: Make, commit: Commit, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make("a")
    commit_until(store, made, "register", monkeypatch)
    commit(store, made)
    assert store.counts().valid == 1


def test_vanished_paths_are_dropped_with_what_refers_to_them(
    opened: Open,
    make: Make,
    commit: Commit,
    verify_clean: Verify,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = opened()
    leaf, middle, other = make("leaf"), make("middle", b"", ["leaf", "middle"]), make("other")
    top = make("top", b"", ["middle", "other"])
    for made in (leaf, middle, other, top):
        commit(store, made)
    assert store.counts().valid == 4
    store.location(leaf[0].store_path).unlink()
    assert not store.is_committed(leaf[0].store_path)
    ordinal = store.pin(leaf[0]).ordinal
    store = opened()
    assert store.recovered == RecoveryReport(0, 0, 1, 0)
    assert "vanished: it and its referrers, 3 paths, are no longer valid" in caplog.text
    assert store.counts().valid == 1
    assert store.is_committed(top[0].store_path)
    pin = store.pin_of(ordinal)
    assert pin is not None
    assert pin.info == leaf[0]
    verify_clean(store)
    commit(store, leaf)
    assert store.counts().valid == 4
    verify_clean(store)


def test_a_lost_database_of_ours_costs_a_fetch_and_no_more(
    opened: Open, make: Make, commit: Commit, verify_clean: Verify
) -> None:
    """As after a loss of power: the newest rows are gone, but not what was valid in Nix's database."""
    store = opened()
    valid = commit(store, make("valid"))
    waiting = commit(store, make("waiting", b"", ["absent"]))
    store.close()
    for file in store.layer.parent.glob("fusesnap.sqlite*"):
        file.unlink()
    store = opened()
    assert store.recovered == RecoveryReport(0, 1, 0, 0)
    assert store.is_committed(valid)
    assert not store.is_committed(waiting)
    verify_clean(store)
    commit(store, make("valid"))  # taken for this one, and recorded again
    assert store.counts().committed == 1


def test_a_lost_database_of_nix_is_made_again(
    opened: Open, make: Make, commit: Commit, verify_clean: Verify
) -> None:
    store = opened()
    commit(store, make("top", None, ["leaf"]))
    commit(store, make("leaf"))
    store.close()
    for file in (store.layer.parent / "nix" / "db").iterdir():
        file.unlink()
    store = opened()
    assert store.recovered == RecoveryReport(0, 0, 0, 2)
    verify_clean(store)


def test_nothing_below_a_link_is_touched(opened: Open, make: Make, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"")
    store = opened()
    leftover = store.layer.parent / "staging" / "leftover"
    leftover.mkdir()
    (leftover / "link").symlink_to(outside)
    (store.layer.parent / "staging" / "odd").symlink_to(outside)
    (store.real / make("link")[0].store_path.base_name).symlink_to(outside)
    assert opened().recovered.staging_removed == 1
    assert list(outside.iterdir()) == [outside / "file"]
