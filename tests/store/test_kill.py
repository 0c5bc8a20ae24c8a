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
from fusesnap.store.local_store import LocalStore
from fusesnap.store.staging import COMMIT_STEPS

Make = Callable[..., Any]
Commit = Callable[..., StorePath]

# Commits the path in the files "narinfo" and "nar"; "<class>.<method>" is where it is killed.
COMMIT = """
import os, signal, sys
from pathlib import Path
from fusesnap.nix.nar import NarParser, NeedData
from fusesnap.nix.narinfo import parse_narinfo
from fusesnap.nix.store_path import StoreDir
from fusesnap.store.local_store import LocalStore
from fusesnap.store.nix_database import Registrar
from fusesnap.store.staging import StagedPath
from fusesnap.store.state_database import StateDatabase

directory, point = Path(sys.argv[1]), sys.argv[2]

def kill(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def meet(staged):
    print("staged", flush=True)
    sys.stdin.readline()
    return flush(staged)

info = parse_narinfo((directory / "narinfo").read_bytes(), StoreDir())
parser = NarParser()
parser.receive_data((directory / "nar").read_bytes())
with LocalStore.open(directory / "state", StoreDir(), clock=lambda: 1) as store:
    flush = StagedPath.flush
    if point == "meet":
        StagedPath.flush = meet
    else:
        owner, method = point.split(".")
        setattr(globals()[owner], method, kill)
    with store.stage(store.pin(info)) as staged:
        while not isinstance(event := parser.next_event(), NeedData):
            staged.receive(event)
        staged.commit()
print("done")
"""
POINTS = [f"StagedPath.{step}" for step in COMMIT_STEPS] + [
    "Registrar.register",
    "StateDatabase.set_waiting",
    "StateDatabase.clear_waiting",
    "StagedPath.__exit__",
]


def start(directory: Path, made: Any, point: str) -> subprocess.Popen[str]:
    info, events = made
    (directory / "narinfo").write_text(info.to_text())
    (directory / "nar").write_bytes(b"".join(nar_bytes(events)))
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
    process = start(tmp_path, made, point)
    _, said = process.communicate(timeout=60)
    assert process.returncode == -9, said
    store = opened()
    verify_clean(store)
    renamed = point not in {"StagedPath.flush", "StagedPath.record", "StagedPath.rename"}
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


def test_two_processes_commit_the_same_path_at_once(
    opened: Callable[[], LocalStore],
    make: Make,
    verify_clean: Callable[[LocalStore], None],
    tmp_path: Path,
) -> None:
    made = make("made", {"d": {"f": b"made"}}, ["made"])
    processes = [start(tmp_path, made, "meet") for _ in range(2)]
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
