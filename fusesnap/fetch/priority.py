"""Who is served first."""

from __future__ import annotations

from enum import IntEnum


class Priority(IntEnum):
    """For whom something is fetched: the lower the number, the sooner.

    The order is strict: as long as something more urgent can use the link, nothing less urgent is begun.

    ``READER``      somebody is blocked on it now
    ``TRACE``       a start is about to ask for it: its startup trace says so, or the dynamic loader will
    ``REST``        it belongs to what is being read: of an image that is being started, of a path
    ``COMPLETION``  nobody asked; with it the closures of the node's images leave FUSE
    ``PREFETCH``    a person asked for it, before anybody needs it
    """

    READER = 0
    TRACE = 1
    REST = 2
    COMPLETION = 3
    PREFETCH = 4

    @property
    def keeps_order(self) -> bool:
        """Whether paths are fetched in the order in which they were given; otherwise the smallest come first."""
        return self in (Priority.READER, Priority.TRACE)
