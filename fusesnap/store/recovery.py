"""The start-up pass: whatever a killed process left half done is finished or removed.

Other processes may be at work on the same state directory. What they are busy with is locked, and left alone.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fusesnap.errors import InvalidData
from fusesnap.nix.store_path import StorePath
from fusesnap.store.locks import LOCK_SUFFIX, path_lock_if_free, try_flock
from fusesnap.store.staging import UNKNOWN, CommitTarget, StagingDirectory
from fusesnap.store.storage_errors import storage
from fusesnap.store.store_entry import is_there, move_away, remove_contents, seal
from fusesnap.store.tree_writer import DIRECTORY_MODE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What a start-up pass did; numbers of paths."""

    staging_removed: int  # unpacked by a process that is gone
    unknown_removed: int  # in the store directory, but neither recorded nor valid
    vanished: int  # recorded or valid, but not in the store directory
    registered: int  # committed with a complete closure, but not valid yet


def recover(target: CommitTarget) -> RecoveryReport:
    """Bring the databases and the store directory of ``target`` into agreement.

    Raises :class:`StorageFailure`.
    """
    # The directory is read first: a path is recorded before it gets its name, so what was there by
    # now is recorded by the time that the rows are read.
    staging_removed = _remove_leftover_staging(target.layout.staging)
    there = _list_store(target.layout.real)
    recorded = target.state.all_recorded()
    valid = target.nix.all_valid()
    _seal(target.layout.real, there, recorded)
    unknown = there.keys() - recorded.keys() - valid
    missing = (recorded.keys() | valid) - there.keys()
    unknown_removed = sum(_remove_unknown(target, name, there[name]) for name in sorted(unknown))
    vanished = sum(forget_vanished(target, name) for name in sorted(missing))
    if vanished:
        valid = target.nix.all_valid()
    unfinished = [recorded[name] for name in recorded.keys() & there.keys() - valid]
    registered = target.registration.register(unfinished) if unfinished else 0
    return RecoveryReport(staging_removed, unknown_removed, vanished, registered)


def _remove_leftover_staging(staging: Path) -> int:
    with storage("clean up", staging):
        return sum(_remove_if_unlocked(path) for path in sorted(staging.iterdir()))


def _remove_if_unlocked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False  # its owner was quicker, or it is nothing of ours
    try:
        if not try_flock(descriptor) or os.fstat(descriptor).st_nlink == 0:
            return False
        logger.warning("removing %s: the process that unpacked it is gone", path)
        remove_contents(descriptor)
        path.rmdir()
    finally:
        os.close(descriptor)
    return True


def _list_store(real: Path) -> dict[str, int]:
    """Return the modes of what is in the store directory under the name of a store path.

    Everything else there, such as ``.links``, is Nix's own.
    """
    modes = {}
    with storage("list", real), os.scandir(real) as entries:
        for entry in entries:
            if _is_store_path(entry.name):
                with suppress(FileNotFoundError):  # lock files come and go
                    modes[entry.name] = entry.stat(follow_symlinks=False).st_mode
    return modes


def _is_store_path(name: str) -> bool:
    try:
        StorePath.parse_base_name(name)
    except InvalidData:
        return False
    return True


def _seal(real: Path, there: Mapping[str, int], recorded: Container[str]) -> None:
    """Seal what was renamed by a process that was killed right after."""
    for name, mode in there.items():
        if name in recorded and stat.S_ISDIR(mode) and stat.S_IMODE(mode) != DIRECTORY_MODE:
            with storage("set the mode of", real / name):
                seal(real / name)


def _remove_unknown(target: CommitTarget, name: str, mode: int) -> bool:
    """Remove an entry of the store directory that neither we nor Nix ever finished."""
    real = target.layout.real
    if stat.S_ISREG(mode) and name.endswith(LOCK_SUFFIX):
        # A lock file, whose name could be a store path's. Locking removes it if its owner is gone.
        with path_lock_if_free(real, name.removesuffix(LOCK_SUFFIX)):
            return False
    with path_lock_if_free(real, name) as free:
        if not free or not _is_unknown(target, name):
            return False
        logger.warning("removing %s: neither recorded nor valid", real / name)
        staging = StagingDirectory(target.layout.staging, UNKNOWN)
        try:
            # Renamed first: what is removed piece by piece must not look like a path meanwhile.
            with storage("move away", real / name):
                move_away(real / name, staging.path / UNKNOWN)
        finally:
            staging.remove()
    return True


def _is_unknown(target: CommitTarget, name: str) -> bool:
    """Look again, with the path's lock held: another process may have been quicker."""
    with storage("look for", target.layout.real / name):
        there = is_there(target.layout.real / name)
    known = target.state.recorded_among([name]) or target.nix.valid_among([name])
    return there and not known


def forget_vanished(target: CommitTarget, name: str) -> bool:
    """Drop the rows of a path whose files are gone, or never came; return whether that is so.

    Not of one that somebody is adding right now. Raises :class:`StorageFailure`.
    """
    location = target.layout.real / name
    with path_lock_if_free(target.layout.real, name) as free:
        with storage("look for", location):
            if not free or is_there(location):
                return False
        target.state.forget_recorded([name])
        with target.nix.registering() as registrar:
            invalidated = registrar.invalidate(name)
        if invalidated:
            logger.warning(
                "%s vanished: it and its referrers, %d paths, are no longer valid",
                location,
                len(invalidated),
            )
    return True
