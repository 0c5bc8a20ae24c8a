"""Keeps the local store within its limits while the daemon runs."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from fusesnap.config import Store
from fusesnap.daemon.collection import standing
from fusesnap.errors import FusesnapError
from fusesnap.store.disk_space import free_space
from fusesnap.store.local_store import Collected, LocalStore

log = logging.getLogger(__name__)


class Collector:
    """Collects in the background what ``limits`` say is too much, and says how the store stands.

    ``release`` lets go of what only a mount kept that is gone by now: a client may remove a snapshot before the kernel
    has let go of its mount, and nobody tells us when it has. ``collected`` is told what was removed.
    """

    def __init__(
        self,
        store: LocalStore,
        limits: Store,
        release: Callable[[], Awaitable[None]],
        collected: Callable[[Collected], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._limits = limits
        self._release = release
        self._collected = collected
        self._told = False  # that there is too much, and nothing to collect

    async def run(self) -> None:
        """Look every now and then, until cancelled. What fails is logged, and tried again the next time."""
        while True:
            try:
                await self._release()
                if self._limits.max_size or self._limits.min_free:
                    # Not abandoned when we are cancelled: it ends with its batch.
                    self._collected(await trio.to_thread.run_sync(self.collect))
            except FusesnapError as error:
                log.warning("collecting garbage failed: %s", error)
            await trio.sleep(self._limits.check_every)

    def collect(self) -> Collected:
        """Collect what is too much now; blocking. Raises ``StorageFailure``."""
        excess = self.excess()
        if excess <= 0:
            self._told = False
            return Collected()
        done = self._store.collect(excess, lambda _: trio.from_thread.check_cancelled())
        if done.paths:
            log.info("collected %d store paths, %d bytes", len(done.paths), done.size)
        if done.size < excess and not self._told:
            self._told = True
            log.warning(
                "%s: the store is beyond its limits by %d bytes, and all that is left is in use",
                self._store.real,
                excess - done.size,
            )
        return done

    def excess(self) -> int:
        """How many bytes are to be freed; blocking. Raises ``StorageFailure``."""
        limits = self._limits
        over = self._store.size() - limits.max_size if limits.max_size else 0
        lacking = limits.min_free - free_space(self._store.real) if limits.min_free else 0
        return max(0, over, lacking)

    def status(self) -> dict[str, Any]:
        """The store as JSON values, in bytes; blocking. Raises ``StorageFailure``.

        ``over``: how much too much there is, or how much too little is free.
        """
        limits, survey = self._limits, self._store.survey()
        free = free_space(self._store.real)
        over = survey.size - limits.max_size if limits.max_size else 0
        return {
            **standing(survey),
            "max_size": limits.max_size,
            "min_free": limits.min_free,
            "free": free,
            "over": max(0, over, limits.min_free - free),
        }
