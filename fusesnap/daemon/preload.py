"""What the configuration wants to be there before anybody needs it: ``[preload]``."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from fusesnap.daemon.build import Node
from fusesnap.daemon.prefetch import Have, prefetch
from fusesnap.errors import ClosureUnavailable, FusesnapError, Unavailable

log = logging.getLogger(__name__)

# Seconds from one line about the progress to the next.
SAY_EVERY: Final = 10.0
# Seconds until what could not be had is tried again: first, and at the longest. At boot the network may come late.
FIRST_WAIT, LONGEST_WAIT = 10.0, 600.0


class Preload:
    """Has all that ``names`` stand for realised by ``have``, one name after the other, and says so in the log.

    What could not be had is tried again as long as that may help. What is preloaded is not collected while this
    process lives.
    """

    def __init__(
        self,
        node: Node,
        names: Sequence[str],
        have: Have,
        *,
        clock: Callable[[], float] = trio.current_time,
        sleep: Callable[[float], Awaitable[object]] = trio.sleep,
    ) -> None:
        self._node = node
        self._names = names
        self._have = have
        self._clock = clock
        self._sleep = sleep

    async def run(self) -> None:
        """Preload; ends when there is nothing left that may be had."""
        wait = FIRST_WAIT
        names = list(self._names)
        while names := [name for name in names if await self._may_come_later(name)]:
            await self._sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    async def _may_come_later(self, name: str) -> bool:
        try:
            done = await prefetch(self._node, [name], self._saying(name), self._have)
        except FusesnapError as error:
            again = isinstance(error, Unavailable) or (
                isinstance(error, ClosureUnavailable) and error.retryable
            )
            log.warning("preload: %s: %s%s", name, error, "; to be tried again" if again else "")
            return again
        log.info(
            "preload: %s: %d paths, %d bytes of NARs: %d fetched, the rest was there",
            name,
            done.paths,
            done.nar_bytes,
            done.fetched,
        )
        return False

    def _saying(self, name: str) -> Callable[[str, int, int], None]:
        next_at = self._clock() + SAY_EVERY

        def say(_: str, done: int, total: int) -> None:
            nonlocal next_at
            if self._clock() >= next_at:
                next_at = self._clock() + SAY_EVERY
                log.info("preload: %s: %d of %d bytes", name, done, total)

        return say
