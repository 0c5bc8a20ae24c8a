"""Whose the files of a chain are in a snapshot's mount.

Three ways lead to a container with a user namespace:

*   containerd 2 with the capability ``remap-ids`` gives the snapshot labels. A mount without FUSE is answered with the
    options ``uidmap=`` and ``gidmap=``, one with FUSE in it with idmapped mounts of ours (see ``idmapped``).
*   Any other containerd gives every file of the image another owner once: it prepares ``<image>…-remap``, mounts it,
    calls lchown for everything it finds, and commits. Through the store that would copy the whole closure, and fetch it
    before. So what it mounts there are the image's layers alone, and what it commits is *shifted*: its files have the
    owners of the host. The store is shown above it, idmapped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fusesnap.snapshots.id_mapping import IdMapping
from fusesnap.snapshots.records import Generation

# In containerd 1.6 ``<chain id>-<uid>-<gid>-remap``, later also ``<digest>-remap`` (``client/snapshotter_opts_unix.go``
# there). The key of a container ends with its name, which has no digest in it.
_SHIFTING: Final = re.compile(r"(?:.*/)?[a-z0-9]+:[0-9a-f]{32,}(?:-[0-9]+-[0-9]+)?-remap")


def is_shifting(key: str) -> bool:
    """Whether containerd will give everything that it finds in the snapshot of that key another owner."""
    return _SHIFTING.fullmatch(key) is not None


@dataclass(frozen=True, slots=True)
class Owners:
    """``mapping`` is the user namespace's, if there is one; ``shifted`` layers, from the top, are written for it."""

    mapping: IdMapping | None = None
    shifted: int = 0

    @classmethod
    def of(cls, labels: Mapping[str, str], shift: tuple[int, tuple[int, int]] | None) -> Owners:
        """``shift``: how many layers are shifted, and to whom the root. Raises ``InvalidArgument`` for the labels."""
        mapping = IdMapping.of_labels(labels)
        if shift is None:
            return cls(mapping)
        layers, root = shift
        return cls(mapping or IdMapping.from_root(*root), layers)

    def mapping_of_store(self, generation: Generation | None) -> IdMapping | None:
        """That of the idmapped mounts that we have to make; ``None`` where containerd makes them, or nobody."""
        if generation is None or (generation.complete and not self.shifted):
            return None
        return self.mapping

    def options(self, generation: Generation | None) -> tuple[str, ...]:
        """What has containerd map the layers."""
        if self.mapping is None or self.shifted or self.mapping_of_store(generation) is not None:
            return ()
        return self.mapping.options
