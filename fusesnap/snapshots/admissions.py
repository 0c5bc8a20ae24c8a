"""Has store paths admitted, each once for all who ask at the same time or a moment later.

An image's paths are asked for when it is announced, when the labels of a layer name them, and when that layer is
committed: within a pull.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import trio

from fusesnap.nix.closure_labels import MAX_CLOSURE_PATHS
from fusesnap.nix.store_path import StorePath
from fusesnap.snapshots.interface import PathSource

# Seconds for which it is believed that a path can be had: a pull over a slow link.
BELIEVED_FOR: Final = 60.0


class Admissions:
    """Asks ``source``."""

    def __init__(self, source: PathSource) -> None:
        self._source = source
        self._running: dict[trio.Event, frozenset[StorePath]] = {}
        self._sizes: dict[StorePath, tuple[float, int]] = {}  # until when that is believed; bytes

    async def admit(
        self, paths: Collection[StorePath], shown: Collection[StorePath]
    ) -> Mapping[StorePath, int]:
        """As ``PathSource.admit``."""
        while (event := self._running_for(paths)) is not None:
            await event.wait()  # as long as that admission takes, which has its own deadlines
        known = self._known(paths)
        unknown = [path for path in paths if path not in known]
        return {**known, **await self._ask(unknown, shown)} if unknown else known

    def _running_for(self, paths: Collection[StorePath]) -> trio.Event | None:
        return next(
            (event for event, asked in self._running.items() if not asked.isdisjoint(paths)), None
        )

    def _known(self, paths: Collection[StorePath]) -> dict[StorePath, int]:
        now = trio.current_time()
        said = ((path, self._sizes.get(path)) for path in paths)
        return {path: size[1] for path, size in said if size is not None and size[0] > now}

    async def _ask(
        self, paths: Collection[StorePath], shown: Collection[StorePath]
    ) -> Mapping[StorePath, int]:
        event = trio.Event()
        self._running[event] = frozenset(paths)
        try:
            sizes = await self._source.admit(paths, shown)
        finally:
            del self._running[event]
            event.set()
        until = trio.current_time() + BELIEVED_FOR
        if len(self._sizes) + len(sizes) > MAX_CLOSURE_PATHS:
            self._sizes.clear()
        self._sizes.update((path, (until, size)) for path, size in sizes.items())
        return sizes
