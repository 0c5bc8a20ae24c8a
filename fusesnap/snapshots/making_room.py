"""Snapshots on a disk that may be full: room is made, and the call made once more.

Every call that fails leaves nothing half done, so it can be. Creating waits for what no root reaches to be removed.
Removing has to work on the fullest disk, because it is what frees room: so it may use the ballast.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Final, TypeVar

import trio

from fusesnap.errors import StorageFailure
from fusesnap.snapshots.interface import Info, Mount, Snapshots, Usage
from fusesnap.store.room import Room, is_full

log = logging.getLogger(__name__)

T = TypeVar("T")

# Bytes to free for one call: the farm of a closure of 2,500 paths takes some 10 MB.
WANTED: Final = 16 << 20


class SnapshotsWithRoom(Snapshots):
    """The snapshots of ``snapshots``, on the disk that ``room`` is about."""

    def __init__(self, snapshots: Snapshots, room: Room) -> None:
        self._snapshots = snapshots
        self._room = room

    async def stat(self, key: str) -> Info:
        """See ``Snapshots``."""
        return await self._snapshots.stat(key)

    async def update(self, info: Info, fields: Sequence[str] = ()) -> Info:
        """See ``Snapshots``."""
        return await self._with_room(partial(self._snapshots.update, info, fields))

    async def usage(self, key: str) -> Usage:
        """See ``Snapshots``."""
        return await self._snapshots.usage(key)

    async def mounts(self, key: str) -> Sequence[Mount]:
        """See ``Snapshots``."""
        return await self._with_room(partial(self._snapshots.mounts, key))

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount]:
        """See ``Snapshots``."""
        return await self._with_room(partial(self._snapshots.prepare, key, parent, labels))

    async def view(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount]:
        """See ``Snapshots``."""
        return await self._with_room(partial(self._snapshots.view, key, parent, labels))

    async def commit(
        self, name: str, key: str, labels: Mapping[str, str], parent: str = ""
    ) -> None:
        """See ``Snapshots``."""
        await self._with_room(partial(self._snapshots.commit, name, key, labels, parent))

    async def remove(self, key: str) -> None:
        """See ``Snapshots``."""
        await self._with_ballast(partial(self._snapshots.remove, key))

    async def walk(self, matches: Callable[[Info], bool] | None = None) -> Sequence[Info]:
        """See ``Snapshots``."""
        return await self._snapshots.walk(matches)

    async def cleanup(self) -> None:
        """See ``Snapshots``."""
        await self._with_ballast(self._snapshots.cleanup)

    async def _with_room(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            return await call()
        except StorageFailure as error:
            if not is_full(error):
                raise
            freed = await trio.to_thread.run_sync(self._room.free, WANTED)
            log.warning("%s; removed %d store paths", error, len(freed.paths))
            if not freed.size:
                raise
        return await call()

    async def _with_ballast(self, call: Callable[[], Awaitable[None]]) -> None:
        try:
            await call()
        except StorageFailure as error:
            if not is_full(error) or not await trio.to_thread.run_sync(self._room.drop_ballast):
                raise
        else:
            return
        try:
            await call()
        finally:
            with trio.CancelScope(shield=True):  # short, and owed
                await trio.to_thread.run_sync(self._room.restore_ballast)
