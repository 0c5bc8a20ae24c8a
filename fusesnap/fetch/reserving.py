"""Room on the disk for a path, before its bytes come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import trio

from fusesnap.store.room import Room

# Seconds that a path waits for the transfers that have reserved what it needs. They may themselves wait for it: one
# that is paused for a reader keeps what it has reserved.
FOR_OTHERS: Final = 5.0
LOOK_EVERY: Final = 0.1


class Reservation:
    """What one path has reserved, if anything."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._nar_size: int | None = None

    async def take(self, nar_size: int) -> None:
        """Reserve room for a path whose NAR has ``nar_size`` bytes, once. Raises :class:`StorageFailure`.

        Without limits there is nothing to reserve. See :class:`Room` for what happens where there is too little.
        """
        if self._room.limits and self._nar_size is None:
            await self._take(nar_size)
            self._nar_size = nar_size

    async def _take(self, nar_size: int) -> None:
        until = trio.current_time() + FOR_OTHERS
        while True:
            lack = await trio.to_thread.run_sync(self._room.reserve, nar_size)
            if lack is None:
                return
            if lack.for_good or trio.current_time() >= until:
                break
            await trio.sleep(LOOK_EVERY)
        await trio.to_thread.run_sync(partial(self._room.reserve, nar_size, whatever=True))

    async def give_back(self) -> None:
        """It is not needed any more."""
        if self._nar_size is not None:
            with trio.CancelScope(shield=True):  # short, and owed
                await trio.to_thread.run_sync(self._room.give_back, self._nar_size)
            self._nar_size = None


@asynccontextmanager
async def reservation(room: Room) -> AsyncIterator[Reservation]:
    """A reservation for the time of the context.

    It must be longer than the path is kept from being collected: what is committed and kept, and reserved no more,
    would look as if it were in use for good.
    """
    reserved = Reservation(room)
    try:
        yield reserved
    finally:
        await reserved.give_back()
