"""Room that is reserved before a path comes: by one process, by several, and where there is none."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fusesnap.errors import StorageFailure
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.store import room as module
from fusesnap.store.local_store import LocalStore
from fusesnap.store.room import Lack, StoreLimits, space_for

Make = Callable[..., Any]
Commit = Callable[..., StorePath]
Open = Callable[[], LocalStore]

NAR = 1 << 20
SPACE = space_for(NAR)
LARGE = bytes(NAR)


@pytest.fixture
def limited(opened: Open) -> Callable[..., LocalStore]:
    def make(**limits: int) -> LocalStore:
        store = opened()
        store.room.keep_to(StoreLimits(**limits))
        return store

    return make


def committed(store: LocalStore, make: Make, commit: Commit, *names: str) -> list[StorePath]:
    return [commit(store, make(name, LARGE)) for name in names]


def test_without_need_nothing_is_removed(
    limited: Callable[..., LocalStore], make: Make, commit: Commit
) -> None:
    store = limited(max_size=2 * NAR + SPACE)
    (path,) = committed(store, make, commit, "old")
    assert store.room.reserve(NAR) is None
    assert store.is_committed(path)


def test_the_oldest_garbage_goes_before_a_path_comes(
    limited: Callable[..., LocalStore], make: Make, commit: Commit
) -> None:
    store = limited(max_size=2 * NAR + SPACE)
    kept, old, new = committed(store, make, commit, "kept", "old", "new")
    store.roots.add("image", [kept])
    assert store.room.reserve(NAR) is None
    assert store.committed_among([kept, old, new]) in ({kept, old}, {kept, new})
    paths, freed = store.room.removed
    assert paths == 1
    assert NAR <= freed < 2 * NAR


def test_what_is_reserved_counts_until_it_is_given_back(
    limited: Callable[..., LocalStore],
) -> None:
    store = limited(max_size=2 * SPACE)
    assert store.room.reserve(NAR) is None
    assert store.room.reserve(NAR) is None
    assert store.room.reserve(NAR) == Lack(SPACE, for_good=False)
    store.room.give_back(NAR)
    assert store.room.reserve(NAR) is None


def test_processes_know_of_one_another(limited: Callable[..., LocalStore]) -> None:
    first, second = limited(max_size=2 * SPACE), limited(max_size=2 * SPACE)
    assert first.room.reserve(NAR) is None
    assert first.room.reserve(NAR) is None
    assert second.room.reserve(NAR) == Lack(SPACE, for_good=False)
    first.close()
    assert second.room.reserve(NAR) is None


def test_what_a_dead_process_had_reserved_counts_no_more(
    limited: Callable[..., LocalStore], tmp_path: Path
) -> None:
    store = limited(max_size=SPACE)
    code = (
        "import os; from pathlib import Path; from fusesnap.nix.store_path import StoreDir;"
        "from fusesnap.store.local_store import LocalStore; from fusesnap.store.room import StoreLimits;"
        f"store = LocalStore.open(Path({str(tmp_path / 'state')!r}), StoreDir(), clock=lambda: 0);"
        f"store.room.keep_to(StoreLimits({SPACE})); print(store.room.reserve({NAR}), flush=True);"
        "input(); os.kill(os.getpid(), 9)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "None\n"
        assert store.room.reserve(NAR) is not None
        other.stdin.write("\n")
    assert store.room.reserve(NAR) is None
    assert len(os.listdir(tmp_path / "state" / "reserved")) == 1


def test_where_all_is_in_use_it_goes_beyond_the_limit_and_says_so_once(
    limited: Callable[..., LocalStore],
    make: Make,
    commit: Commit,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    store = limited(max_size=SPACE)
    paths = committed(store, make, commit, "one", "two")
    store.roots.add("image", paths)
    lack = store.room.reserve(NAR)
    assert lack == Lack(2 * NAR, for_good=True)
    for _ in range(3):
        assert store.room.reserve(NAR, whatever=True) is None
    (record,) = caplog.records
    assert f"goes beyond its limits by {2 * NAR} bytes" in record.getMessage()
    assert "Delete images, or raise store.max-size" in record.getMessage()
    assert store.committed_among(paths) == set(paths)


def test_a_minimum_of_free_space(
    limited: Callable[..., LocalStore],
    make: Make,
    commit: Commit,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = limited(min_free=10 * NAR)
    (path,) = committed(store, make, commit, "old")
    free = 10 * NAR + SPACE

    def free_space(directory: Path) -> int:
        return free + (0 if store.is_committed(path) else NAR)

    monkeypatch.setattr(module, "free_space", free_space)
    assert store.room.reserve(NAR) is None
    assert store.is_committed(path)
    assert store.room.reserve(NAR // 2) is None
    assert not store.is_committed(path)


def test_sizes_are_known_without_a_write(
    limited: Callable[..., LocalStore],
    make: Make,
    commit: Commit,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = limited(max_size=100 * NAR)
    committed(store, make, commit, "one", "two")

    def no_write(*words: object) -> None:
        raise AssertionError("nothing is to be written for it")

    monkeypatch.setattr(store._target.state, "set_sizes", no_write)
    measured: list[Path] = []
    measure = store._collection._measure

    def counted(path: Any) -> int:
        measured.append(path)
        return measure(path)

    monkeypatch.setattr(store._collection, "_measure", counted)
    for _ in range(3):
        assert store._collection.size() == 2 * NAR
    assert len(measured) == 2


def test_sizes_of_many_paths_are_written_together(
    limited: Callable[..., LocalStore],
    make: Make,
    commit: Commit,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fusesnap.store.collection._NOTED_AT", 3)
    store = limited(max_size=100 * NAR)
    unmeasured: list[int] = []
    for name in ("one", "two", "three", "four"):
        committed(store, make, commit, name)
        assert store._collection.size() == (len(unmeasured) + 1) * NAR
        unmeasured.append(len(store._target.state.unmeasured()))
    assert unmeasured == [1, 2, 0, 1]


def test_what_is_here_of_other_paths_counts_and_goes_first(
    limited: Callable[..., LocalStore], make: Make, commit: Commit, tmp_path: Path
) -> None:
    store = limited(max_size=2 * NAR + SPACE)
    (path,) = committed(store, make, commit, "old")
    parts = tmp_path / "state" / "partial"
    parts.mkdir()
    sparse = parts / f"{make('other')[0].store_path.base_name}.nar"
    with sparse.open("wb") as file:
        file.truncate(100 * NAR)
        file.write(bytes(2 * NAR))
    assert 3 * NAR <= store.size() < 4 * NAR
    assert store.survey().size == store.size()
    assert store.room.reserve(NAR) is None
    assert not sparse.exists()
    assert store.is_committed(path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", mount_point], check=True)
    yield mount_point
    subprocess.run(["umount", mount_point], check=True)


def test_on_a_disk_without_a_single_free_block_garbage_can_be_removed(
    small_disk: Path, make: Make, commit: Commit, content: Callable[..., None]
) -> None:
    with LocalStore.open(small_disk / "state", StoreDir(), clock=lambda: 1) as store:
        kept, _, _ = committed(store, make, commit, "kept", "old", "new")
        store.roots.add("image", [kept])
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space") as no:
            while True:
                file.write(bytes(4096))
        assert no.value.errno == errno.ENOSPC
        freed = store.room.free(NAR)
        assert freed.size == 2 * NAR
        assert store.is_committed(kept)
        commit(store, make("fits", LARGE))
        content(store.nix_url, small_disk)
        assert (small_disk / "state" / "ballast").stat().st_size == 1 << 20


def test_without_garbage_a_full_disk_stays_full(
    small_disk: Path, make: Make, commit: Commit
) -> None:
    with LocalStore.open(small_disk / "state", StoreDir(), clock=lambda: 1) as store:
        kept = committed(store, make, commit, "kept")
        store.roots.add("image", kept)
        assert store.room.free(NAR).paths == ()
        with pytest.raises(StorageFailure, match="No space left"):
            commit(store, make("large", bytes(9 * NAR)))
        assert store.is_committed(kept[0])
