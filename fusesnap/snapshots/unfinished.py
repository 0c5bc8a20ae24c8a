"""What keeps containers on FUSE: the store paths of their images that are not committed yet."""

from __future__ import annotations

from fusesnap.nix.store_path import StorePath
from fusesnap.snapshots.interface import CommittedStore
from fusesnap.snapshots.metastore import Metastore


class Unfinished:
    """Looks for them. With the last of them a mount that is answered from then on has no FUSE in it."""

    def __init__(self, metastore: Metastore, store: CommittedStore) -> None:
        self._metastore = metastore
        self._store = store

    def missing(self) -> list[StorePath]:
        """The missing paths of all images that active snapshots lie on; blocking. Raises ``StorageFailure``."""
        wanted: set[StorePath] = set()
        with self._metastore.reading() as transaction:
            for parent in transaction.active_parents():
                wanted.update(transaction.chain(parent).paths)
        listed = sorted(wanted)
        there = self._store.committed_among(listed)
        return [path for path in listed if path not in there]
