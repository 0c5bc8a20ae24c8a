"""Which paths that are here may have the bytes of one to come: those of the same package, by their names.

After a rebuild of something low the paths above it have other hash parts and the same names, and after an update other
versions. What is guessed wrong costs a look into a file of this disk.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

import trio

from fusesnap.errors import FusesnapError
from fusesnap.nix.nar_index import parse_nar_index
from fusesnap.nix.package_name import PackageName
from fusesnap.nix.signature import TrustedKeys
from fusesnap.nix.store_path import StorePath
from fusesnap.store.local_store import LocalStore
from fusesnap.store.partial_nars import PartialNars
from fusesnap.store.seeds import CommittedSeed, PartialSeed, Seed

log = logging.getLogger(__name__)

# A chunk that none of them has is read from each of them in vain.
SEEDS_AT_MOST: Final = 3
# Seconds after which it is looked of which paths other processes have parts: it takes a list of all of them.
PARTS_FOR: Final = 60.0


class Seeds:
    """Finds them. ``keys`` are those that an index of parts must be signed by."""

    def __init__(self, store: LocalStore, partials: PartialNars, keys: TrustedKeys) -> None:
        self._store = store
        self._partials = partials
        self._keys = keys
        self._parts: dict[str, dict[StorePath, None]] = {}  # by their package
        self._begun: list[StorePath] = []  # since they were listed
        self._listing = trio.Lock()
        self._listed_until = float("-inf")

    async def named_like(self, path: StorePath) -> list[StorePath]:
        """The paths that may be seeds of ``path``, the most promising first; they may be gone by now."""
        async with self._listing:
            if trio.current_time() >= self._listed_until:
                await self._list_parts()
        package = PackageName.parse(path.name).package
        parts = reversed(self._parts.get(package, {}))
        committed = await trio.to_thread.run_sync(self._store.committed_of, package)
        return ranked(path, [*committed, *parts])

    async def _list_parts(self) -> None:
        self._begun = []
        there = await trio.to_thread.run_sync(self._partials.paths)
        self._listed_until = trio.current_time() + PARTS_FOR
        self._parts = {}
        for path in (*sorted(there), *self._begun):  # what was begun meanwhile may not be listed
            self._add(path)

    def begun(self, path: StorePath) -> None:
        """Parts of ``path`` are here, or soon will be."""
        self._begun.append(path)
        self._add(path)

    def _add(self, path: StorePath) -> None:
        self._parts.setdefault(PackageName.parse(path.name).package, {})[path] = None

    def open(self, paths: Iterable[StorePath]) -> list[Seed]:
        """The seeds that ``paths`` are. Blocking. Those that cannot be read are left out."""
        seeds = []
        for path in paths:
            try:
                seed = self._open(path)
            except FusesnapError as error:
                log.debug("%s: nothing is made of it: %s", path, error)
                continue
            if seed is not None:
                seeds.append(seed)
        return seeds

    def _open(self, path: StorePath) -> Seed | None:
        if self._store.is_committed(path):
            return CommittedSeed(self._store.location(path))
        data = self._partials.index(path)
        if data is None:
            return None
        index = parse_nar_index(data, self._keys, self._store.store_dir)
        glance = self._partials.look(path, data, index.chunks)
        return None if glance is None else PartialSeed(index.tree, glance)


def ranked(path: StorePath, others: Iterable[StorePath]) -> list[StorePath]:
    """Those of ``others`` that are most like ``path`` by their names; of the same likeness, in the same order."""
    name = PackageName.parse(path.name)

    def unlikeness(other: StorePath) -> int:
        if other.name == path.name:
            return 0
        return 1 if PackageName.parse(other.name) == name else 2

    alike = [
        other
        for other in dict.fromkeys(others)
        if other != path and PackageName.parse(other.name).package == name.package
    ]
    return sorted(alike, key=unlikeness)[:SEEDS_AT_MOST]
