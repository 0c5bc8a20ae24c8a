"""Fetches the program that an image's configuration names as soon as the image can be had.

From the end of a pull to the first read of its container a link would be idle, for some hundred milliseconds. What
will be read first is known by then: the program, the loader's interpreter, and the libraries that it asks for.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final

import trio

from fusesnap.errors import FusesnapError
from fusesnap.fetch.contents import Contents
from fusesnap.fetch.loader import Loader
from fusesnap.fetch.priority import Priority
from fusesnap.images.links import Links
from fusesnap.nix.store_path import StorePath
from fusesnap.nix.tree import Tree
from fusesnap.store.local_store import LocalStore

log = logging.getLogger(__name__)

# The share of a closure's paths that refer to what nearly every program needs: to the C library do most.
COMMON: Final = 0.5
# Seconds that the program which is needed is ahead of those that are guesses: in them what it needs is found out.
HEAD_START: Final = 0.25


class EntryProgram:
    """Has ``loader`` follow a program before anybody opens it. ``head_start`` is in seconds, see above."""

    def __init__(
        self,
        store: LocalStore,
        contents: Contents,
        loader: Loader,
        head_start: float = HEAD_START,
    ) -> None:
        self._store = store
        self._contents = contents
        self._loader = loader
        self._head_start = head_start

    async def follow(
        self,
        paths: frozenset[StorePath],
        programs: Sequence[Sequence[str]],
        is_foreseen: Callable[[], Awaitable[bool]],
    ) -> None:
        """Have those of ``programs`` fetched that are in the closure ``paths``, as if they were opened.

        Of each there are the absolute file names where it may be. The first one is needed, the others are guesses, and
        so is last what is small in the closure: what programs read that say nothing of it, as an interpreter's modules.
        What cannot be had is let be: whoever really wants it will be told. As soon as it ``is_foreseen`` what a start
        reads, nothing more is guessed.
        """
        if await is_foreseen():
            return
        common = await trio.to_thread.run_sync(self._common, paths)
        self._contents.request(common, Priority.REST)
        async with trio.open_nursery() as nursery:
            for number, places in enumerate(programs):
                if number == 1:
                    await trio.sleep(self._head_start)
                    if await is_foreseen():
                        return
                priority = Priority.REST if number else Priority.TRACE
                nursery.start_soon(self._follow_first, paths, places, priority)
        if not await is_foreseen():
            await self._contents.guess_small(paths)

    async def _follow_first(
        self, paths: frozenset[StorePath], places: Sequence[str], priority: Priority
    ) -> None:
        """Follow what is at the first of ``places`` at which there is something."""
        for place in places:
            try:
                if await self._follow(paths, place.encode(), priority):
                    return
            except FusesnapError as error:
                log.debug("%s: not fetched ahead: %s", place, error)

    async def _follow(
        self, paths: frozenset[StorePath], program: bytes, priority: Priority
    ) -> bool:
        """Whether ``program`` is there; then it is being fetched."""

        async def tree_of(path: StorePath) -> Tree:
            # Where a path is fetched whole, more comes behind it and fills the link meanwhile: what the program's own
            # package refers to. What the place refers to where a link to it is may be everything.
            pin = self._store.pinned(path)
            if pin is not None and place is not None and path != place[0]:
                self._contents.request(pin.info.references, Priority.REST)
            return await self._contents.tree(path, priority=priority)

        links = Links(paths, tree_of, self._store.store_dir)
        place = links.place(program)
        found = None if place is None else await links.follow(*place)
        pin = None if found is None else self._store.pinned(found[0])
        if found is None or pin is None:
            return False
        tree = await self._contents.tree(found[0], priority=priority)
        await self._loader.follow(pin.ordinal, tree, found[1], priority)
        return True

    def _common(self, paths: Collection[StorePath]) -> list[StorePath]:
        """What most of ``paths`` refer to. Blocking: a question to the database each."""
        counts: Counter[StorePath] = Counter()
        for path in paths:
            pin = self._store.pinned(path)
            if pin is not None:
                counts.update(each for each in pin.info.references if each != path)
        return [path for path, count in counts.items() if count >= COMMON * len(paths)]
