"""What a snapshot takes on disk."""

from __future__ import annotations

import os
from pathlib import Path

from fusesnap.snapshots.interface import Usage
from fusesnap.store.disk_space import BLOCK, measure
from fusesnap.store.storage_errors import storage


def disk_usage(directory: Path) -> Usage:
    """Add up the blocks of every inode in ``directory``, itself included; hard links count once.

    Raises ``StorageFailure``.
    """
    with storage("measure", directory):
        return Usage(*measure(directory))


def directories_usage(directory: Path) -> Usage:
    """Add up the directories in ``directory`` alone: of a completed layer, whose files are links of the store's.

    Raises ``StorageFailure``.
    """
    with storage("measure", directory):
        blocks = [os.fstat(opened).st_blocks for _, _, _, opened in os.fwalk(directory)]
    return Usage(sum(blocks) * BLOCK, len(blocks))
