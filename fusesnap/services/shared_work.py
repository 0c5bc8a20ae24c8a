"""Work that several ask for at once is done once, and given up when nobody waits for it any more."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import trio

from fusesnap.errors import Unavailable

T = TypeVar("T")


class _Running(Generic[T]):
    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.waiting = 0
        self.result: T | None = None
        self.error: Exception | None = None


class SharedWork(Generic[T]):
    """Runs each piece of work as a task of ``nursery``."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._running: dict[str, _Running[T]] = {}

    async def result(self, key: str, work: Callable[[], Awaitable[T]]) -> T:
        """What ``work`` returns or raises, or the work under the same ``key`` that others wait for already.

        Work that was given up may have to tidy up: the next one of that key begins when it has ended.
        """
        while (running := self._running.get(key)) is not None and running.scope.cancel_called:
            await running.ended.wait()
        if running is None:
            running = self._running[key] = _Running()
            self._nursery.start_soon(self._run, key, running, work)
        running.waiting += 1
        try:
            await running.ended.wait()
        finally:
            running.waiting -= 1
            if not running.waiting:
                running.scope.cancel()
        if running.error is not None:
            raise running.error
        if running.result is None:
            raise Unavailable("the daemon is stopping")
        return running.result

    async def _run(self, key: str, running: _Running[T], work: Callable[[], Awaitable[T]]) -> None:
        try:
            with running.scope:
                running.result = await work()
        except Exception as error:  # noqa: BLE001  # told to everybody who waits
            running.error = error
        finally:
            del self._running[key]
            running.ended.set()
