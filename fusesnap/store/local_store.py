"""The local store: what the other rooms see of it."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from fusesnap.errors import FusesnapError, StorageFailure
from fusesnap.nix.nar import NarEvent
from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.store_path import HashPart, StoreDir, StorePath
from fusesnap.nix.tree import Tree
from fusesnap.store.collection import Collected, Collection, Survey
from fusesnap.store.collector_lock import CollectorLock
from fusesnap.store.commit import commit_together
from fusesnap.store.layout import StateLayout
from fusesnap.store.locks import directory_lock
from fusesnap.store.nix_database import NixDatabase, ValidPathInfo
from fusesnap.store.recovery import RecoveryReport, recover
from fusesnap.store.registration import Registration
from fusesnap.store.room import Room
from fusesnap.store.roots import Roots
from fusesnap.store.staging import CommitTarget, StagedPath
from fusesnap.store.state_database import PathState, Pin, StateDatabase
from fusesnap.store.storage_errors import storage
from fusesnap.store.temporary_roots import TemporaryRoots
from fusesnap.store.tree_reader import measured_tree, nar_events

__all__ = [
    "Collected",
    "LocalStore",
    "Pin",
    "StagedPath",
    "StoreCounts",
    "Survey",
    "ValidPathInfo",
]

logger = logging.getLogger(__name__)

_ATTEMPTS: Final = (
    8  # each one fails only where a path is collected or changed while it is looked at
)


@dataclass(frozen=True, slots=True)
class StoreCounts:
    """Numbers of paths: in the store; of those, valid in Nix's sense; known, but not in the store."""

    committed: int
    valid: int
    pinned: int


