"""What keeps containers on FUSE: the store paths of their images that are not committed yet."""

from __future__ import annotations

from fusesnap.nix.store_path import StorePath
from fusesnap.snapshots.interface import CommittedStore
from fusesnap.snapshots.metastore import Metastore


class Unfinished:
    """Looks for them. With the last of them a mount that is answered from then on has no FUSE in it.

    A chain of which all was there is not looked at again as long as something active lies on it: its paths are roots.
    """

    def __init__(self, metastore: Metastore, store: CommittedStore) -> None:
        self._metastore = metastore
        self._store = store
        self._finished: set[int] = set()

    def missing(self) -> list[StorePath]:
        """The missing paths of all images that active snapshots lie on; blocking. Raises ``StorageFailure``."""
        with self._metastore.reading() as transaction:
            found = [transaction.chain(parent) for parent in transaction.active_parents()]
        chains = {chain.id: chain.paths for chain in found}
        self._finished &= chains.keys()
        looked_at = {id_: paths for id_, paths in chains.items() if id_ not in self._finished}
        listed = sorted({path for paths in looked_at.values() for path in paths})
        there = self._store.committed_among(listed)
        self._finished |= {id_ for id_, paths in looked_at.items() if paths.keys() <= there}
        return [path for path in listed if path not in there]
