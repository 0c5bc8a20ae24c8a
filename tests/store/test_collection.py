"""Collecting garbage: what goes, in which order, what stays, and what a collector that is killed leaves."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fusesnap
from fusesnap.errors import StorageFailure
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.store.collection import BATCH, EVICTION_STEPS
from fusesnap.store.local_store import LocalStore
from fusesnap.store.locks import path_lock

Make = Callable[..., Any]
Commit = Callable[..., StorePath]
Nix = Callable[..., tuple[int, str, str]]
VerifyClean = Callable[[LocalStore], None]

BIG = b"\xff" * 100_000


class Clock:
    """Each look at it is a second later."""

    def __init__(self) -> None:
        self.now = 1_700_000_000

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore.open(tmp_path / "state", StoreDir(), clock=Clock()) as opened:
        yield opened


def names(paths: tuple[StorePath, ...]) -> list[str]:
    return [path.name for path in paths]


def collectable(store: LocalStore) -> list[str]:
    return [path.base_name.partition("-")[2] for path in store.survey().collectable]


def test_without_roots_all_of_it_goes_referrers_first(
    store: LocalStore, make: Make, commit: Commit, verify_clean: VerifyClean
) -> None:
    made = [
        make("leaf", {"f": b"leaf"}),
        make("middle", {"f": b"middle"}, ["leaf", "middle"]),
        make("top", "a link", ["middle"]),
        make("alone", None, ["absent"]),
    ]
    paths = [commit(store, path) for path in made]
    store.roots.add("all", paths)
    store.roots.remove("all")
    survey = store.survey()
    assert (survey.paths, len(survey.collectable)) == (4, 4)
    assert survey.size == survey.collectable_size > 0
    shown: list[int] = []
    done = store.collect(None, lambda so_far: shown.append(so_far.size))
    assert set(done.paths) == set(paths)
    order = names(done.paths)
    assert order.index("top") < order.index("middle") < order.index("leaf")
    assert (done.size, shown) == (survey.size, [survey.size])
    assert list(store.real.iterdir()) == []
    assert list((store.layer.parent / "staging").iterdir()) == []
    assert (store.counts().committed, store.counts().valid, store.size()) == (0, 0, 0)
    verify_clean(store)
    for path in made:  # and it can come back
        commit(store, path)
    assert store.counts().valid == 3
    verify_clean(store)


def test_the_closure_of_a_root_stays_also_where_nix_knows_it_only_in_part(
    store: LocalStore, make: Make, commit: Commit, verify_clean: VerifyClean
) -> None:
    leaf = commit(store, make("leaf"))
    middle = commit(store, make("middle", None, ["leaf", "absent"]))  # committed and not valid
    top = commit(store, make("top", None, ["middle"]))
    garbage = commit(store, make("garbage", None, ["leaf"]))
    store.roots.add("one", [top])
    assert store.collect(None).paths == (garbage,)
    assert store.committed_among([leaf, middle, top, garbage]) == {leaf, middle, top}
    store.roots.remove("one")
    assert set(store.collect(None).paths) == {leaf, middle, top}
    verify_clean(store)


def test_what_a_process_keeps_stays_until_it_ends(
    store: LocalStore, make: Make, commit: Commit, tmp_path: Path
) -> None:
    kept, meanwhile = commit(store, make("kept")), commit(store, make("meanwhile"))
    with LocalStore.open(tmp_path / "state", StoreDir(), clock=lambda: 1) as other:
        other.roots.keep([kept])
        with other.roots.keeping([meanwhile]):
            assert store.collect(None).paths == ()
        assert store.collect(None).paths == (meanwhile,)
    assert store.collect(None).paths == (kept,)


def test_least_recently_used_first_and_no_more_than_is_wanted(
    store: LocalStore, make: Make, commit: Commit, verify_clean: VerifyClean
) -> None:
    old, image, new = (commit(store, make(name, {"f": BIG})) for name in ("old", "image", "new"))
    assert collectable(store) == ["old", "image", "new"]
    store.roots.add("one", [image])
    assert collectable(store) == ["old", "new"]
    store.roots.remove("one")  # in use until now
    assert collectable(store) == ["old", "new", "image"]
    size = store.size() // 3
    assert size >= len(BIG)
    assert store.collect(0).paths == ()
    assert store.collect(size).paths == (old,)
    assert store.collect(size + 1).paths == (new, image)
    assert store.collect(1).paths == ()
    verify_clean(store)


def test_a_path_goes_from_under_a_newer_referrer_which_is_valid_no_longer(
    store: LocalStore, make: Make, commit: Commit, verify_clean: VerifyClean
) -> None:
    leaf = make("leaf", {"f": BIG})
    commit(store, leaf)
    top = commit(store, make("top", None, ["leaf"]))
    assert store.counts().valid == 2
    assert names(store.collect(1).paths) == ["leaf"]
    assert (store.counts().committed, store.counts().valid) == (1, 0)
    assert store.is_committed(top)
    verify_clean(store)
    commit(store, leaf)  # whoever waits for it is valid again with it, at once
    assert store.counts().valid == 2
    verify_clean(store)


def test_more_than_a_batch(
    store: LocalStore, make: Make, commit: Commit, verify_clean: VerifyClean
) -> None:
    count = BATCH + 20
    made = [make(f"p-{number}", None, [f"p-{number - 1}"][:number]) for number in range(count)]
    paths = [commit(store, path) for path in made]
    store.roots.add("all", paths)
    store.roots.remove("all")
    shown: list[int] = []
    done = store.collect(None, lambda so_far: shown.append(len(so_far.paths)))
    assert done.paths == tuple(reversed(paths))
    assert shown == [BATCH, count]
    verify_clean(store)


def test_a_path_that_somebody_is_adding_is_left_alone(
    store: LocalStore, make: Make, commit: Commit
) -> None:
    busy, idle = commit(store, make("busy")), commit(store, make("idle"))
    with path_lock(store.real, busy.base_name):
        assert store.collect(None).paths == (idle,)
        assert store.location(busy).exists()
    assert store.collect(None).paths == (busy,)


def test_what_nix_added_is_collected_too_and_nix_agrees_on_what_lives(
    store: LocalStore,
    make: Make,
    commit: Commit,
    nix: Nix,
    verify_clean: VerifyClean,
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("content")
    (tmp_path / "dead").write_text("dead")

    def run(*words: str) -> set[str]:
        code, printed, said = nix("nix-store", "--store", store.nix_url, *words, home=tmp_path)
        assert code == 0, said
        return set(printed.split())

    (by_nix,) = run("--add", str(tmp_path / "file"))
    (dead,) = run("--add", str(tmp_path / "dead"))
    leaf = commit(store, make("leaf"))
    top = commit(store, make("top", None, ["leaf"]))
    garbage = commit(store, make("garbage", None, ["leaf"]))
    lone = commit(store, make("lone", None, ["absent"]))
    rooted = commit(store, make("rooted", None, ["absent"]))
    store.roots.add("image", [top, rooted, StoreDir().parse(by_nix)])
    collectable = {StoreDir().format(path) for path in (garbage, lone)} | {dead}
    live = {StoreDir().format(path) for path in (leaf, top, rooted)} | {by_nix}
    survey = store.survey()
    assert {f"/nix/store/{path.base_name}" for path in survey.collectable} == collectable
    assert run("--gc", "--print-live") == live
    assert run("--gc", "--print-dead") == collectable
    assert {StoreDir().format(path) for path in store.collect(None).paths} == collectable
    assert run("--gc", "--print-live") == live
    assert run("--gc", "--print-dead") == set()
    verify_clean(store)
    store.roots.remove("image")
    assert len(store.collect(None).paths) == len(live)
    assert run("--gc", "--print-live") == set()
    verify_clean(store)


def test_what_somebody_removed_is_not_counted(
    store: LocalStore, make: Make, commit: Commit, verify_clean: VerifyClean
) -> None:
    leaf = commit(store, make("leaf", {"f": BIG}))
    commit(store, make("top", {"f": BIG}, ["leaf"]))
    size = store.size()
    shutil.rmtree(store.location(leaf))
    assert (store.size(), store.survey().paths) == (size // 2, 1)
    assert (store.counts().committed, store.counts().valid) == (1, 0)
    verify_clean(store)


def test_a_path_that_came_back_while_its_tree_was_wanted(
    store: LocalStore, make: Make, commit: Commit
) -> None:
    made = make("made", {"a": b"a", "d": {"f": b"f"}})
    path = commit(store, made)
    tree = store.tree(path)
    assert tree is not None
    assert [entry.name for entry in tree.entries] == [b"", b"a", b"d", b"f"]
    store.collect(None)
    assert store.tree(path) is None
    assert not store.is_committed(path)
    commit(store, made)
    again = store.tree(path)
    assert again is not None
    assert list(again.entries) == list(tree.entries)


@pytest.mark.parametrize("how", ["a file is gone", "a file is cut", "all is gone"])
def test_a_path_that_somebody_has_changed_is_none(
    store: LocalStore,
    make: Make,
    commit: Commit,
    verify_clean: VerifyClean,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    made = make("made", {"a": b"a" * 100, "b": b"b"}, ["made"])
    path = commit(store, made)
    store.roots.add("image", [path])
    file = store.location(path) / "a"
    if how == "a file is cut":
        file.write_bytes(b"a")
    else:
        file.unlink()
    if how == "all is gone":
        (store.location(path) / "b").unlink()
        store.location(path).rmdir()
    assert store.tree(path) is None
    assert not store.is_committed(path)
    assert not store.location(path).exists()
    assert ("which somebody has changed" in caplog.text) == (how != "all is gone")
    commit(store, made)
    assert store.tree(path) is not None
    verify_clean(store)


def test_a_path_that_never_stays_the_same_is_an_error(
    store: LocalStore, make: Make, commit: Commit, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = commit(store, make("made", {"a": b"a"}))
    (store.location(path) / "a").unlink()
    with (
        path_lock(store.real, path.base_name),  # nobody can remove it
        pytest.raises(StorageFailure, match="somebody keeps changing it"),
    ):
        store.tree(path)


# Collects all that it may, again and again, until its input ends.
COLLECT_ALWAYS = """
import select, sys
from pathlib import Path
from fusesnap.nix.store_path import StoreDir
from fusesnap.store.local_store import LocalStore

