"""Tries out whether the layers of a mount can be idmapped on this machine, for containers with user namespaces.

containerd may be told ``capabilities = ["remap-ids"]`` where all of it can be. Where it is not, it gives every file
of an image another owner, once for each mapping; store paths are then mapped as far as they can be.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fusesnap import fuse_mount
from fusesnap.errors import FusesnapError, Unsupported
from fusesnap.fuse_mount import MountFailure
from fusesnap.snapshots.id_mapping import IdMapping
from fusesnap.snapshots.idmapped import check_overlay, clones
from fusesnap.store.storage_errors import storage

ANY_MAPPING = IdMapping.from_root(100_000, 100_000)


@dataclass(frozen=True, slots=True)
class Idmapping:
    """Why not, each empty where it can be done: ``state`` for the state directory, ``fuse`` for our FUSE mount."""

    state: str
    fuse: str

    @property
    def remap_ids(self) -> bool:
        """Whether containerd may be told ``capabilities = ["remap-ids"]``."""
        return not self.state and not self.fuse


def idmapping(root: Path) -> Idmapping:
    """Try it in the state directory ``root``, or where it will be made, with mounts that are gone afterwards.

    Needs root. Blocking.
    """
    there = next(each for each in (root, *root.parents) if each.is_dir())
    return Idmapping(_reason(check_overlay, there), _reason(_check_fuse, there))


def _reason(check: Callable[[Path], None], directory: Path) -> str:
    try:
        check(directory)
    except (FusesnapError, MountFailure) as error:
        return str(error)
    return ""


def _check_fuse(directory: Path) -> None:
    """Mount FUSE as the supervisor does, and idmap a clone of it. Raises ``MountFailure`` or ``Unsupported``."""
    with (
        storage("write in", directory),
        TemporaryDirectory(dir=directory, prefix="idmap-") as place,
    ):
        connection = fuse_mount.mount(Path(place), 0)
        try:
            if not connection.can_idmap:
                raise Unsupported("FUSE cannot be mounted idmapped: Linux 6.12 or later is needed")
            with clones({"clone": Path(place)}, ANY_MAPPING):
                pass
        finally:
            # Nobody answers: whoever looks in there meanwhile gets an error, and does not wait.
            fuse_mount.detach(Path(place), abort=True)
            os.close(connection.fuse)
