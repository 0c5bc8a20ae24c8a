"""Collecting garbage: what no root reaches is removed, the least recently used first.

It is Nix's protocol (``src/libstore/gc.cc`` of Nix), so Nix and we may collect, add and use paths at the same time.
Whoever is about to rely on a path makes it a root first and looks for it then. A collector decides and removes under a
lock that keeps roots from being added meanwhile. Ours holds it for one batch, and reads the roots anew for the next.

What a batch is worth after kill -9 between any two steps, each a method of :class:`Eviction`:

``invalidate``  Nix's rows go, and those of valid referrers, in one transaction with ours; killed before it ends, the
                paths are as they were, killed between the two commits, they are as real Nix had brought them
``move_away``   each path goes at once from the store into a staging directory; one that is left is neither recorded
                nor valid, and the next start removes it
``remove``      what is left in staging the next start removes

So a valid path always has its files and its references, and no path is ever there in part.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from fusesnap.errors import StorageFailure
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.store.ballast import Ballast
from fusesnap.store.collector_lock import CollectorLock
from fusesnap.store.disk_space import BLOCK, measure
from fusesnap.store.locks import path_lock_if_free
from fusesnap.store.partial_nars import remove_unwanted
from fusesnap.store.recovery import forget_vanished
from fusesnap.store.roots import read_permanent_roots
from fusesnap.store.staging import CommitTarget, StagingDirectory
from fusesnap.store.state_database import StoredPath
from fusesnap.store.storage_errors import storage
from fusesnap.store.store_entry import move_away
from fusesnap.store.temporary_roots import read_temporary_roots

logger = logging.getLogger(__name__)

# Paths removed in one turn. It takes some 50 ms, in which nobody can add a root; each has a lock file open meanwhile.
BATCH: Final = 128

# In order: a fault drill kills between them.
EVICTION_STEPS: Final = ("invalidate", "move_away", "remove")

_COLLECTED: Final = "collected"
# Sizes that are kept in memory before they are written together: all of them are looked up for each path that comes.
_NOTED_AT: Final = 256
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class Collected:
    """Paths that were removed, or could be, and the bytes that they take on disk."""

    paths: tuple[StorePath, ...] = ()
    size: int = 0

    @classmethod
    def of(cls, stored: Iterable[StoredPath]) -> Collected:
        """These."""
        stored = tuple(stored)
        paths = tuple(StorePath.parse_base_name(path.base_name) for path in stored)
        return cls(paths, sum(path.size for path in stored))

    def __add__(self, other: Collected) -> Collected:
        return Collected(self.paths + other.paths, self.size + other.size)


@dataclass(frozen=True, slots=True)
class Survey:
    """The committed paths of a moment. ``collectable``: those that no root reaches, the least recently used first.

    Sizes are in bytes on disk; ``size`` is that of all of them, and of what is here of others.
    """

    size: int
    paths: int
    collectable: tuple[StoredPath, ...]

    @property
    def collectable_size(self) -> int:
        """What could be freed."""
        return sum(path.size for path in self.collectable)

    def first(self, wanted: int | None) -> tuple[StoredPath, ...]:
        """The first collectable paths that have ``wanted`` bytes together; all of them for ``None``."""
        if wanted is None:
            return self.collectable
        sizes = accumulate(path.size for path in self.collectable)
        enough = next((count for count, size in enumerate(sizes, 1) if size >= wanted), None)
        return self.collectable[:enough] if wanted > 0 else ()


class Collection:
    """Collects in one store. For any number of threads and processes; methods raise :class:`StorageFailure`."""

    def __init__(self, target: CommitTarget, store_dir: StoreDir, lock: CollectorLock) -> None:
        self._target = target
        self._store_dir = store_dir
        self._lock = lock
        self.ballast = Ballast(target.layout.ballast)
        self.ballast.restore()
        self._sizes: dict[
            int, int
        ] = {}  # of paths whose size is not in the database yet, by ordinal

    def size(self) -> int:
        """The bytes that all recorded paths take, and parts of paths. Hardly ever writes, unlike :meth:`measure`."""
        state = self._target.state
        unmeasured = state.unmeasured()
        known = self._sizes
        self._sizes = {
            path.ordinal: known.get(path.ordinal) or self._measure(path) for path in unmeasured
        }
        if len(self._sizes) >= _NOTED_AT:
            with suppress(StorageFailure):  # they are known all the same
                state.set_sizes(self._sizes)
                self._sizes = {}
        return state.total_size() + sum(self._sizes.values()) + self._parts_size()

    def measure(self) -> int:
        """Take note of what has come and gone since the last time; return the bytes that all of it takes.

        What is here of paths that are not committed counts too.
        """
        self._adopt()
        state = self._target.state
        for name in sorted(state.all_recorded().keys() - self._there()):
            forget_vanished(self._target, name)
        sizes = {path.ordinal: self._measure(path) for path in state.unmeasured()}
        if sizes:
            state.set_sizes(sizes)
        return state.total_size() + self._parts_size()

    def survey(self) -> Survey:
        """Say what is there, and what of it could be collected now.

        Without the lock, for which a person would have to wait while Nix collects: a picture, not a decision.
        """
        self.measure()
        return self._survey()

    def collect(self, wanted: int | None, show: Callable[[Collected], None]) -> Collected:
        """Remove garbage until ``wanted`` bytes are free, all of it for ``None``.

        ``show`` is told now and then how far it is. On a full disk the ballast gives the room that this takes.
        """
        try:
            return self._collect(wanted, show)
        except StorageFailure as error:
            if error.errno not in _FULL or not self.ballast.release():
                raise
        try:
            return self._collect(wanted, show)
        finally:
            self.ballast.restore()

    def _collect(self, wanted: int | None, show: Callable[[Collected], None]) -> Collected:
        self.measure()
        done = Collected(size=self._remove_parts())
        while wanted is None or done.size < wanted:
            freed = self._turn(None if wanted is None else wanted - done.size)
            if not freed.paths:
                break
            done += freed
            show(done)
        return done

    def _parts_size(self) -> int:
        """The bytes that parts of paths take: their files are sparse."""
        partial = self._target.layout.partial
        with storage("measure", partial), suppress(FileNotFoundError):
            return measure(partial)[0] - partial.lstat().st_blocks * BLOCK
        return 0

    def _remove_parts(self) -> int:
        """Remove what is here of paths that no root names, and that nobody reads; return the bytes that it took."""
        before = self._parts_size()
        with self._lock.collecting():
            roots = self._roots()
            for path in remove_unwanted(
                self._target.layout.partial, lambda p: p.base_name in roots
            ):
                logger.info("%s: removed what was here of it", path)
        return max(0, before - self._parts_size())

    def _roots(self) -> set[str]:
        nix = self._target.layout.nix
        permanent = read_permanent_roots(nix, self._store_dir)
        return permanent | read_temporary_roots(nix, self._store_dir)

    def discard(self, path: StorePath) -> None:
        """Remove a path that is not what it was, whoever needs it: it can be fetched again."""
        self._adopt()
        stored = self._target.state.stored()
        self._evict([each for each in stored if each.base_name == path.base_name])

    def _measure(self, path: StoredPath) -> int:
        location = self._target.layout.real / path.base_name
        with storage("measure", location), suppress(FileNotFoundError):
            return measure(location)[0]
        return 0

    def _turn(self, wanted: int | None) -> Collected:
        with ExitStack() as lock:
            lock.enter_context(self._lock.collecting())
            batch = self._survey().first(wanted)[:BATCH]
            return self._evict(batch, lock.close)

    def _evict(
        self, batch: Sequence[StoredPath], decided: Callable[[], None] = lambda: None
    ) -> Collected:
        """Remove a batch. ``decided`` is called when nothing of it is in the store any more."""
        if not batch:
            return Collected()
        eviction = Eviction(self._target, batch)
        try:
            with eviction.locks:
                eviction.invalidate()
                eviction.move_away()
            decided()
        finally:
            eviction.remove()
        return Collected.of(eviction.batch)

    def _survey(self) -> Survey:
        there = self._there()
        stored = [path for path in self._target.state.stored() if path.base_name in there]
        references = self._target.state.references()
        live = _closure(self._roots(), references)
        dead = {path.base_name: path for path in stored if path.base_name not in live}
        order = {name: place for place, name in enumerate(_referrers_first(dead, references))}
        ordered = sorted(dead.values(), key=lambda path: (path.used, order[path.base_name]))
        size = sum(path.size for path in stored) + self._parts_size()
        return Survey(size, len(stored), tuple(ordered))

    def _there(self) -> set[str]:
        with storage("list", self._target.layout.real):
            return set(os.listdir(self._target.layout.real))

    def _adopt(self) -> None:
        """Take note of what real Nix has added."""
        state, nix = self._target.state, self._target.nix
        for name in sorted(nix.all_valid() - state.all_recorded().keys()):
            valid = nix.valid_path_info(StorePath.parse_base_name(name))
            if valid is not None:
                (pin,) = state.pins([valid.as_narinfo(self._store_dir)])
                state.record([pin], valid.registration_time)


class Eviction:
    """The removal of one batch; the steps are to be taken in order, the first two within ``locks``."""

    def __init__(self, target: CommitTarget, batch: Iterable[StoredPath]) -> None:
        """Lock the paths, but for those that somebody is adding right now: they are left alone."""
        self._target = target
        self.locks = ExitStack()
        real = target.layout.real
        with ExitStack() as taken:
            self.batch = [
                path
                for path in batch
                if taken.enter_context(path_lock_if_free(real, path.base_name))
            ]
            self._staging = StagingDirectory(target.layout.staging, _COLLECTED)
            self.locks = taken.pop_all()

    def invalidate(self) -> None:
        """Make the paths neither valid nor recorded. Valid referrers become committed alone, and wait for them."""
        names = [path.base_name for path in self.batch]
        # Writers of Nix's database take turns, and whoever registers looks at ours within its turn: so nobody makes
        # one of these valid again that goes.
        with self._target.nix.registering() as registrar:
            invalid = {other for name in names for other in registrar.invalidate(name)}
            self._target.state.forget_recorded(names)
        recorded = self._target.state.all_recorded()
        left = [recorded[name] for name in sorted(invalid.difference(names)) if name in recorded]
        if left:
            self._target.registration.register(left)

    def move_away(self) -> None:
        """Take the paths out of the store, each at once."""
        for path in self.batch:
            location = self._target.layout.real / path.base_name
            with storage("move away", location), suppress(FileNotFoundError):
                move_away(location, self._staging.path / path.base_name)

    def remove(self) -> None:
        """Remove the files. What cannot be removed now is at the next start."""
        self._staging.remove()


def _closure(roots: Iterable[str], references: Mapping[str, Sequence[str]]) -> set[str]:
    reached = set(roots)
    waiting = list(reached)
    while waiting:
        for name in references.get(waiting.pop(), ()):
            if name not in reached:
                reached.add(name)
                waiting.append(name)
    return reached


def _referrers_first(names: Iterable[str], references: Mapping[str, Sequence[str]]) -> list[str]:
    """``names`` so that who refers to another comes before it: then no removal makes others invalid on its way."""
    ordered: dict[str, None] = {}
    for start in names:
        way = [(start, iter(references.get(start, ())))]
        entered = {start}
        while way:
            name, rest = way[-1]
            for reference in rest:
                if reference not in ordered and reference not in entered:
                    entered.add(reference)
                    way.append((reference, iter(references.get(reference, ()))))
                    break
            else:
                ordered[name] = None
                way.pop()
    return list(reversed(ordered))
