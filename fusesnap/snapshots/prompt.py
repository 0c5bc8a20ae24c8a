"""Answers that nothing has to be waited for: a container whose closure is complete and whose view is known.

A start asks four times in a row, and on a small node each change of threads costs as much as the answer. So these
block, for as long as a look into the metastore takes (and a sync, where something is written), in the thread of whoever
asks. What is not as simple as that gets no answer here, and goes the whole way of :class:`Snapshotter`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from fusesnap.snapshots.announced import CHAIN_LABEL
from fusesnap.snapshots.answers import Answers
from fusesnap.snapshots.farms import Farms
from fusesnap.snapshots.interface import Info, Kind, Mount
from fusesnap.snapshots.labels import checked_labels
from fusesnap.snapshots.metastore import Metastore
from fusesnap.snapshots.nix_layer import NixLayers
from fusesnap.snapshots.owners import Owners, is_shifting
from fusesnap.snapshots.records import Chain, Generation
from fusesnap.snapshots.views import Plan

# Keys under which containerd unpacks layers: "<namespace>/<n>/extract-<unique> <chain id>".
UNPACK_PREFIX: Final = "extract-"

# Makes a snapshot: its kind, key, parent, labels, chain, owners and plan, and no idmapped clones; returns its id.
Insert = Callable[[Kind, str, str, Mapping[str, str], Chain, Owners, Plan | None, None], int]


class PromptAnswers:
    """See ``PromptSnapshots``. ``insert`` blocks; it is the snapshotter's own."""

    def __init__(
        self,
        metastore: Metastore,
        farms: Farms,
        answers: Answers,
        nix: NixLayers,
        insert: Insert,
    ) -> None:
        self._metastore = metastore
        self._farms = farms
        self._answers = answers
        self._nix = nix
        self._insert = insert

    def stat(self, key: str) -> Info:
        """See ``PromptSnapshots``."""
        with self._metastore.reading() as transaction:
            return transaction.snapshot(key).info

    def mounts(self, key: str) -> Sequence[Mount] | None:
        """See ``PromptSnapshots``."""
        with self._metastore.reading() as transaction:
            snapshot = transaction.snapshot(key)
            if snapshot.info.kind is Kind.COMMITTED:
                return None
            chain = transaction.chain(snapshot.info.parent)
            answered = transaction.generations(snapshot.id)
        owners = self._answers.owners(key, snapshot.info.labels, chain)
        if owners != Owners():
            return None
        generation = None
        if shows_store(key, chain):
            generation = self._only(answered)
            if generation is None:
                return None
        return self._answers.mounts(snapshot.id, snapshot.info.kind, chain, generation, owners)

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount] | None:
        """See ``PromptSnapshots``."""
        labels = checked_labels(labels)
        if CHAIN_LABEL in labels or not self._nix.is_silent(labels):
            return None
        with self._metastore.reading() as transaction:
            chain = transaction.chain(parent)
            transaction.check_free(key)
        owners = self._answers.owners(key, labels, chain)
        if owners != Owners() or is_shifting(key):
            return None
        plan = None
        if shows_store(key, chain):
            plan = self._answers.views.known(chain)
            if plan is None or not plan.generation.complete:
                return None
        id_ = self._insert(Kind.ACTIVE, key, parent, labels, chain, owners, plan, None)
        generation = plan.generation if plan is not None else None
        return self._answers.mounts(id_, Kind.ACTIVE, chain, generation, owners)

    def _only(self, answered: Sequence[Generation]) -> Generation | None:
        """The one generation that was ever answered with, if it cannot get better."""
        if len(answered) != 1 or not answered[0].complete:
            return None
        return answered[0] if self._farms.are_there(answered[0].farms) else None


def shows_store(key: str, chain: Chain) -> bool:
    """Whether a snapshot's mounts have the store above the image.

    A layer being unpacked goes onto plain layers, and what is rewritten for a user namespace are plain layers.
    """
    plain = key.rpartition("/")[2].startswith(UNPACK_PREFIX) or is_shifting(key)
    return bool(chain.paths) and not plain
