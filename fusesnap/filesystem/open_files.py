"""A bounded set of open descriptors by inode number."""

from __future__ import annotations

import os
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

    def open(self, number: int, location: bytes) -> int:
        """Open ``location`` for inode ``number``. Raises ``OSError``.

        Two readers that waited for the same path come here both; the second gets what the first opened.
        """
        held = self.get(number)
        if held is not None:
            return held
        descriptor = os.open(location, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._descriptors[number] = descriptor
        if len(self._descriptors) > self._capacity:
            _, oldest = self._descriptors.popitem(last=False)
            os.close(oldest)
        return descriptor

    def close(self) -> None:
        """Close them all."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
