"""Each snapshot that is a Nix layer is a root: its closure is kept from before it is looked for until Remove.

Rows and roots go in an order that leaves a root too many after kill -9, never one too few: the root is there before the
row, and goes after it. A root that no row owns is removed by the next pass that looks for rubbish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from fusesnap.nix.store_path import StorePath
from fusesnap.snapshots.mountinfo import OverlayMount
from fusesnap.store.roots import Roots

_PREFIX: Final = "snapshot-"


class SnapshotRoots:
    """The roots of the snapshots of the state directory ``state``, by their ids. Methods raise ``StorageFailure``."""

    def __init__(self, roots: Roots, state: Path) -> None:
        self._roots = roots
        self._state = state

    def add(self, id_: int, paths: Iterable[StorePath]) -> None:
        """Keep the closure of a snapshot that stands for ``paths``."""
        self._roots.add(f"{_PREFIX}{id_}", paths)

    def recover(self, stated: Mapping[int, Iterable[StorePath]]) -> None:
        """Keep what the snapshots stand for, also where an earlier version wrote no roots or a crash lost them."""
        there = self._roots.names()
        self._roots.guard()
        for id_, paths in stated.items():
            if f"{_PREFIX}{id_}" not in there:
                self.add(id_, paths)

    def of_nobody(self, owned: set[int], mounts: Callable[[], Sequence[OverlayMount]]) -> list[str]:
        """The roots of snapshots that are gone, and that no mount uses any more.

        ``mounts`` says which there are; it is asked only where something may have to go. Only right within a
        transaction that writes: a snapshot has its row before it has its root.
        """
        gone = [
            name
            for name in sorted(self._roots.names())
            if name.startswith(_PREFIX) and not _is_owned(name.removeprefix(_PREFIX), owned)
        ]
        found = mounts() if gone else ()
        return [name for name in gone if not self._is_mounted(name.removeprefix(_PREFIX), found)]

    def _is_mounted(self, id_: str, mounts: Sequence[OverlayMount]) -> bool:
        """Whether a mount has the snapshot's layer below it.

        A lower directory may be given as a relative path, of which nobody knows what it is relative to. An absolute one
        elsewhere is another snapshotter's: containerd's own counts from 1 too, and names its directories alike.
        """
        layer, ours = f"snapshots/{id_}/fs", f"{self._state}/"
        return any(
            lower == layer
            or (lower.endswith(f"/{layer}") and lower.startswith(ours if lower[0] == "/" else ""))
            for mount in mounts
            for lower in mount.lowers
        )

    def remove(self, names: Iterable[str]) -> None:
        """Let go of what these roots keep."""
        for name in names:
            self._roots.remove(name)


def _is_owned(id_: str, owned: set[int]) -> bool:
    return id_.isdecimal() and int(id_) in owned
