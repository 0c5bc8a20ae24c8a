"""Roots: what our collector and Nix's leave alone, and the lock between collectors and those who add roots."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fusesnap
from fusesnap.errors import StorageFailure
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.store.collector_lock import CollectorLock
from fusesnap.store.local_store import LocalStore
from fusesnap.store.roots import read_permanent_roots
from fusesnap.store.temporary_roots import TemporaryRoots, read_temporary_roots

Make = Callable[..., Any]
Commit = Callable[..., StorePath]
Nix = Callable[..., tuple[int, str, str]]

# Holds a temporary root in a process of its own, until its input ends.
HOLD = """
import sys
from pathlib import Path
from fusesnap.nix.store_path import StoreDir
from fusesnap.store.collector_lock import CollectorLock
from fusesnap.store.temporary_roots import TemporaryRoots

nix = Path(sys.argv[1])
held = TemporaryRoots(nix, StoreDir(), CollectorLock(nix))
held.hold("test", sys.argv[2:])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def nix_state(tmp_path: Path) -> Path:
    state = tmp_path / "nix"
    (state / "temproots").mkdir(parents=True)
    (state / "profiles").mkdir()
    (state / "gcroots").mkdir()
    return state


@pytest.fixture
def temporary(nix_state: Path) -> Iterator[TemporaryRoots]:
    made = TemporaryRoots(nix_state, StoreDir(), CollectorLock(nix_state))
    yield made
    made.close()


def name_of(make: Make, name: str) -> str:
    path: StorePath = make(name)[0].store_path
    return path.base_name


def temporaries(nix_state: Path) -> set[str]:
    with CollectorLock(nix_state).collecting():
        return read_temporary_roots(nix_state, StoreDir())


def test_temporary_roots_last_as_long_as_one_owner_holds_them(
    nix_state: Path, temporary: TemporaryRoots, make: Make
) -> None:
    a, b, c = (name_of(make, name) for name in "abc")
    assert temporaries(nix_state) == set()
    temporary.hold("one", [a, b])
    temporary.hold("other", [b])
    temporary.hold("one", [c])
    assert temporaries(nix_state) == {a, b, c}
    temporary.drop("one")
    temporary.drop("one")
    assert temporaries(nix_state) == {b}
    temporary.hold("one", [a])
    assert temporaries(nix_state) == {a, b}
    temporary.close()
    assert list((nix_state / "temproots").iterdir()) == []


def test_what_others_hold_is_held_and_dropped_at_once(
    nix_state: Path, temporary: TemporaryRoots, make: Make
) -> None:
    """Nothing is written for it, so nobody is waited for; and it stays when the others let go."""
    a, b = (make(name)[0].store_path.base_name for name in "ab")
    assert not temporary.hold_with_others("late", [a])
    temporary.hold("first", [a])
    (file,) = (nix_state / "temproots").iterdir()
    written = file.stat().st_mtime_ns
    assert temporary.hold_with_others("late", [a])
    assert not temporary.hold_with_others("both", [a, b])
    temporary.hold("late", [])
    assert file.stat().st_mtime_ns == written
    temporary.drop("first")
    assert read_temporary_roots(nix_state, StoreDir()) == {a}
    assert not temporary.drop_with_others("late")
    temporary.hold("again", [a])
    assert temporary.drop_with_others("late")
    assert read_temporary_roots(nix_state, StoreDir()) == {a}
    temporary.drop("again")
    assert read_temporary_roots(nix_state, StoreDir()) == set()


def test_nobody_is_waited_for_who_waits_for_a_collector(
    temporary: TemporaryRoots, make: Make
) -> None:
    name = make("a")[0].store_path.base_name
    temporary.hold("one", [name])
    with temporary._turn:
        assert not temporary.hold_with_others("other", [name])
        assert not temporary.drop_with_others("one")


def test_two_stores_of_one_process_hold_their_own(nix_state: Path, make: Make) -> None:
    stores = [TemporaryRoots(nix_state, StoreDir(), CollectorLock(nix_state)) for _ in range(2)]
    a, b = name_of(make, "a"), name_of(make, "b")
    for store, name in zip(stores, (a, b), strict=True):
        store.hold("test", [name])
    assert temporaries(nix_state) == {a, b}
    stores[0].close()
    assert temporaries(nix_state) == {b}
    stores[1].close()


