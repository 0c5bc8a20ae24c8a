"""Decides which layers of ours a mount gets, from what is committed now, and has them built.

A container waits for this, so what was found out is kept: as long as nothing has come into the store directory or gone
from it, the view of a chain is what it was, and one look at that directory says so, however many paths the chain has.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

import trio

from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.snapshots.farms import LAZY_NAME, STORE_NAME, Farm, Farms, read_metadata
from fusesnap.snapshots.interface import CommittedStore, LazyLayer, PathSource
from fusesnap.snapshots.nix_layer import NixLayers
from fusesnap.snapshots.records import Chain, Generation, PathKind
from fusesnap.store.storage_errors import storage

# Seconds within which a file system may give two changes of a directory the same time. ext4 with inodes of 128 bytes
# keeps whole seconds; others tick 100 to 1,000 times in one, and only from Linux 6.13 on does a look end a tick.
TICK: Final = 2.0
# The names of a large closure take some 500 KiB; few images are started at the same time.
MAX_REMEMBERED: Final = 32


@dataclass(frozen=True, slots=True)
class StoreState:
    """The store directory's identity and when it last changed: the same as long as its entries are."""

    device: int
    inode: int
    changed: int  # ns since the epoch


@dataclass(frozen=True, slots=True)
class Plan:
    """A generation, and the farms that must be there before it is answered with.

    ``wanted``: missing single files, of which nothing can be said before they are there. ``lazy``: all paths that the
    lazy layer serves in it, also when they have come.
    """

    generation: Generation
    farms: tuple[Farm, ...]
    wanted: tuple[StorePath, ...]
    lazy: frozenset[StorePath]


@dataclass(frozen=True, slots=True)
class _Remembered:
    """A plan, and the state of the store directory that it was made from, if that could be told from the next.

    ``began``: when that was, counted as questions are.
    """

    plan: Plan
    seen: StoreState | None
    began: int


@dataclass(frozen=True, slots=True)
class _Sorted:
    """The base names and paths of a chain by how they are shown, in the chain's order."""

    directories: tuple[str, ...]
    files: tuple[str, ...]
    missing_directories: tuple[StorePath, ...]
    in_view: tuple[StorePath, ...]
    wanted: tuple[StorePath, ...]


