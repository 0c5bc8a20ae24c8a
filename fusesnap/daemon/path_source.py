"""What fetches, as the snapshotter sees it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import trio

from fusesnap.daemon import control
from fusesnap.errors import FusesnapError
from fusesnap.fetch.priority import Priority
from fusesnap.fetch.realiser import Realiser
from fusesnap.nix.store_path import StoreDir, StorePath

log = logging.getLogger(__name__)


class LocalPathSource:
    """Fetches in this process."""

    def __init__(self, realiser: Realiser) -> None:
        self._realiser = realiser

    async def admit(self, paths: Sequence[StorePath]) -> Mapping[StorePath, int]:
        """See ``PathSource``."""
        pins = await self._realiser.admit(paths)
        return {pin.info.store_path: pin.info.nar_size for pin in pins}

    async def realise(self, path: StorePath) -> object:
        """See ``PathSource``."""
        return await self._realiser.realise(path)

    def prefetch(self, paths: Sequence[StorePath]) -> None:
        """See ``PathSource``."""
        self._realiser.request(paths, Priority.REST)


class HintingPathSource(LocalPathSource):
    """Fetches in this process what it must wait for; what will be wanted soon is left to the worker, whose readers
    will want it. A hint that does not arrive costs time, nothing else.
    """

    def __init__(
        self, realiser: Realiser, store_dir: StoreDir, worker: Path, nursery: trio.Nursery
    ) -> None:
        super().__init__(realiser)
        self._store_dir = store_dir
        self._worker = worker
        self._nursery = nursery

    def prefetch(self, paths: Sequence[StorePath]) -> None:
        """See ``PathSource``."""
        self._nursery.start_soon(self._hint, [self._store_dir.format(path) for path in paths])

    async def _hint(self, paths: list[str]) -> None:
        try:
            await control.ask(self._worker, "fetch", paths=paths, priority=Priority.REST.name)
        except FusesnapError as error:
            log.warning("the worker did not take the hint to fetch %d paths: %s", len(paths), error)
