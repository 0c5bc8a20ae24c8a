"""Which of a snapshotter's answers are followed by a start that the lazy layer serves."""

from __future__ import annotations

from pathlib import Path

from fusesnap.snapshots.interface import Kind, Starts
from fusesnap.snapshots.records import Chain, Generation


class StartHints:
    """Tells ``starts``, if there is somebody to be told.

    A view has no upper directory by which its processes would be known, and is rarely a container's root.
    """

    def __init__(self, starts: Starts | None) -> None:
        self._starts = starts

    def answered(
        self, kind: Kind, key: str, upper: Path, chain: Chain, generation: Generation | None
    ) -> None:
        """A snapshot is answered for with ``generation``, for the first time or because it is started again."""
        lazy = generation is not None and not generation.complete
        if self._starts is not None and lazy and kind is Kind.ACTIVE:
            self._starts.begins(key, upper, frozenset(chain.paths))

    def removed(self, key: str) -> None:
        """A snapshot that the lazy layer may have served is removed."""
        if self._starts is not None:
            self._starts.ended(key)
