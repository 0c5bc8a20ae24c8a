"""Fetches ahead what a path that somebody blocks on refers to, directly or not: the guess that needs no content.

It knows nothing of what a start touches, so it goes behind everything that does, and is for links on which bytes cost
nothing. ``docs/architecture.md`` has how it compares with ``loader``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from fusesnap.fetch.events import Asked, FetchEvent, Joined
from fusesnap.fetch.priority import Priority
from fusesnap.nix.store_path import StorePath
from fusesnap.store.local_store import LocalStore

Request = Callable[[Sequence[StorePath], Priority], object]


class References:
    """Hears what is asked for, and has ``request`` fetch what that refers to, behind the reader's back."""

    def __init__(self, store: LocalStore, request: Request, nursery: trio.Nursery) -> None:
        self._store = store
        self._request = request
        self._nursery = nursery
        self._followed: set[StorePath] = set()

    def heard(self, event: FetchEvent) -> None:
        """Something was asked for. Returns at once."""
        reads = isinstance(event, Asked) and event.priority is Priority.READER
        if reads or isinstance(event, Joined):
            self._nursery.start_soon(self._follow, event.path)

    async def _follow(self, path: StorePath) -> None:
        found = await trio.to_thread.run_sync(self._closure, path)
        if found:
            self._request(found, Priority.REST)

    def _closure(self, path: StorePath) -> list[StorePath]:
        """What ``path`` refers to, as far as images on this node name it, and it was not found before."""
        frontier, found = [path], []
        while frontier:
            here = frontier.pop()
            pin = self._store.pinned(here)
            if pin is None or here in self._followed:
                continue
            self._followed.add(here)
            found.append(here)
            frontier += pin.info.references
        return found[1:]