class LocalStore:
    """The store of one state directory. For any number of threads and processes at once.

    ``layer`` is the overlay layer that holds the store directory ``real``; ``overlay_ready`` says
    whether ``real`` is opaque to overlay file systems (it is not where an ordinary user made it);
    ``recovered`` says what the start-up pass did. Methods raise :class:`StorageFailure`.
    """

    def __init__(
        self, target: CommitTarget, store_dir: StoreDir, report: RecoveryReport, *, ready: bool
    ) -> None:
        """Made by :meth:`open`."""
        lock = CollectorLock(target.layout.nix)
        temporary = TemporaryRoots(target.layout.nix, store_dir, lock)
        self._target = target
        self.store_dir = store_dir
        self.layer = target.layout.layer
        self.real = target.layout.real
        self.recovered = report
        self.overlay_ready = ready
        self._known: dict[StorePath, int] = {}  # recorded or valid, seen once as this inode
        self._temporary = temporary
        self.roots = Roots(target.layout.nix, temporary, self._let_go)
        self._collection = Collection(target, store_dir, lock)
        self.room = Room(self.real, target.layout.reserved, self._collection)

    @classmethod
    def open(cls, state: Path, store_dir: StoreDir, *, clock: Callable[[], float]) -> Self:
        """Open the store in the state directory ``state``, creating what is missing, and recover.

        ``clock`` gives seconds since 1970, for Nix's registration times. Raises
        :class:`Unsupported` where a database has a schema that we do not know, and
        :class:`StorageFailure`.
        """
        with storage("find", state):
            # Nix refuses a store below a symbolic link.
            layout = StateLayout(state.resolve())
        ready = layout.create()
        # One at a time: SQLite changes the journal mode of a new file under nobody else's eyes.
        with directory_lock(layout.staging), ExitStack() as opened:
            database = StateDatabase(layout.database, store_dir)
            opened.callback(database.close)
            nix = NixDatabase(layout.nix, store_dir)
            opened.callback(nix.close)
            registration = Registration(layout.real, database, nix, clock)
            target = CommitTarget(layout, database, nix, registration, clock)
            report = recover(target)
            opened.pop_all()
        return cls(target, store_dir, report, ready=ready)

    def close(self) -> None:
        """Let go of what this process alone keeps, and close the databases."""
        self._temporary.close()
        self.room.close()
        self._target.state.close()
        self._target.nix.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def nix_url(self) -> str:
        """The URL under which real Nix opens this store."""
        return self._target.layout.nix_url(self.store_dir)

    def location(self, path: StorePath) -> Path:
        """Return where the files of ``path`` are if it is committed."""
        return self.real / path.base_name

    def is_committed(self, path: StorePath) -> bool:
        """Tell whether the verified files of ``path`` are in the store."""
        return bool(self.committed_among([path]))

    def committed_among(self, paths: Iterable[StorePath]) -> set[StorePath]:
        """Return those of ``paths`` whose verified files are in the store."""
        with storage("look for paths in", self.real):
            real = str(self.real)  # thousands of Path objects would take longer than the disk
            there = {path: _inode(f"{real}/{path.base_name}") for path in paths}
        # A name in the directory is not enough: real Nix writes a path under its final name.
        unsure = {
            path.base_name: path
            for path, inode in there.items()
            if inode is not None and self._known.get(path) != inode
        }
        if unsure:
            known = self._target.state.recorded_among(unsure)
            known |= self._target.nix.valid_among(unsure.keys() - known)
            self._known |= {unsure[name]: there[unsure[name]] or 0 for name in known}
            for name in unsure.keys() - known:
                there[unsure[name]] = None
        return {path for path, inode in there.items() if inode is not None}

    def tree(self, path: StorePath) -> Tree | None:
        """Return the tree of ``path``, without reading contents, if it is committed.

        A path may be collected meanwhile, and people and other programs may take something out of one; so it counts
        only if it was there all the time, and has the size of its NAR. Where it has not, it is removed, as if it had
        not been there: whoever needs it has it fetched again.
        """
        for _ in range(_ATTEMPTS):
            before = self._identity(path)
            if before is None or not self.is_committed(path):
                return None
            try:
                tree, size = measured_tree(self.location(path))
            except StorageFailure as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                    raise
                size = -1
            expected = self._nar_size(path)
            if before != self._identity(path) or expected is None:
                continue  # collected, and perhaps committed again
            if size == expected:
                return tree
            logger.error(
                "removing %s, which somebody has changed: its NAR would have %d bytes, expected %d",
                self.location(path),
                size,
                expected,
            )
            self._collection.discard(path)
        raise StorageFailure(f"{self.location(path)}: somebody keeps changing it", errno.EAGAIN)

    def pin(self, info: NarInfo) -> Pin:
        """Return the pin of the path and NAR hash of ``info``, a narinfo that is trusted."""
        return self.pins([info])[0]

    def pins(self, infos: Iterable[NarInfo]) -> list[Pin]:
        """Return the pins of ``infos`` in their order; new ones are made in one transaction.

        The pin of a path that is committed with that NAR hash carries the narinfo it was committed
        with.
        """
        return self._target.state.pins(infos)

    def pinned(self, path: StorePath) -> Pin | None:
        """Return the pin that ``path`` is committed with, else the one made last, if any.

        A path that real Nix has added gets one here, at the first question.
        """
        pin = self._target.state.pinned(path)
        if pin is None and (valid := self._target.nix.valid_path_info(path)) is not None:
            pin = self.pin(valid.as_narinfo(self.store_dir))
        return pin

    def pinned_among(self, paths: Iterable[StorePath]) -> dict[StorePath, Pin]:
        """Return those of ``paths`` that have a pin by now, with it, as :meth:`pinned` does."""
        return self._target.state.pinned_among(paths)

    def pin_of(self, ordinal: int) -> Pin | None:
        """Return the pin that has ``ordinal``."""
        return self._target.state.pin_of(ordinal)

    def with_hash_part(self, part: HashPart) -> StorePath | None:
        """Return the path with this hash part that is in the store, or was looked up before."""
        valid = self._target.nix.with_hash_part(part)
        return valid if valid is not None else self._target.state.with_hash_part(part)

    def committed_of(self, package: str) -> list[StorePath]:
        """Return the paths in the store that are of ``package`` by their name, whatever its version, the newest first.

        Some may be gone; those that real Nix has added are not among them at once.
        """
        names = self._target.state.recorded_of(package)
        return [StorePath.parse_base_name(name) for name in names]

    def valid_path_info(self, path: StorePath) -> ValidPathInfo | None:
        """Return what Nix's database says of ``path``, None where it is not valid."""
        return self._target.nix.valid_path_info(path)

    def valid_closure(self, path: StorePath) -> list[StorePath]:
        """Return the closure of ``path``, sorted, from Nix's database; empty if it is not valid."""
        return self._target.nix.closure(path)

    def all_valid(self) -> set[StorePath]:
        """Return every path that is valid in Nix's sense."""
        return {StorePath.parse_base_name(name) for name in self._target.nix.all_valid()}

    def foreign_among(self, paths: Iterable[StorePath]) -> list[StorePath]:
        """Return those of ``paths`` that others brought, real Nix for instance: nobody here has verified them."""
        named = {path.base_name: path for path in paths}
        return [named[name] for name in named.keys() - self._target.state.recorded_among(named)]

    def nar_events(self, path: StorePath) -> Iterator[NarEvent]:
        """Read a committed path as the events of its NAR; see ``tree_reader.nar_events``."""
        return nar_events(self.location(path))

    def discard(self, path: StorePath) -> None:
        """Remove a path that is not what it should be, whoever needs it."""
        self._collection.discard(path)

    def counts(self) -> StoreCounts:
        """Count paths, as the databases have them."""
        state = self._target.state
        return StoreCounts(
            committed=state.count(PathState.RECORDED),
            valid=self._target.nix.count(),
            pinned=state.count(PathState.PINNED),
        )

    def stage(self, pin: Pin) -> StagedPath:
        """Return where to put the events of the NAR of ``pin``; leave it to throw them away."""
        return StagedPath(pin, self._target)

    def commit(self, staged: Sequence[StagedPath]) -> list[FusesnapError | None]:
        """Commit paths together, which takes hardly longer than one of them.

        Return for each why it is not committed, None where it is; else as :meth:`StagedPath.commit`.
        """
        return commit_together(staged, self._target)

    def survey(self) -> Survey:
        """Measure what is committed, and say what of it no root reaches."""
        return self._collection.survey()

    def size(self) -> int:
        """Return the bytes on disk of all committed paths, and of what is here of others."""
        return self._collection.measure()

    def collect(
        self, wanted: int | None, show: Callable[[Collected], None] = lambda _: None
    ) -> Collected:
        """Remove what no root reaches, the least recently used first, until ``wanted`` bytes are freed.

        All of it for ``None``. ``show`` is told now and then how far it is.
        """
        return self._collection.collect(wanted, show)

    def _nar_size(self, path: StorePath) -> int | None:
        """The size of the NAR that a committed path came as."""
        recorded = self._target.state.recorded(path)
        if recorded is not None:
            return recorded.info.nar_size
        valid = self._target.nix.valid_path_info(path)
        return None if valid is None else valid.nar_size

    def _let_go(self, base_names: Iterable[str]) -> None:
        self._target.state.touch(base_names, int(self._target.clock()))

    def _identity(self, path: StorePath) -> tuple[int, int] | None:
        """What changes when another object gets the path's name, or its root directory changes."""
        with storage("look for", self.location(path)):
            try:
                status = self.location(path).lstat()
            except FileNotFoundError:
                return None
        return status.st_ino, status.st_ctime_ns


def _inode(path: str) -> int | None:
    try:
        return os.lstat(path).st_ino
    except FileNotFoundError:
        return None