def test_roots_of_a_dead_process_are_no_roots(nix_state: Path, make: Make) -> None:
    name = name_of(make, "a")
    process = start_holding(nix_state, name)
    assert temporaries(nix_state) == {name}
    process.kill()
    process.communicate(timeout=60)
    assert [path.name for path in (nix_state / "temproots").iterdir()] == [str(process.pid)]
    assert temporaries(nix_state) == set()
    assert list((nix_state / "temproots").iterdir()) == []


def start_holding(nix_state: Path, *names: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(nix_state), *names],
        env={"PYTHONPATH": str(Path(fusesnap.__file__).parents[1])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_no_root_is_added_while_somebody_collects(
    nix_state: Path, temporary: TemporaryRoots, make: Make
) -> None:
    name = name_of(make, "a")
    adding = threading.Thread(target=temporary.hold, args=("test", [name]))
    with CollectorLock(nix_state).collecting():
        adding.start()
        assert read_temporary_roots(nix_state, StoreDir()) == set()
        assert adding.is_alive()
    adding.join(60)
    assert temporaries(nix_state) == {name}


def test_the_wait_for_a_collector_ends(nix_state: Path, make: Make) -> None:
    impatient = TemporaryRoots(nix_state, StoreDir(), CollectorLock(nix_state, wait_seconds=0))
    with (
        CollectorLock(nix_state).collecting(),
        pytest.raises(StorageFailure, match=r"gc.lock: a garbage collector has it"),
    ):
        impatient.hold("test", [name_of(make, "a")])
    assert temporaries(nix_state) == set()


def test_permanent_roots_are_read_as_nix_reads_them(
    nix_state: Path, tmp_path: Path, make: Make
) -> None:
    names = {name: name_of(make, name) for name in ("file", "link", "inner", "far", "profile")}
    top = nix_state / "gcroots"
    (top / "a/b").mkdir(parents=True)
    (top / "a/b" / names["file"]).touch()
    (top / "link").symlink_to(f"/nix/store/{names['link']}")
    (top / "inner").symlink_to(f"/nix/store/{names['inner']}/bin/program")
    (tmp_path / "result").symlink_to(f"/nix/store/{names['far']}")
    (top / "far").symlink_to(tmp_path / "result")
    (top / "profiles").symlink_to(nix_state / "profiles")
    (nix_state / "profiles/p").symlink_to("p-1-link")
    (nix_state / "profiles/p-1-link").symlink_to(f"/nix/store/{names['profile']}")
    (top / "dangling").symlink_to(tmp_path / "nothing")
    (top / "README").touch()
    assert read_permanent_roots(nix_state, StoreDir()) == set(names.values())


def test_a_root_is_added_replaced_and_removed(store: LocalStore, make: Make) -> None:
    nix = store.layer.parent / "nix"
    a, b, c = (make(name)[0].store_path for name in "abc")
    assert store.roots.names() == set()
    store.roots.remove("one")
    store.roots.add("one", [a, b])
    store.roots.add("two", [b])
    assert store.roots.names() == {"one", "two"}
    assert read_permanent_roots(nix, StoreDir()) == {a.base_name, b.base_name}
    store.roots.add("one", [c])
    assert read_permanent_roots(nix, StoreDir()) == {b.base_name, c.base_name}
    store.roots.remove("one")
    assert store.roots.names() == {"two"}
    assert read_permanent_roots(nix, StoreDir()) == {b.base_name}
    assert temporaries(nix) == {b.base_name}


def test_many_roots_cost_neither_inodes_nor_blocks(
    store: LocalStore, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [make(f"p-{number}")[0].store_path for number in range(300)]
    directory = store.layer.parent / "nix/gcroots/fusesnap"
    store.roots.add("many", paths)
    files = [path.lstat() for path in (directory / "many").iterdir()]
    assert len(files) == 300
    assert len({status.st_ino for status in files}) == 1
    assert {status.st_blocks for status in files} == {0}

    links = 0

    def full(source: str, target: str) -> None:
        nonlocal links
        links += 1
        if links % 100 == 0:
            raise OSError(31, os.strerror(31))  # EMLINK
        link(source, target)

    link = os.link
    monkeypatch.setattr(os, "link", full)
    store.roots.add("again", paths)
    files = [path.lstat() for path in (directory / "again").iterdir()]
    assert (len(files), len({status.st_ino for status in files})) == (300, 3)


def test_a_process_that_takes_over_holds_what_the_one_before_did(
    opened: Callable[[], LocalStore], make: Make
) -> None:
    first = opened()
    path = make("a")[0].store_path
    first.roots.add("one", [path])
    (first.layer.parent / "nix/gcroots/fusesnap/.half").mkdir()
    first.close()
    second = opened()
    nix = second.layer.parent / "nix"
    assert temporaries(nix) == set()
    second.roots.guard()
    assert temporaries(nix) == {path.base_name}
    assert os.listdir(nix / "gcroots/fusesnap") == ["one"]


def test_real_nix_keeps_what_a_process_holds_valid_or_not(
    store: LocalStore, make: Make, commit: Commit, nix: Nix, tmp_path: Path
) -> None:
    """Nix follows a permanent root to valid paths alone; what is only committed lives by a temporary one."""
    made = {
        "leaf": make("leaf"),
        "top": make("top", {"f": b"top"}, ["leaf"]),
        "part": make("part", {"f": b"part"}, ["absent"]),
        "held": make("held", {"f": b"held"}, ["absent"]),
        "valid": make("valid"),
        "garbage": make("garbage"),
        "lone garbage": make("lone", None, ["absent"]),
    }
    paths = {name: commit(store, path) for name, path in made.items()}
    permanent = store.layer.parent / "nix/gcroots/by-hand"
    permanent.mkdir()
    for name in ("top", "part"):
        (permanent / paths[name].base_name).touch()
    process = start_holding(
        store.layer.parent / "nix", paths["held"].base_name, paths["valid"].base_name
    )
    code, _, said = nix("nix-store", "--store", store.nix_url, "--gc", home=tmp_path)
    assert code == 0, said
    assert store.committed_among(paths.values()) == {
        paths[name] for name in ("leaf", "top", "held", "valid")
    }
    process.kill()
    process.communicate(timeout=60)


def test_real_nix_waits_for_our_collector(
    store: LocalStore, nix: Nix, tmp_path: Path, verify_clean: Callable[[LocalStore], None]
) -> None:
    (tmp_path / "file").write_text("content")
    done: list[tuple[int, str, str]] = []
    add = ("nix-store", "--store", store.nix_url, "--add", str(tmp_path / "file"))
    adding = threading.Thread(target=lambda: done.append(nix(*add, home=tmp_path)))
    with CollectorLock(store.layer.parent / "nix").collecting():
        adding.start()
        # Nix makes its file of temporary roots before it asks for the lock.
        while adding.is_alive() and not list((store.layer.parent / "nix/temproots").iterdir()):
            adding.join(0.01)
        assert store.counts().valid == 0
        assert adding.is_alive()
    adding.join(60)
    ((code, printed, said),) = done
    assert code == 0, said
    assert store.is_committed(StoreDir().parse(printed.strip()))
    verify_clean(store)


def test_a_root_reaches_real_nix_while_it_collects(
    store: LocalStore,
    make: Make,
    commit: Commit,
    nix: Nix,
    tmp_path: Path,
) -> None:
    """Nix holds its lock from its look at the roots to its end, and takes more on a socket."""
    late, never = commit(store, make("late")), commit(store, make("never"))
    nix_state = store.layer.parent / "nix"
    os.mkfifo(tmp_path / "sync")  # Nix waits for it when it has read the roots
    gc = ("nix-store", "--store", store.nix_url, "--gc")
    done: list[tuple[int, str, str]] = []
    waiting = {"_NIX_TEST_GC_SYNC": str(tmp_path / "sync")}
    collecting = threading.Thread(
        target=lambda: done.append(nix(*gc, home=tmp_path, environment=waiting))
    )
    collecting.start()
    with (tmp_path / "sync").open("w"):  # it is at that point when it opens its end
        with pytest.raises(StorageFailure), CollectorLock(nix_state, wait_seconds=0).collecting():
            pass
        store.roots.keep([late])
    collecting.join(60)
    ((code, _, said),) = done
    assert code == 0, said
    assert store.committed_among([late, never]) == {late}
