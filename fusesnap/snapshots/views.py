"""Decides which layers of ours a mount gets, from what is committed now."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.snapshots.farms import LAZY_NAME, STORE_NAME, Farm, read_metadata
from fusesnap.snapshots.interface import CommittedStore, LazyLayer, PathSource
from fusesnap.snapshots.nix_layer import NixLayers
from fusesnap.snapshots.records import Chain, Generation, PathKind
from fusesnap.store.storage_errors import storage


@dataclass(frozen=True, slots=True)
class Plan:
    """A generation, and the farms that must be built before it is answered with."""

    generation: Generation
    farms: tuple[Farm, ...]


@dataclass(frozen=True, slots=True)
class _Sorted:
    """The paths of a chain by how they are shown, each sorted."""

    directories: tuple[StorePath, ...]
    files: tuple[StorePath, ...]
    missing_directories: tuple[StorePath, ...]
    missing_others: tuple[StorePath, ...]
    doubtful: tuple[StorePath, ...]  # missing, and perhaps no directories


class Views:
    """Plans the views of chains. Without ``lazy`` everything is realised before a mount is answered."""

    def __init__(
        self,
        store: CommittedStore,
        paths: PathSource,
        nix: NixLayers,
        lazy: LazyLayer | None,
        store_dir: StoreDir,
    ) -> None:
        self._store = store
        self._source = paths
        self._nix = nix
        self._lazy = lazy
        self._store_dir = store_dir

    async def plan(
        self, chain: Chain, image_layers: Sequence[Path], *, complete: bool = False
    ) -> Plan:
        """The view of a chain that has store paths, as it is best now; ``complete``: when nothing is missing.

        Missing single files, and paths that may be some, are fetched in the background from here on. Raises
        ``StorageFailure``, and what ``PathSource.realise`` raises where nothing may be missing.
        """
        missing = set(await self._nix.missing(chain.paths))
        if complete or self._lazy is None:
            await self._nix.realise_all(missing)
            missing = set()
        paths = await trio.to_thread.run_sync(self._sort, chain, missing)
        files_view = None
        if paths.missing_others or paths.doubtful:
            # Directories are fetched when somebody opens them, and nearly all that is doubtful is one.
            if paths.missing_others:
                self._source.prefetch(paths.missing_others)
            if self._lazy is not None:
                files_view = await self._lazy.view(frozenset(paths.missing_others + paths.doubtful))
        return await trio.to_thread.run_sync(self._compose, paths, files_view, image_layers)

    def _sort(self, chain: Chain, missing: set[StorePath]) -> _Sorted:
        """A committed path is what it is on disk; of a missing one there is the image's word."""
        directories: list[StorePath] = []
        files: list[StorePath] = []
        missing_directories: list[StorePath] = []
        missing_others: list[StorePath] = []
        doubtful: list[StorePath] = []
        content = str(self._store.layer / STORE_NAME)
        with storage("look at", content):
            for path in sorted(chain.paths):
                if path not in missing:
                    # Strings: a closure has thousands of paths, and a container waits for this.
                    mode = os.lstat(f"{content}/{path.base_name}").st_mode
                    (directories if stat.S_ISDIR(mode) else files).append(path)
                elif chain.paths[path] is PathKind.DIRECTORY:
                    # It is in the closure farm too: the farm stays the same when the path arrives.
                    directories.append(path)
                    missing_directories.append(path)
                elif chain.paths[path] is PathKind.DIRECTORY_OR_LINK:
                    doubtful.append(path)
                else:
                    missing_others.append(path)
        return _Sorted(
            tuple(directories),
            tuple(files),
            tuple(missing_directories),
            tuple(missing_others),
            tuple(doubtful),
        )

    def _compose(
        self, paths: _Sorted, files_view: Path | None, image_layers: Sequence[Path]
    ) -> Plan:
        names = ["", *_prefixes(self._store_dir)]
        parents = tuple((name, read_metadata(image_layers, name)) for name in names)
        closure = Farm(
            parents,
            STORE_NAME,
            _base_names(paths.directories),
            _base_names(paths.files),
            self._store.layer / STORE_NAME,
        )
        if not paths.missing_directories and files_view is None:
            return Plan(Generation(closure.key, None, None, None), (closure,))
        lazy = Farm(parents, LAZY_NAME, _base_names(paths.missing_directories))
        lazy_layer = None
        if paths.missing_directories and self._lazy is not None:
            lazy_layer = self._lazy.layer
        return Plan(Generation(closure.key, lazy.key, files_view, lazy_layer), (closure, lazy))


def _prefixes(store_dir: StoreDir) -> list[str]:
    """The store directory and those above it but the root, outermost first: ``nix``, ``nix/store``."""
    parts = store_dir.path.strip("/").split("/")
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def _base_names(paths: Sequence[StorePath]) -> tuple[str, ...]:
    return tuple(path.base_name for path in paths)
