"""What store paths reference, as narinfos say it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.store_path import StorePath


def reached(roots: Iterable[StorePath], narinfos: Mapping[StorePath, NarInfo]) -> set[StorePath]:
    """``roots`` and all that they reference, directly or not, also where that is not among ``narinfos``."""
    found: set[StorePath] = set()
    frontier = set(roots)
    while frontier:
        found |= frontier
        known = (narinfos[path] for path in frontier if path in narinfos)
        frontier = {each for info in known for each in info.references} - found
    return found
