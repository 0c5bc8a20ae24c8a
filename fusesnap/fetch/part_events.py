"""Tells what becomes of one request for a part of a path."""

from __future__ import annotations

from fusesnap.fetch.events import (
    Asked,
    Boarded,
    InLine,
    Landed,
    ObserveFetch,
    Part,
    Paused,
    Received,
    Resumed,
    TransferBegun,
)
from fusesnap.fetch.link import Passage
from fusesnap.fetch.priority import Priority
from fusesnap.nix.store_path import StorePath


class PartEvents:
    """``observe`` hears of ``part`` of ``path``, from the moment of this one's making until :meth:`land`."""

    def __init__(
        self, observe: ObserveFetch, path: StorePath, priority: Priority, part: Part
    ) -> None:
        self._observe = observe
        self._path = path
        self._part = part
        self._cache = ""
        observe(Asked(path, priority, part))

    def board(self) -> None:
        """Caches are asked who has the path."""
        self._observe(Boarded(self._path, self._part))

    def cross(self, passage: Passage) -> None:
        """Its bytes come by ``passage``, when they have their turn."""
        passage.paused_or_resumed = self.paused_or_resumed
        if passage.waits:
            self._observe(InLine(self._path, self._part))

    def paused_or_resumed(self, paused: bool) -> None:
        """More urgent ones have the link, or it is its turn again."""
        told = Paused if paused else Resumed
        self._observe(told(self._path, self._part))

    def begin(self, cache: str, kept: int = 0) -> None:
        """What is missing is asked of ``cache``; ``kept`` bytes are here."""
        self._cache = cache
        size = self._part[1] - self._part[0]
        self._observe(TransferBegun(self._path, cache, size or None, kept, self._part))

    def receive(self, count: int) -> None:
        """So many bytes came."""
        self._observe(Received(self._path, self._cache, count, self._part))

    def land(self, error: Exception | None) -> None:
        """All of it is here, or ``error`` is why not."""
        self._observe(Landed(self._path, error, self._part))
