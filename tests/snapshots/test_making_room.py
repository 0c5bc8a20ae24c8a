"""Snapshots on a disk that is full."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fusesnap.errors import StorageFailure
from fusesnap.fetch.unpack import Unpacker
from fusesnap.nix.store_path import StoreDir
from fusesnap.snapshots.making_room import SnapshotsWithRoom
from fusesnap.store.local_store import LocalStore

from ..substituter.samples import sample
from . import conftest

if TYPE_CHECKING:
    from .conftest import Mounts

GARBAGE = sample("garbage", size=4 << 20, compression="none")


@pytest.fixture
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 16 MiB."""
    mount_point = tmp_path_factory.mktemp("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", mount_point], check=True)
    yield mount_point
    subprocess.run(["umount", "--lazy", mount_point], check=True)


@pytest.fixture
def store(disk: Path) -> Iterator[LocalStore]:
    """A store with one path, which nothing needs."""
    with LocalStore.open(disk / "store", StoreDir(), clock=lambda: 1) as store:
        with store.stage(store.pin(GARBAGE.info)) as staged:
            unpacker = Unpacker(GARBAGE.info, staged)
            unpacker.feed(GARBAGE.file)
            unpacker.finish()
            staged.commit()
        yield store


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    return filler


async def test_garbage_makes_room_and_removing_needs_none(
    disk: Path, store: LocalStore, mounting: Mounts
) -> None:
    bench = conftest.Bench(disk / "state", mounting)
    snapshots = SnapshotsWithRoom(bench.snapshotter, store.room)
    await bench.layer("image", "", {"file": b"x"})
    filler = fill(disk)
    await snapshots.prepare("first", "image", {})
    assert not store.is_committed(GARBAGE.path)
    fill(disk)
    with pytest.raises(StorageFailure) as caught:
        for number in range(1000):  # the pages of a log that is there already take some
            await snapshots.prepare(f"more-{number}", "image", {})
    assert caught.value.errno == errno.ENOSPC
    keys = [info.name for info in await snapshots.walk()]
    await snapshots.cleanup()
    assert len(list((disk / "state" / "snapshots").iterdir())) == len(keys)
    for key in set(keys) - {"image"}:
        await snapshots.remove(key)
    filler.unlink()
    await snapshots.prepare("after", "image", {})
    assert {info.name for info in await snapshots.walk()} == {"after", "image"}
    bench.close()
