"""The daemon keeps the store within its limits."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from fusesnap.config import Store
from fusesnap.daemon import collector as module
from fusesnap.daemon.collector import Collector
from fusesnap.errors import StorageFailure
from fusesnap.fetch.unpack import Unpacker
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.store.local_store import Collected, LocalStore

from ..substituter.samples import sample

SIZE = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    """A store of three paths of 1 MiB, the first of them in use."""
    now = iter(range(1_000_000))
    with LocalStore.open(tmp_path / "state", StoreDir(), clock=lambda: next(now)) as opened:
        for name in ("used", "old", "new"):
            commit(opened, name)
        opened.roots.add("image", [sample("used").path])
        yield opened


def commit(store: LocalStore, name: str) -> None:
    made = sample(name, size=SIZE, compression="none")
    with store.stage(store.pin(made.info)) as staged:
        unpacker = Unpacker(made.info, staged)
        unpacker.feed(made.file)
        unpacker.finish()
        staged.commit()


async def nothing() -> None:
    """No mount has kept anything."""


def there(store: LocalStore) -> set[str]:
    paths: list[StorePath] = [sample(name).path for name in ("used", "old", "new")]
    return {path.name for path in store.committed_among(paths)}


async def collect(collector: Collector) -> Collected:
    return await trio.to_thread.run_sync(collector.collect)


async def test_beyond_its_size_the_oldest_garbage_goes(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert (await collect(Collector(store, Store(**{"max-size": "3M"}), nothing))).paths == ()
    await collect(Collector(store, Store(**{"max-size": "2M"}), nothing))
    assert there(store) == {"used", "new"}
    assert "collected 1 store paths, 1048576 bytes" in caplog.text
    strict = Collector(store, Store(**{"max-size": 1}), nothing)
    for _ in range(3):
        await collect(strict)
    assert there(store) == {"used"}
    assert caplog.text.count("beyond its limits by 1048575 bytes") == 1
    assert strict.status() | {"free": 0} == {
        "size": SIZE,
        "paths": 1,
        "collectable_size": 0,
        "collectable_paths": 0,
        "max_size": 1,
        "min_free": 0,
        "free": 0,
        "over": SIZE - 1,
    }


async def test_where_the_disk_has_too_little_room_garbage_goes(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_space", lambda directory: 10 * SIZE)
    collector = Collector(store, Store(**{"min-free": "10M"}), nothing)
    assert (await collect(collector)).paths == ()
    monkeypatch.setattr(module, "free_space", lambda directory: 9 * SIZE)
    await collect(collector)
    assert there(store) == {"used", "new"}


async def test_a_failure_is_told_and_the_next_look_comes(
    store: LocalStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> int:
        monkeypatch.undo()
        raise StorageFailure("no room", 28)

    monkeypatch.setattr(store, "size", fail)
    collector = Collector(store, Store(**{"max-size": "2M", "check-every": 0.001}), nothing)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(collector.run)
        with trio.fail_after(60):
            while "old" in there(store):  # noqa: ASYNC110 - the disk tells nobody
                await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    assert "collecting garbage failed: no room" in caplog.text
    assert there(store) == {"used", "new"}


async def test_without_limits_it_only_lets_go_of_what_mounts_kept(store: LocalStore) -> None:
    released = trio.Event()

    async def release() -> None:
        released.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Collector(store, Store(), release).run)
        await released.wait()
        nursery.cancel_scope.cancel()
    assert there(store) == {"used", "old", "new"}
