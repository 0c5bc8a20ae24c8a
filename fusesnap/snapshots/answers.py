"""What a snapshot's client is told to mount: its layers, as the ids of its user namespace see them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import trio

from fusesnap.errors import Unsupported
from fusesnap.snapshots import overlay
from fusesnap.snapshots.directories import Directories
from fusesnap.snapshots.farms import Farms
from fusesnap.snapshots.id_mapping import IdMapping
from fusesnap.snapshots.idmapped import Clones, IdmappedMounts
from fusesnap.snapshots.interface import CommittedStore, Kind, Mount
from fusesnap.snapshots.overlay import OverlayOptions
from fusesnap.snapshots.owners import Owners, is_shifting
from fusesnap.snapshots.records import Chain, Generation
from fusesnap.snapshots.views import Plan, Views

log = logging.getLogger(__name__)

# A few words each.
MAX_CHAINS: Final = 1024


class Answers:
    """Writes down the mounts of one state directory's snapshots. Holds what never changes of the chains it has seen."""

    def __init__(
        self,
        directories: Directories,
        farms: Farms,
        store: CommittedStore,
        views: Views,
        idmapped: IdmappedMounts,
        options: OverlayOptions,
    ) -> None:
        self._directories = directories
        self._farms = farms
        self._store = store
        self.views = views
        self._idmapped = idmapped
        self._options = options
        # By the id of a chain, whose layers stay as they are, and which is never another's.
        self._shifts: dict[int, tuple[int, tuple[int, int]] | None] = {}

    def owners(self, key: str, labels: Mapping[str, str], chain: Chain) -> Owners:
        """Whose the files of ``chain`` are in the snapshot ``key``. Raises ``InvalidArgument`` for its labels."""
        if is_shifting(key):
            return Owners()
        return Owners.of(labels, self._shift(chain))

    def _shift(self, chain: Chain) -> tuple[int, tuple[int, int]] | None:
        """How many layers of a chain are shifted, and to whom the root; ``None`` for none."""
        with suppress(KeyError):
            return self._shifts[chain.id]
        shifts = (
            (position, root)
            for position, layer in enumerate(chain.layers, 1)
            if (root := self._directories.shifted_to(layer.id)) is not None
        )
        shift = next(shifts, None)
        if len(self._shifts) >= MAX_CHAINS:
            self._shifts.clear()
        self._shifts[chain.id] = shift
        return shift

    def image_layers(self, chain: Chain, above: int = 0) -> list[Path]:
        """The directories of a chain's layers, topmost first, without those ``above``."""
        layers = []
        for layer in chain.layers[above:]:
            layers.append(self._directories.fs(layer.id))
            if layer.completed:
                layers.append(self._directories.base(layer.id))
        return layers

    async def plan(self, chain: Chain, owners: Owners) -> tuple[Plan, Clones | None]:
        """The view of a chain that has store paths, and the idmapped mounts that it needs.

        Where FUSE can have none, the closure is completed first: containerd maps the local store. Raises as
        :meth:`Views.plan`, and ``Unsupported`` where the local store can have none either.
        """
        if owners.mapping is not None and not owners.shifted:
            await trio.to_thread.run_sync(self._check_state, owners.mapping)
        layers = self.image_layers(chain, owners.shifted)
        plan = await self.views.plan(chain, layers)
        mapping = owners.mapping_of_store(plan.generation)
        if mapping is None:
            return plan, None
        clone = partial(self._idmapped.clone, mapping, lazy=not plan.generation.complete)
        try:
            return plan, await trio.to_thread.run_sync(clone)
        except Unsupported as error:
            if owners.shifted:
                log.warning("store paths are shown as nobody's in a user namespace: %s", error)
                return plan, None
            log.warning("a user namespace waits until its closure is complete: %s", error)
            return await self.views.plan(chain, layers, complete=True), None

    def _check_state(self, mapping: IdMapping) -> None:
        """Raise ``Unsupported`` where containerd could not map the local store: nothing is to be built for it."""
        try:
            with self._idmapped.clone(mapping, lazy=False):
                pass
        except Unsupported as error:
            raise Unsupported(
                f'{error}: without capabilities = ["remap-ids"] containerd would not ask for it'
            ) from error

    def idmap(self, id_: int, owners: Owners, generation: Generation) -> Clones | None:
        """The idmapped mounts that an answer was given with and that are not there any more."""
        mapping, lazy = owners.mapping_of_store(generation), not generation.complete
        if mapping is None or self._idmapped.are_there(id_, lazy=lazy):
            return None
        try:
            return self._idmapped.clone(mapping, lazy=lazy)
        except Unsupported:
            if owners.shifted:
                return None
            raise

    def mounts(
        self, id_: int, kind: Kind, chain: Chain, generation: Generation | None, owners: Owners
    ) -> tuple[Mount, ...]:
        """How to mount snapshot ``id_``. What idmapped mounts it is to have are there."""
        lowers = self.image_layers(chain)
        redirects = generation is not None
        if generation is not None:
            ours = overlay.view_layers(generation, self._farms, self._store.layer)
            if owners.mapping_of_store(generation) is not None and self._idmapped.has_any(id_):
                ours = tuple(self._idmapped.path(id_, layer) for layer in ours)
                if not owners.shifted:
                    lowers = [self._idmapped.path(id_, layer) for layer in lowers]
            lowers[:0] = ours
        fs, mapped = self._directories.fs(id_), owners.options(generation)
        if not lowers:
            return (overlay.bind(fs, writable=kind is Kind.ACTIVE, mapped=mapped),)
        if kind is Kind.VIEW and len(lowers) == 1:  # overlayfs wants two layers
            return (overlay.bind(lowers[0], writable=False, mapped=mapped),)
        upper = (fs, self._directories.work(id_)) if kind is Kind.ACTIVE else None
        return (
            overlay.overlay(lowers, self._options, upper=upper, redirects=redirects, mapped=mapped),
        )
