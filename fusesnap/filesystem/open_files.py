"""A bounded set of open descriptors by inode number."""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict


class OpenFiles:
    """The most recently read files, kept open.

    Handles are stateless (``fh`` is the inode), so a descriptor may be dropped at any time and is opened again at the
    next read.
    """

    def __init__(self, capacity: int = 512) -> None:
        self._capacity = capacity
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def get(self, number: int) -> int | None:
        """The descriptor of inode ``number``, if it is open."""
        descriptor = self._descriptors.get(number)
        if descriptor is not None:
            self._descriptors.move_to_end(number)
        return descriptor

    def open(self, number: int, location: bytes, size: int) -> int:
        """Open ``location``, a file of ``size`` bytes, for inode ``number``.

        Raises ``FileNotFoundError`` where there is no such file, other ``OSError`` as it comes.

        Two readers that waited for the same path come here both; the second gets what the first opened.
        """
        held = self.get(number)
        if held is not None:
            return held
        descriptor = os.open(location, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            os.close(descriptor)
            raise FileNotFoundError(errno.ENOENT, "it is another file", os.fsdecode(location))
        self._descriptors[number] = descriptor
        if len(self._descriptors) > self._capacity:
            _, oldest = self._descriptors.popitem(last=False)
            os.close(oldest)
        return descriptor

    def close_removed(self) -> None:
        """Close those whose files were removed: as long as they are open they take room on the disk."""
        for number, descriptor in list(self._descriptors.items()):
            if os.fstat(descriptor).st_nlink == 0:
                del self._descriptors[number]
                os.close(descriptor)

    def close(self) -> None:
        """Close them all."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
