"""Builds the farms of an image when it is unpacked, while nobody waits for them.

They have an entry for every store path. Built when a container is created, they would be what its start waits for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from fusesnap.errors import FusesnapError
from fusesnap.snapshots.farms import Farms
from fusesnap.snapshots.metastore import Metastore
from fusesnap.snapshots.records import Chain
from fusesnap.snapshots.views import Plan, Views

log = logging.getLogger(__name__)


class Foresight:
    """Plans the views of chains that have just been committed. ``layers`` gives a chain's, topmost first."""

    def __init__(
        self,
        metastore: Metastore,
        views: Views,
        farms: Farms,
        layers: Callable[[Chain], Sequence[Path]],
    ) -> None:
        self._metastore = metastore
        self._views = views
        self._farms = farms
        self._layers = layers

    async def build(self, name: str) -> None:
        """Build what a container of the Nix image ``name`` would be shown now. Fetches nothing, and does not fail."""
        try:
            chain = await trio.to_thread.run_sync(self._read, name)
            plan = await self._views.plan(chain, self._layers(chain), fetch_ahead=False)
            await trio.to_thread.run_sync(self._record, name, chain, plan)
        except FusesnapError as error:  # whoever needs it will be told
            log.info("the view of %s was not built ahead: %s", name, error)

    def _read(self, name: str) -> Chain:
        with self._metastore.reading() as transaction:
            return transaction.chain(name)

    def _record(self, name: str, chain: Chain, plan: Plan) -> None:
        """Have the chain refer to the farms, so that they stay: until it is removed, or a layer put above it."""
        with self._metastore.writing() as transaction:
            same = transaction.snapshot(name).id == chain.id
            if (
                same and transaction.child(chain.id) is None
            ):  # a child has better, or makes this no image
                for farm in plan.farms:
                    self._farms.ensure(farm)
                transaction.set_generation(chain.id, plan.generation)
