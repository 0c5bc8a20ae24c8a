"""A disk with no room left: the call fails and says so, nothing is left, and it goes on once there is room."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fusesnap.errors import StorageFailure
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.store.commit import Commit as CommitOf
from fusesnap.store.local_store import LocalStore

Make = Callable[..., Any]
Commit = Callable[..., StorePath]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mount_point], check=True)
    yield mount_point
    subprocess.run(["umount", mount_point], check=True)


@pytest.fixture
def store(small_disk: Path) -> Iterator[LocalStore]:
    with LocalStore.open(small_disk / "state", StoreDir(), clock=lambda: 1) as store:
        yield store


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return filler


def test_a_path_that_does_not_fit(
    store: LocalStore, make: Make, commit: Commit, small_disk: Path, content: Callable[..., None]
) -> None:
    info, events = make("large", {"a": b"1", "b": bytes(5 * 1024 * 1024)})
    with pytest.raises(StorageFailure, match=r"cannot unpack .*: No space left") as caught:
        commit(store, (info, events))
    assert caught.value.errno == errno.ENOSPC
    assert info.store_path.base_name in str(caught.value)
    assert not store.is_committed(info.store_path)
    assert list((small_disk / "state" / "staging").iterdir()) == []
    commit(store, make("small"))
    content(store.nix_url, small_disk)


def test_no_room_for_our_row(
    store: LocalStore, make: Make, small_disk: Path, content: Callable[..., None]
) -> None:
    info, events = make("small")
    pin = store.pin(info)
    large = replace(pin, info=replace(info, unknown=(("Long", "x" * 300_000),)))
    with store.stage(large) as staged:
        for event in events:
            staged.receive(event)
        filler = fill(small_disk)
        with pytest.raises(StorageFailure, match=r"cannot record paths in .*fusesnap") as caught:
            staged.commit()
        assert caught.value.errno == errno.ENOSPC
    assert not store.is_committed(info.store_path)
    assert list(store.real.iterdir()) == []
    filler.unlink()
    with store.stage(pin) as staged:
        for event in events:
            staged.receive(event)
        staged.commit()
    assert store.counts().valid == 1
    content(store.nix_url, small_disk)


def test_no_room_for_rows_of_nix(
    store: LocalStore,
    make: Make,
    small_disk: Path,
    content: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The path is committed all the same, and becomes valid once there is room."""
    info, events = make("small", None, [])
    info = replace(info, ca=f"text:sha256:{'0' * 52}")
    with store.stage(store.pin(info)) as staged:
        for event in events:
            staged.receive(event)
        register = CommitOf.register

        def register_on_a_full_disk(commit: CommitOf) -> None:
            fill(small_disk)
            register(commit)

        monkeypatch.setattr(CommitOf, "register", register_on_a_full_disk)
        monkeypatch.setattr(
            "fusesnap.store.nix_database._content_address", lambda info: "x" * 300_000
        )
        with pytest.raises(StorageFailure, match="cannot register paths in") as caught:
            staged.commit()
        assert caught.value.errno == errno.ENOSPC
        monkeypatch.undo()
    assert store.is_committed(info.store_path)
    assert store.counts().valid == 0
    (small_disk / "filler").unlink()
    content(store.nix_url, small_disk)
    with LocalStore.open(small_disk / "state", StoreDir(), clock=lambda: 1) as again:
        assert again.counts().valid == 1
    content(store.nix_url, small_disk)


def test_a_disk_without_room_for_a_store(small_disk: Path) -> None:
    fill(small_disk)
    with pytest.raises(StorageFailure) as caught:
        LocalStore.open(small_disk / "state", StoreDir(), clock=lambda: 1)
    assert caught.value.errno == errno.ENOSPC
    assert str(small_disk / "state") in str(caught.value)