class Views:
    """The views of chains. Without ``lazy`` everything is realised before a view is answered with.

    ``clock`` gives seconds since the epoch.
    """

    def __init__(
        self,
        store: CommittedStore,
        paths: PathSource,
        nix: NixLayers,
        farms: Farms,
        lazy: LazyLayer | None,
        store_dir: StoreDir,
        clock: Callable[[], float],
    ) -> None:
        self._content = str(store.layer / STORE_NAME)
        self._store = store
        self._source = paths
        self._nix = nix
        self._farms = farms
        self._lazy = lazy
        self._store_dir = store_dir
        self._clock = clock
        self._remembered: dict[int, _Remembered] = {}
        self._moments = itertools.count()
        self._turns: WeakValueDictionary[int, trio.Lock] = WeakValueDictionary()

    async def plan(
        self,
        chain: Chain,
        image_layers: Sequence[Path],
        *,
        complete: bool = False,
        fetch_ahead: bool = True,
    ) -> Plan:
        """The view of a chain that has store paths, as it is best now; ``complete``: when nothing is missing.

        Its farms are built. Unless ``fetch_ahead`` is false, missing single files are fetched in the background from
        here on. Raises ``StorageFailure``, and what ``PathSource.realise`` raises where nothing may be missing.
        """
        complete = complete or self._lazy is None
        asked = next(self._moments)
        # Whoever asks meanwhile waits, and then finds what the first has made.
        async with self._turns.setdefault(chain.id, trio.Lock()):
            known = self._remembered.get(chain.id)
            if known is None or known.began < asked or not _serves(known.plan, complete=complete):
                plan = await self._plan(chain, image_layers, complete=complete)
            else:  # looked for after we asked: as good as our own
                plan = known.plan
        if fetch_ahead and plan.wanted:
            self._source.prefetch(plan.wanted)
        return plan

    def known(self, chain: Chain) -> Plan | None:
        """The last view of a chain, if nothing has come or gone since. Blocks for two looks at directories."""
        known = self._standing(chain)
        if known is None or known.plan.wanted or not self._is_as_seen(known):
            return None
        return known.plan

    async def _plan(self, chain: Chain, image_layers: Sequence[Path], *, complete: bool) -> Plan:
        began = next(self._moments)
        plan, seen, missing = await trio.to_thread.run_sync(self._compare, chain, began)
        if plan is not None and _serves(plan, complete=complete):
            return plan
        if complete:
            await self._nix.realise_all(chain.paths)
            missing = set()
        paths = await trio.to_thread.run_sync(self._sort, chain.paths, missing)
        files_view = None
        if paths.in_view and self._lazy is not None:
            files_view = await self._lazy.view(frozenset(paths.in_view))
        plan = await trio.to_thread.run_sync(self._compose, paths, files_view, image_layers)
        self._remember(chain, _Remembered(plan, seen, began))
        return plan

    def _compare(
        self, chain: Chain, began: int
    ) -> tuple[Plan | None, StoreState | None, set[StorePath]]:
        """The last plan, if it would be the same now; else the state of the store directory, and what is missing."""
        known = self._standing(chain)
        if known is not None and self._is_as_seen(known):
            return known.plan, known.seen, set()
        seen = self._settled()
        missing = chain.paths.keys() - self._store.committed_among(list(chain.paths))
        if known is None or missing or not known.plan.generation.complete:
            return None, seen, missing
        self._remember(chain, _Remembered(known.plan, seen, began))
        return known.plan, seen, missing

    def _standing(self, chain: Chain) -> _Remembered | None:
        """What is remembered of a chain, if its farms are there."""
        known = self._remembered.get(chain.id)
        there = known is not None and self._farms.are_there(known.plan.generation.farms)
        return known if there else None

    def _is_as_seen(self, known: _Remembered) -> bool:
        """Whether nothing has come into the store or gone since."""
        return known.seen is not None and known.seen == self._look()

    def _look(self) -> StoreState:
        with storage("look at", self._content):
            status = os.stat(self._content)  # noqa: PTH116  # a container waits for this
        return StoreState(status.st_dev, status.st_ino, status.st_ctime_ns)

    def _settled(self) -> StoreState | None:
        """The state of the store directory; ``None`` where a change that comes now might not show in it."""
        now = self._clock()
        state = self._look()
        return state if state.changed / 1e9 < now - TICK else None

    def _remember(self, chain: Chain, found: _Remembered) -> None:
        self._remembered.pop(chain.id, None)
        self._remembered[chain.id] = found
        for oldest in list(self._remembered)[:-MAX_REMEMBERED]:
            self._remembered.pop(oldest, None)

    def _sort(self, paths: Mapping[StorePath, PathKind], missing: set[StorePath]) -> _Sorted:
        """A committed path is what it is on disk; of a missing one there is the image's word.

        Paths that are no directories, or may be none, are shown by FUSE until the last of their sort is there. Then all
        go to the closure farm: it has an entry for each directory, and would be built anew for every file that comes.
        """
        directories: list[str] = []
        files: list[str] = []
        missing_directories: list[StorePath] = []
        in_view: list[StorePath] = []
        incomplete = {_sort_of(paths[path]) for path in missing}
        with storage("look at", self._content):
            for path, kind in paths.items():
                name, sort = path.base_name, _sort_of(kind)
                if sort is PathKind.DIRECTORY and path in missing:
                    # It is in the closure farm too: the farm stays the same when the path arrives.
                    directories.append(name)
                    missing_directories.append(path)
                elif sort is not PathKind.DIRECTORY and sort in incomplete:
                    in_view.append(path)
                else:
                    # Strings: a closure has thousands of paths, and a container waits for this.
                    mode = os.lstat(f"{self._content}/{name}").st_mode
                    (directories if stat.S_ISDIR(mode) else files).append(name)
        # Directories are fetched when somebody opens them, and nearly all that is doubtful is one.
        wanted = [path for path in in_view if _sort_of(paths[path]) is PathKind.FILE]
        return _Sorted(
            tuple(directories),
            tuple(files),
            tuple(missing_directories),
            tuple(in_view),
            tuple(path for path in wanted if path in missing),
        )

    def _compose(
        self, paths: _Sorted, files_view: Path | None, image_layers: Sequence[Path]
    ) -> Plan:
        names = ["", *_prefixes(self._store_dir)]
        parents = tuple((name, read_metadata(image_layers, name)) for name in names)
        content = Path(self._content)
        closure = Farm(parents, STORE_NAME, paths.directories, paths.files, content)
        self._farms.ensure(closure)
        if not paths.missing_directories and files_view is None:
            generation = Generation(closure.key, None, None, None)
            return Plan(generation, (closure,), paths.wanted, frozenset())
        names_of_missing = tuple(path.base_name for path in paths.missing_directories)
        lazy = Farm(parents, LAZY_NAME, names_of_missing)
        self._farms.ensure(lazy)
        lazy_layer = None
        if paths.missing_directories and self._lazy is not None:
            lazy_layer = self._lazy.layer
        generation = Generation(closure.key, lazy.key, files_view, lazy_layer)
        served = frozenset((*paths.missing_directories, *paths.in_view))
        return Plan(generation, (closure, lazy), paths.wanted, served)


def _serves(plan: Plan, *, complete: bool) -> bool:
    return plan.generation.complete or not complete


def _sort_of(kind: PathKind) -> PathKind:
    """Of what is no directory for sure, whether it is fetched ahead (``FILE``) or not (``DIRECTORY_OR_LINK``)."""
    return PathKind.FILE if kind is PathKind.UNKNOWN else kind


def _prefixes(store_dir: StoreDir) -> list[str]:
    """The store directory and those above it but the root, outermost first: ``nix``, ``nix/store``."""
    parts = store_dir.path.strip("/").split("/")
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]
