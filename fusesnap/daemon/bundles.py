"""Bundles in the process that serves the mount, which takes them, and in others, which want to know what they say."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import trio

from fusesnap.daemon import control
from fusesnap.errors import FusesnapError
from fusesnap.fetch.bundles import Bundles
from fusesnap.nix.closure_digest import ClosureDigest
from fusesnap.nix.store_path import HashPart, StoreDir, StorePath

log = logging.getLogger(__name__)

# Seconds for which everything else waits for what a bundle says: as long as a header of 2,400 paths, which has 700 kB,
# takes at 5 Mbit/s, and more. A cache that has none says so within a round trip.
TELLS_WITHIN: Final = 3.0


def calls(bundles: Bundles, store_dir: StoreDir) -> Mapping[str, control.Answer]:
    """What the worker answers when it knows what a bundle says; it may take its time."""

    async def bundle(question: Mapping[str, Any]) -> dict[str, Any]:
        """What a bundle has said of ``paths``, a closure: the sizes of their NARs, in bytes."""

        def closure() -> tuple[ClosureDigest, frozenset[StorePath]]:
            paths = frozenset(map(store_dir.parse, question["paths"]))
            return ClosureDigest.of(paths, store_dir), paths

        digest, paths = await trio.to_thread.run_sync(closure)
        told = await bundles.find(digest, paths)
        sizes = told.nar_sizes.items()
        return {"told": {store_dir.format(path): size for path, size in sizes if path in paths}}

    async def bundle_of(question: Mapping[str, Any]) -> dict[str, Any]:
        """What a bundle says of the closure of the path with the hash part ``root`` is taken over then."""
        await bundles.find_of(HashPart(str(question["root"])))
        return {}

    return {"bundle": bundle, "bundle_of": bundle_of}


class WorkersBundles:
    """Asks the worker. One that does not answer costs what a bundle would have spared, nothing else."""

    def __init__(self, store_dir: StoreDir, worker: Path) -> None:
        self._store_dir = store_dir
        self._worker = worker

    async def nar_sizes(self, closure: Collection[StorePath]) -> Mapping[StorePath, int]:
        """Of those paths of ``closure`` that are not here, what a bundle says: how many bytes their NARs have.

        They are pinned so.
        """
        names = [self._store_dir.format(path) for path in closure]
        answer = await self._ask("bundle", paths=names)
        told = {} if answer is None else answer["told"]
        return {self._store_dir.parse(name): int(size) for name, size in told.items()}

    async def expect(self, root: HashPart) -> None:
        """Return when what a bundle says of the closure of the path with this hash part is known, or there is none."""
        await self._ask("bundle_of", root=root.hash_part)

    async def _ask(self, call: str, **arguments: Any) -> dict[str, Any] | None:
        try:
            return await control.ask(self._worker, call, within=TELLS_WITHIN, **arguments)
        except FusesnapError as error:
            log.info("the worker has not told of a bundle (%s): %s", call, error)
            return None
