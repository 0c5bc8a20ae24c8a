"""What fetches, as the snapshotter sees it."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import trio

from fusesnap.daemon import control
from fusesnap.daemon.bundles import WorkersBundles
from fusesnap.errors import FusesnapError
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.realiser import Realiser
from fusesnap.fetch.unpack_frames import decode_error
from fusesnap.nix.store_path import HashPart, StoreDir, StorePath

log = logging.getLogger(__name__)


class LocalPathSource:
    """Fetches in this process."""

    def __init__(self, realiser: Realiser) -> None:
        self._realiser = realiser

    async def admit(
        self, paths: Collection[StorePath], shown: Collection[StorePath]
    ) -> Mapping[StorePath, int]:
        """See ``PathSource``."""
        pins = await self._realiser.admit(paths)
        return {pin.info.store_path: pin.info.nar_size for pin in pins}

    async def expect(self, root: StorePath) -> object:
        """See ``PathSource``."""

    async def realise(self, path: StorePath, priority: Priority = Priority.READER) -> object:
        """See ``PathSource``."""
        return await self._realiser.realise(path, priority=priority)

    def prefetch(self, paths: Sequence[StorePath]) -> None:
        """See ``PathSource``."""
        self._realiser.request(paths, Priority.REST)


class HintingPathSource(LocalPathSource):
    """Has the worker fetch, so that one scheduler decides for the node; what must be waited for is fetched here while
    there is no worker. A hint that does not arrive costs time, nothing else.
    """

    def __init__(
        self, realiser: Realiser, store_dir: StoreDir, worker: Path, nursery: trio.Nursery
    ) -> None:
        super().__init__(realiser)
        self._store_dir = store_dir
        self._worker = worker
        self._bundles = WorkersBundles(store_dir, worker)
        self._nursery = nursery

    async def admit(
        self, paths: Collection[StorePath], shown: Collection[StorePath]
    ) -> Mapping[StorePath, int]:
        """See ``PathSource``. What a bundle says of them is not asked for path by path."""
        # Where no bundle is, caches can be asked for narinfos at once.
        self._nursery.start_soon(self._realiser.introduce)
        told = await self._bundles.nar_sizes(shown)
        asked = await super().admit(set(paths) - told.keys(), shown)
        return {**told, **asked}

    async def expect(self, root: StorePath | HashPart) -> None:
        """See ``PathSource``."""
        await self._bundles.expect(HashPart(root.hash_part))

    async def realise(self, path: StorePath, priority: Priority = Priority.READER) -> object:
        """See ``PathSource``. The worker gives up by itself where nothing comes."""
        question = {"path": self._store_dir.format(path), "priority": priority.name}
        try:
            answer = await control.ask(self._worker, "realise", within=math.inf, **question)
        except FusesnapError as error:
            log.info("%s: fetched without the worker: %s", path, error)
            return await super().realise(path, priority)
        if "failed" in answer:
            raise decode_error(str(answer["failed"]).encode())
        return None

    def prefetch(self, paths: Sequence[StorePath]) -> None:
        """See ``PathSource``."""
        self._nursery.start_soon(self._hint, paths, Priority.REST)

    def complete(self, paths: Sequence[StorePath]) -> None:
        """Have ``paths`` fetched when nobody waits for anything. Does not wait, and does not fail."""
        self._nursery.start_soon(self._hint, paths, Priority.COMPLETION)

    async def _hint(self, paths: Sequence[StorePath], priority: Priority) -> None:
        named = [self._store_dir.format(path) for path in paths]
        try:
            await control.ask(self._worker, "fetch", paths=named, priority=priority.name)
        except FusesnapError as error:
            log.warning("the worker did not take the hint to fetch %d paths: %s", len(paths), error)