with LocalStore.open(Path(sys.argv[1]) / "state", StoreDir(), clock=lambda: 1) as store:
    print("begun", flush=True)
    collected = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        collected += len(store.collect(None).paths)
print(collected)
"""


def test_a_collector_that_never_rests_takes_nothing_from_anybody(
    store: LocalStore, make: Make, commit: Commit, verify_clean: VerifyClean, tmp_path: Path
) -> None:
    closures = [
        [make(f"leaf-{n}", {"f": b"f"}), make(f"top-{n}", {"d": {"f": b"f"}}, [f"leaf-{n}"])]
        for n in range(2)
    ]
    collector = subprocess.Popen(
        [sys.executable, "-c", COLLECT_ALWAYS, str(tmp_path)],
        env={"PYTHONPATH": str(Path(fusesnap.__file__).parents[1])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert collector.stdout is not None
    assert collector.stdout.readline() == "begun\n"

    def use(closure: list[Any]) -> None:
        """Make roots, then look what is there, commit what is not, and rely on it."""
        paths = [info.store_path for info, _ in closure]
        for _ in range(30):
            with store.roots.keeping(paths):
                for made in closure:
                    commit(store, made)
                assert store.committed_among(paths) == set(paths)
                assert all(store.tree(path) is not None for path in paths)
                assert store.valid_closure(paths[1]) == sorted(paths)

    with ThreadPoolExecutor() as threads:
        for outcome in [threads.submit(use, closure) for closure in closures]:
            outcome.result()
    # Nobody keeps them now, so as soon as they are gone the collector was at work to the end.
    while any(store.location(info.store_path).exists() for pair in closures for info, _ in pair):
        assert collector.poll() is None
        time.sleep(0.01)
    printed, _ = collector.communicate("stop", timeout=60)
    assert int(printed) >= 4
    verify_clean(store)


# Collects; "<step>" is where it is killed.
COLLECT = """
import os, signal, sys
from pathlib import Path
from fusesnap.nix.store_path import StoreDir
from fusesnap.store.collection import Eviction
from fusesnap.store.local_store import LocalStore
from fusesnap.store.nix_database import Registrar
from fusesnap.store.registration import Registration
from fusesnap.store.state_database import StateDatabase

