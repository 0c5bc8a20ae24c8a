"""Completes the closures of running containers, so that they leave FUSE.

The services process knows which images containers lie on; the worker fetches, when no program waits for anything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import trio

from fusesnap.errors import FusesnapError
from fusesnap.nix.store_path import StorePath

log = logging.getLogger(__name__)

# Seconds from one look at what is missing to the next: the link is idle while containers are being created.
LOOK_EVERY = 1.0
# Seconds after which all of it is asked for again: a worker that was replaced has forgotten it.
ASK_AGAIN = 60.0


class Completion:
    """Asks for what is ``missing``, which is called in a thread, by ``complete``, which does not wait."""

    def __init__(
        self,
        missing: Callable[[], Sequence[StorePath]],
        complete: Callable[[Sequence[StorePath]], object],
    ) -> None:
        self._missing = missing
        self._complete = complete
        self._asked: frozenset[StorePath] = frozenset()
        self._asked_at = float("-inf")

    async def run(self) -> None:
        """Look every now and then, until cancelled. What fails is logged, and tried again the next time."""
        while True:
            try:
                await self.look()
            except FusesnapError as error:
                log.warning("what is missing of running containers cannot be told: %s", error)
            await trio.sleep(LOOK_EVERY)

    async def look(self) -> None:
        """Ask for what is missing and was not asked for."""
        missing = await trio.to_thread.run_sync(self._missing)
        now = trio.current_time()
        if now - self._asked_at >= ASK_AGAIN:
            self._asked, self._asked_at = frozenset(), now
        fresh = [path for path in missing if path not in self._asked]
        if fresh:
            self._complete(fresh)
        self._asked = frozenset(missing)
