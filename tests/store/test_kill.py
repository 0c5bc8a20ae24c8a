"""A process is killed between every two steps of a commit; what it leaves is sound."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fusesnap
from fusesnap.nix.nar import nar_bytes
from fusesnap.nix.store_path import StorePath
from fusesnap.store.commit import COMMIT_STEPS
from fusesnap.store.local_store import LocalStore

Make = Callable[..., Any]
Commit = Callable[..., StorePath]

# Commits the paths in the files "<n>.narinfo" and "<n>.nar" together. It is killed where "<class>.<method>" is called,
# for the second time where a "2" is behind it.
COMMIT = """
import os, signal, sys
from contextlib import ExitStack
from itertools import count
from pathlib import Path, PosixPath
from fusesnap.nix.nar import NarParser, NeedData
from fusesnap.nix.narinfo import parse_narinfo
from fusesnap.nix.store_path import StoreDir
from fusesnap.store.commit import Commit
from fusesnap.store.local_store import LocalStore
from fusesnap.store.nix_database import Registrar
from fusesnap.store.staging import StagedPath
from fusesnap.store.state_database import StateDatabase

directory, point = Path(sys.argv[1]), sys.argv[2]
calls = count(1)

def kill_at(original, call):
    def method(*arguments, **named):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)
    return method

def meet(commit):
    print("staged", flush=True)
    sys.stdin.readline()
    return flush(commit)

def stage(number):
    info = parse_narinfo((directory / f"{number}.narinfo").read_bytes(), StoreDir())
    parser = NarParser()
    parser.receive_data((directory / f"{number}.nar").read_bytes())
    staged = stack.enter_context(store.stage(store.pin(info)))
    while not isinstance(event := parser.next_event(), NeedData):
        staged.receive(event)
    return staged

with LocalStore.open(directory / "state", StoreDir(), clock=lambda: 1) as store, ExitStack() as stack:
    flush = Commit.flush
    if point == "meet":
        Commit.flush = meet
    else:
        owner, method = point.rstrip("2").split(".")
        owner = globals()[owner]
        setattr(owner, method, kill_at(getattr(owner, method), 1 + point.endswith("2")))
    staged = [stage(number) for number in range(len(list(directory.glob("*.nar"))))]
    assert not any(store.commit(staged))
print("done")
"""
POINTS = [f"Commit.{step}" for step in COMMIT_STEPS] + [
    "Registrar.register",
    "StateDatabase.set_waiting",
    "StateDatabase.clear_waiting",
    "StagedPath.__exit__",
]
# Of three that are committed together: between the steps, and in the middle of those that go from one to the next.
POINTS_OF_A_GROUP = [
    *(f"Commit.{step}" for step in COMMIT_STEPS),
    "PosixPath.rename2",
    "PosixPath.chmod2",
    "Registrar.register2",
]
NOT_THERE = {"Commit.flush", "Commit.record", "Commit.rename"}


def start(directory: Path, point: str, *made: Any) -> subprocess.Popen[str]:
    for number, (info, events) in enumerate(made):
        (directory / f"{number}.narinfo").write_text(info.to_text())
        (directory / f"{number}.nar").write_bytes(b"".join(nar_bytes(events)))
    return subprocess.Popen(
        [sys.executable, "-c", COMMIT, str(directory), point],
        env={"PYTHONPATH": str(Path(fusesnap.__file__).parents[1])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_the_path_is_valid_or_absent(
    opened: Callable[[], LocalStore],
    make: Make,
    commit: Commit,
    verify_clean: Callable[[LocalStore], None],
    tmp_path: Path,
    point: str,
) -> None:
    before = opened()
    top = make("top", {"f": b"top"}, ["made", "top"])
    made = make("made", {"d": {"f": b"made", "l": "f"}, "x": (b"x",)})
    commit(before, top)
    before.close()
    process = start(tmp_path, point, made)
    _, said = process.communicate(timeout=60)
    assert process.returncode == -9, said
    store = opened()
    verify_clean(store)
    renamed = point not in NOT_THERE
    path = made[0].store_path
    assert store.is_committed(path) == renamed
    assert store.location(path).exists() == renamed
    assert store.counts().valid == (2 if renamed else 0)
    assert list((tmp_path / "state" / "staging").iterdir()) == []
    commit(store, made)
    assert store.counts().valid == 2
    assert sorted(child.name for child in store.real.iterdir() if child.name[0] != ".") == sorted(
        info.store_path.base_name for info, _ in (top, made)
    )
    verify_clean(store)


@pytest.mark.parametrize("point", POINTS_OF_A_GROUP)
def test_killed_in_a_group_each_path_is_valid_or_absent(
    opened: Callable[[], LocalStore],
    make: Make,
    commit: Commit,
    verify_clean: Callable[[LocalStore], None],
    tmp_path: Path,
    point: str,
) -> None:
    group = [
        make("a", {"f": b"a"}, ["b", "c"]),
        make("b", {"f": b"b", "l": "f"}, ["c"]),
        make("c", {"d": {"f": (b"c",)}}),
    ]
    process = start(tmp_path, point, *group)
    _, said = process.communicate(timeout=60)
    assert process.returncode == -9, said
    store = opened()
    verify_clean(store)
    paths = [info.store_path for info, _ in group]
    there = store.committed_among(paths)
    assert len(there) == (0 if point in NOT_THERE else 1 if point == "PosixPath.rename2" else 3)
    assert {path for path in paths if store.location(path).exists()} == there
    assert all(store.location(path).stat().st_mode & 0o777 == 0o555 for path in there)
    for made in group:
        commit(store, made)
    assert store.counts().valid == 3
    assert list((tmp_path / "state" / "staging").iterdir()) == []
    assert sorted(child.name for child in store.real.iterdir() if child.name[0] != ".") == sorted(
        path.base_name for path in paths
    )
    verify_clean(store)


def test_two_processes_commit_the_same_path_at_once(
    opened: Callable[[], LocalStore],
    make: Make,
    verify_clean: Callable[[LocalStore], None],
    tmp_path: Path,
) -> None:
    made = make("made", {"d": {"f": b"made"}}, ["made"])
    processes = [start(tmp_path, "meet", made) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "staged\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        printed, said = process.communicate(timeout=60)
        assert (process.returncode, printed, said) == (0, "done\n", "")
    store = opened()
    assert store.counts().valid == 1
    assert store.is_committed(made[0].store_path)
    assert list((tmp_path / "state" / "staging").iterdir()) == []
    verify_clean(store)
