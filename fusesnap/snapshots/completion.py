"""Store paths inside an image layer, for a layer that adds to paths of a layer below it.

Such a layer has a directory for the path, with what it adds and its whiteouts. A farm cannot show both: its redirect
ends the path's search in the image. So the path is left to the image's layers, and its content is put into a directory
of the layer's own snapshot, directly below what the layer holds. Overlayfs then merges the two as OCI wants it.

The files are hard links to the store's. They are never in an upper directory, where writing would change the store.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.tree import STORE_MTIME_NS
from fusesnap.snapshots.directories import NEW, remove_tree
from fusesnap.snapshots.farms import STORE_ROOT_MODE
from fusesnap.snapshots.interface import CommittedStore
from fusesnap.store.storage_errors import storage


def complete(
    base: Path, paths: Iterable[StorePath], store: CommittedStore, store_dir: StoreDir
) -> None:
    """Make the layer ``base`` with the content of ``paths``, which are committed directories.

    A layer that an earlier attempt has left is replaced. Raises ``StorageFailure``.
    """
    temporary = base.with_name(f"{NEW}{base.name}")
    for leftover in (temporary, base):
        remove_tree(leftover)
    with storage("build", base):
        directory = temporary / store_dir.path.strip("/")
        directory.mkdir(parents=True)
        for path in paths:
            _link_tree(store.location(path), directory / path.base_name)
        temporary.rename(base)


def _link_tree(source: Path, target: Path) -> None:
    """Copy directories and links, with the metadata that a store has, and link files."""
    made = []
    waiting = [(str(source), str(target))]
    while waiting:
        here, there = waiting.pop()
        os.mkdir(there)  # noqa: PTH102  # strings: there may be hundreds of thousands
        made.append(there)
        with os.scandir(here) as listing:
            for entry in listing:
                name = f"{there}/{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((entry.path, name))
                else:
                    os.link(entry.path, name, follow_symlinks=False)
    for directory in reversed(made):
        os.chmod(directory, STORE_ROOT_MODE)  # noqa: PTH101
        os.utime(directory, ns=(STORE_MTIME_NS, STORE_MTIME_NS))
