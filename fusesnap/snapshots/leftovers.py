"""What no snapshot owns: found by comparing what is on disk with the metastore's rows, and removed."""

from __future__ import annotations

import logging
from pathlib import Path

from fusesnap.errors import StorageFailure
from fusesnap.snapshots.directories import Directories, remove_tree
from fusesnap.snapshots.farms import Farms
from fusesnap.snapshots.idmapped import IdmappedMounts
from fusesnap.snapshots.metastore import Metastore
from fusesnap.snapshots.mountinfo import overlay_mounts
from fusesnap.snapshots.snapshot_roots import SnapshotRoots

log = logging.getLogger(__name__)


class Leftovers:
    """The leftovers of one state directory: directories, farms, idmapped mounts and roots. Blocking."""

    def __init__(
        self,
        metastore: Metastore,
        directories: Directories,
        farms: Farms,
        idmapped: IdmappedMounts,
        roots: SnapshotRoots,
    ) -> None:
        self._metastore = metastore
        self._directories = directories
        self._farms = farms
        self._idmapped = idmapped
        self._roots = roots

    def remove(self) -> list[Path]:
        """Remove what no snapshot owns; says what it was. What cannot be removed is left for the next time.

        Raises ``StorageFailure`` where it cannot be found out.
        """
        with self._metastore.writing() as transaction:
            ids = transaction.ids()
            rubbish = self._directories.set_orphans_aside(ids)
            farms = self._farms.set_aside_unused(transaction.farms(), overlay_mounts)
            rubbish.update((farm, farm) for farm in farms)
            for id_ in self._idmapped.ids() - ids:
                self._idmapped.remove(id_)
            let_go = self._roots.of_nobody(ids, overlay_mounts)
        self._roots.remove(let_go)
        removed = []
        for path, former in rubbish.items():
            try:
                remove_tree(path)
            except StorageFailure as error:
                log.warning("%s", error)
            else:
                removed.append(former)
        return removed

    def remove_if_possible(self) -> None:
        """The same for when nobody waits for it: what was found, or why nothing could be, goes to the log."""
        try:
            for leftover in self.remove():
                log.warning("removed %s, which no snapshot owns", leftover)
        except StorageFailure as error:
            log.warning("%s", error)
