"""Which of a snapshotter's answers are followed by a start that the lazy layer serves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import trio

from fusesnap.nix.store_path import StorePath
from fusesnap.snapshots.interface import Kind, Starts
from fusesnap.snapshots.records import Chain
from fusesnap.snapshots.views import Plan


class StartHints:
    """Tells ``starts``, if there is somebody to be told.

    A view has no upper directory by which its processes would be known, and is rarely a container's root.
    """

    def __init__(self, starts: Starts | None) -> None:
        self._starts = starts

    def rooting(
        self,
        root: Callable[[Iterable[StorePath]], None],
        chain: Chain,
        labels: Mapping[str, str],
    ) -> Callable[[Iterable[StorePath]], None]:
        """``root``, to be called in a thread with the paths of a layer above ``chain``: from then on they are known.

        So that whoever wants to ask caches does it while they are asked for these paths.
        """

        def root_and_tell(paths: Iterable[StorePath]) -> None:
            root(paths)
            if self._starts is not None:
                shown = chain.paths.keys() | set(paths)
                trio.from_thread.run_sync(self._starts.foreseen, frozenset(shown), labels)

        return root_and_tell

    def announced(self, paths: Iterable[StorePath], labels: Mapping[str, str]) -> None:
        """An image is about to be unpacked whose layers have these ``labels`` and whose containers show ``paths``."""
        if self._starts is not None:
            self._starts.foreseen(frozenset(paths), labels)

    def admitted(self, name: str, shown: Iterable[StorePath]) -> None:
        """A layer becomes committed as ``name``, above which all is ``shown`` that can be had, or nothing."""
        paths = frozenset(shown)
        if self._starts is not None and paths:
            self._starts.admitted(name, paths)

    def answered(self, kind: Kind, key: str, upper: Path, chain: Chain, plan: Plan | None) -> None:
        """A snapshot is answered for by ``plan``, for the first time or because it is started again."""
        lazy = plan.lazy if plan is not None else frozenset()
        if self._starts is not None and lazy and kind is Kind.ACTIVE:
            self._starts.begins(key, upper, frozenset(chain.paths), lazy)

    def removed(self, key: str) -> None:
        """A snapshot that the lazy layer may have served is removed."""
        if self._starts is not None:
            self._starts.ended(key)
