"""Opens the way to the caches while an image is still being pulled, or a container still being made."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Final

import trio

from fusesnap.nix.store_path import StorePath
from fusesnap.store.local_store import LocalStore
from fusesnap.substituter.pool import SubstituterPool

# Seconds for which a connection that nobody uses stays open for sure: half of what the client and most servers give it.
OPEN_FOR: Final = 30.0


class Readiness:
    """Whether the caches of ``pool`` are ready to be asked for what ``store`` lacks."""

    def __init__(self, store: LocalStore, pool: SubstituterPool) -> None:
        self._store = store
        self._pool = pool
        self._until = -math.inf

    async def get_ready(self, paths: Collection[StorePath]) -> None:
        """Some of ``paths`` may be fetched soon. No cache is asked where all of them are here."""
        if self._until > trio.current_time():
            return
        there = await trio.to_thread.run_sync(self._store.committed_among, paths)
        if len(there) < len(paths):
            await self.open()

    async def open(self) -> None:
        """Caches may be asked soon, for what is not known yet."""
        if self._until <= trio.current_time():
            self._until = trio.current_time() + OPEN_FOR
            await self._pool.get_ready()