owner, method, when = sys.argv[2].split(".")

def dying(original):
    def die(*arguments, **named):
        if when == "after":
            original(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)
    return die

owner = globals()[owner]
with LocalStore.open(Path(sys.argv[1]) / "state", StoreDir(), clock=lambda: 1) as store:
    setattr(owner, method, dying(getattr(owner, method)))
    store.collect(300_000)
print("done")
"""
POINTS = [
    *(f"Eviction.{step}.{when}" for step in EVICTION_STEPS for when in ("before", "after")),
    "Registrar.invalidate.after",
    "StateDatabase.forget_recorded.after",
    "Registration.register.before",
]


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_a_path_is_there_in_full_or_gone(
    opened: Callable[[], LocalStore],
    make: Make,
    commit: Commit,
    verify_clean: VerifyClean,
    tmp_path: Path,
    point: str,
) -> None:
    """Three paths are to go, from under a referrer that was used later and stays."""
    made = [
        make("one", {"f": BIG}),
        make("two", {"d": {"f": BIG}}, ["one", "two"]),
        make("three", {"f": BIG}, ["two"]),
        make("later", {"f": b"later"}, ["three"]),
    ]
    before = opened()
    paths = [commit(before, path) for path in made]
    before.roots.add("image", paths[3:])
    before.roots.remove("image")
    before._target.state.touch([paths[3].base_name], 1_800_000_000)
    before.close()
    process = subprocess.run(
        [sys.executable, "-c", COLLECT, str(tmp_path), point],
        env={"PYTHONPATH": str(Path(fusesnap.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == -9, process.stderr
    store = opened()
    verify_clean(store)
    there = store.committed_among(paths)
    assert there in ({*paths}, {paths[3]})
    begun = {"Registrar.invalidate.after", "Eviction.invalidate.before"}
    assert (there == {*paths}) == (point in {*begun, "StateDatabase.forget_recorded.after"})
    assert store.counts().valid == (4 if len(there) == 4 else 0)
    assert {path.name for path in store.real.iterdir() if path.name[0] != "."} == {
        path.base_name for path in there
    }
    assert list((tmp_path / "state" / "staging").iterdir()) == []
    for path in made:
        commit(store, path)
    assert store.counts().valid == 4
    assert set(store.collect(None).paths) == {*paths}
    verify_clean(store)
