"""A file that is there to be removed: to free room on a full disk takes some room.

What no root reaches is removed by transactions of two databases and by renames into a directory that is made for it. On
a disk without a single free block all of that fails, and nothing would ever be freed. (Where root may use blocks that
others may not, as on ext4 by default, it is not needed; XFS, btrfs and tmpfs keep none.)
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

# The write-ahead logs of two databases for a batch of paths: some pages of 4 KiB for each, and a directory.
SIZE: Final = 1 << 20


class Ballast:
    """The ballast of one state directory. Nothing is raised: it helps, or it does not."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def restore(self) -> None:
        """Have it there, if there is room for it."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            logger.debug("%s: %s", self._path, error)
            return
        try:
            if os.fstat(descriptor).st_size < SIZE:
                os.posix_fallocate(descriptor, 0, SIZE)
        except OSError as error:
            logger.debug("%s: %s", self._path, error)
            with suppress(OSError):
                self._path.unlink()
        finally:
            os.close(descriptor)

    def release(self) -> bool:
        """Give its room away. Returns whether there was any."""
        try:
            self._path.unlink()
        except OSError:
            return False
        return True
