"""Staged paths become committed ones, several at once if there are several: one barrier and one row's price for all.

What a commit is worth after each kind of accident, of one path or of many:

* *kill -9 at any instruction.* What was written stays in the page cache, so only the order of steps counts: the rows
  are recorded before the paths get their names, and Nix's rows are written after. Whatever is left half done is
  finished or removed by :mod:`fusesnap.store.recovery`, and ``nix-store --verify --check-contents`` is content at any
  moment.
* *Loss of power.* Contents are on the disk before a path gets its name, and the names are before Nix hears of them. The
  newest rows of the databases may be gone: then a path that is there without a row is removed and fetched again.
* *A full disk.* The step that met it fails; see the steps for what may remain.

Paths that are committed together share the steps, not the outcome: where the group cannot be committed, each of it is
committed by itself, so that what is wrong with one is told of that one.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Final

from fusesnap.errors import ContentMismatch, FusesnapError, InvalidData, StorageFailure
from fusesnap.store.durability import flush_directory, flush_trees
from fusesnap.store.locks import path_lock, path_lock_if_free
from fusesnap.store.storage_errors import storage
from fusesnap.store.store_entry import is_there, move_away, seal

if TYPE_CHECKING:
    from fusesnap.store.staging import CommitTarget, StagedPath

logger = logging.getLogger(__name__)

# Paths that are locked at once, each with a file that is open meanwhile.
LOCKED_TOGETHER: Final = 64

# The steps of a commit, in order, each a method of Commit: a fault drill kills between them.
COMMIT_STEPS: Final = ("flush", "record", "rename", "seal", "flush_name", "register")


def commit_together(
    staged: Sequence[StagedPath], target: CommitTarget
) -> list[FusesnapError | None]:
    """Commit paths of one store; return for each why it is not committed, None where it is.

    Everything holds that :meth:`StagedPath.commit` says of one.
    """
    if len(staged) > 1:
        try:
            Commit(staged, target).run()
        except FusesnapError as error:
            logger.debug("%d paths are committed one by one: %s", len(staged), error)
        else:
            return [None] * len(staged)
    return [_commit_alone(path, target) for path in staged]


def _commit_alone(path: StagedPath, target: CommitTarget) -> FusesnapError | None:
    try:
        Commit([path], target).run()
    except FusesnapError as error:
        return error
    return None


class Commit:
    """One commit of one path or more. To be begun anew where it failed: what is there already is let be."""

    def __init__(self, staged: Sequence[StagedPath], target: CommitTarget) -> None:
        self._staged = sorted(staged, key=lambda path: path.name)  # locks are taken in this order
        self._target = target
        self._locked: list[StagedPath] = []
        self._lacking: list[StagedPath] = []  # of those that are locked

    def run(self) -> None:
        """Take all steps. Raises what :meth:`StagedPath.commit` raises."""
        for path in self._staged:
            if not path.is_complete:
                raise InvalidData(f"{path.name}: commit before the end of its NAR")
        self.flush()
        for start in range(0, len(self._staged), LOCKED_TOGETHER):
            self._give_names(self._staged[start : start + LOCKED_TOGETHER])
        self.flush_name()
        self.register()

    def _give_names(self, paths: list[StagedPath]) -> None:
        with ExitStack() as locks:
            for path in paths:
                locks.enter_context(self._lock(path))
            self._locked = paths
            self._lacking = [path for path in paths if not self._is_there(path)]
            if self._lacking:
                self.record()
                self.rename()
            self.seal()

    def flush(self) -> None:
        """Wait until the contents are on the disk."""
        trees = [(path.location, path.entries) for path in self._staged if not path.is_renamed]
        with storage("flush", self._staged[0].location):
            flush_trees(trees)

    def record(self) -> None:
        """Note in our database that the paths are about to be there."""
        pins = [path.pin for path in self._lacking]
        self._target.state.record(pins, int(self._target.clock()))

    def rename(self) -> None:
        """Give the paths their names in the store directory: from here on they are committed."""
        for path in self._lacking:
            with storage("rename into place", path.committed):
                path.location.rename(path.committed)
            path.is_renamed = True

    def seal(self) -> None:
        """Take write permission from root directories, which they needed for being renamed."""
        for path in self._locked:
            if path.is_renamed:  # now, or by a group that got no further
                with storage("set the mode of", path.committed):
                    seal(path.committed)

    def flush_name(self) -> None:
        """Wait until the names are on the disk."""
        with storage("flush", self._target.layout.real):
            flush_directory(self._target.layout.real)

    def register(self) -> None:
        """Tell Nix's database of the paths, and of those that waited for them, if their closures are complete."""
        self._target.registration.register([path.pin.ordinal for path in self._staged])

    def _lock(self, path: StagedPath) -> AbstractContextManager[object]:
        if len(self._staged) == 1:
            return path_lock(self._target.layout.real, path.name)
        return self._lock_if_free(path)

    def _lock_if_free(self, path: StagedPath) -> AbstractContextManager[object]:
        """Of many none is waited for: others wait for them meanwhile, and Nix holds a lock for a whole download."""
        with ExitStack() as stack:
            if not stack.enter_context(path_lock_if_free(self._target.layout.real, path.name)):
                raise StorageFailure(f"{path.name}: another adds it", errno.EBUSY)
            return stack.pop_all()

    def _is_there(self, path: StagedPath) -> bool:
        """Tell whether somebody has committed this very path; the path's lock is held."""
        with storage("look for", path.committed):
            if not is_there(path.committed):
                return False
        store_path, expected = path.pin.info.store_path, path.pin.info.nar_hash
        recorded = self._target.state.recorded(store_path)
        valid = None if recorded else self._target.nix.valid_path_info(store_path)
        found = recorded.info.nar_hash if recorded else valid.nar_hash if valid else None
        if found is None:
            self._move_unknown_away(path)
        elif found != expected:
            raise ContentMismatch(
                f"{store_path} is in the store with NAR hash {found}, and now came with {expected}"
            )
        elif recorded is None:  # real Nix has added it
            self._target.state.record([path.pin], int(self._target.clock()))
        return found is not None

    def _move_unknown_away(self, path: StagedPath) -> None:
        """Free the name of something that neither we nor Nix ever finished."""
        logger.warning("removing %s: neither recorded nor valid", path.committed)
        with storage("move away", path.committed):
            move_away(path.committed, path.unknown)
