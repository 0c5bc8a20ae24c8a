"""A store path on its way in: unpacked out of sight, then committed.

What a commit is worth after each kind of accident:

* *kill -9 at any instruction.* What was written stays in the page cache, so only the order of steps counts: the row is
  recorded before the path gets its name, and Nix's row is written after. Whatever is left half done is finished or
  removed by :mod:`fusesnap.store.recovery`, and ``nix-store --verify --check-contents`` is content at any moment.
* *Loss of power.* Contents are on the disk before the path gets its name, and the name is before Nix hears of it. The
  newest rows of the databases may be gone: then a path that is there without a row is removed and fetched again.
* *A full disk.* The step that met it fails, and the staging directory goes; see the steps for what may remain.
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from fusesnap.errors import ContentMismatch, InvalidData
from fusesnap.nix.nar import NarEvent
from fusesnap.store.durability import flush_directory, flush_tree
from fusesnap.store.layout import StateLayout
from fusesnap.store.locks import path_lock, try_flock
from fusesnap.store.nix_database import NixDatabase
from fusesnap.store.registration import Registration
from fusesnap.store.state_database import Pin, StateDatabase
from fusesnap.store.storage_errors import storage
from fusesnap.store.store_entry import is_there, move_away, remove_contents, seal
from fusesnap.store.tree_writer import TreeWriter

logger = logging.getLogger(__name__)

# Each one fails only where a start-up pass takes the directory for a leftover in that very moment.
_ATTEMPTS: Final = 16

# The steps of a commit, in order, each a method of StagedPath: a fault drill kills between them.
COMMIT_STEPS: Final = ("flush", "record", "rename", "seal", "flush_name", "register")

UNKNOWN: Final = "unknown"  # what is moved out of the store directory, in a staging directory


class StagingDirectory:
    """A directory of our own under ``staging``, locked for as long as its owner lives."""

    def __init__(self, staging: Path, prefix: str) -> None:
        """Make one. Raises :class:`StorageFailure`."""
        with storage("create a directory in", staging):
            self.path, self.descriptor = _make_locked(staging, prefix)

    def remove(self) -> None:
        """Remove it with what is in it. What cannot be removed now is at the next start; nothing is raised."""
        try:
            remove_contents(self.descriptor)
            self.path.rmdir()
        except OSError as error:
            logger.warning("cannot remove %s, the next start will: %s", self.path, error)
        finally:
            os.close(self.descriptor)


def _make_locked(staging: Path, prefix: str) -> tuple[Path, int]:
    for _ in range(_ATTEMPTS):
        path = Path(tempfile.mkdtemp(prefix=prefix + ".", dir=staging))
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            # Between mkdtemp and here a start-up pass may have taken it for a leftover.
            if try_flock(descriptor) and os.fstat(descriptor).st_nlink > 0:
                return path, descriptor
            os.close(descriptor)
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


@dataclass(frozen=True, slots=True)
class CommitTarget:
    """Where staged paths go, and who has to know."""

    layout: StateLayout
    state: StateDatabase
    nix: NixDatabase
    registration: Registration
    clock: Callable[[], float]  # seconds since 1970


class StagedPath:
    """A store path being received. A context manager: leaving it without :meth:`commit` removes what was received.

    For one thread at a time. Methods raise :class:`StorageFailure` with the operating system's errno.
    """

    def __init__(self, pin: Pin, target: CommitTarget) -> None:
        self.pin = pin
        self._target = target
        self._name = pin.info.store_path.base_name
        self._staging = StagingDirectory(target.layout.staging, pin.info.store_path.hash_part)
        self._writer = TreeWriter(self._staging.descriptor, self._name)
        self.location = self._staging.path / self._name  # where the path is unpacked

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer.close()
        self._staging.remove()

    def receive(self, event: NarEvent) -> None:
        """Write what the next event of the path's NAR says."""
        with storage("unpack", self.location):
            self._writer.receive(event)

    def commit(self) -> None:
        """Make the path a committed one, and register what has thereby become valid.

        The caller has checked the NAR's hash and size. A path that is there already, with the same NAR hash, is taken
        for this one. Raises :class:`InvalidData` where the NAR has not ended, :class:`ContentMismatch` where the path
        is there with another NAR hash, :class:`StorageFailure`. After a failure in ``flush_name`` or ``register`` the
        path is committed nevertheless, and the registration is made up for at the next start or commit.
        """
        if not self._writer.is_complete:
            raise InvalidData(f"{self._name}: commit before the end of its NAR")
        self.flush()
        with path_lock(self._target.layout.real, self._name):
            if not self._is_there():
                self.record()
                self.rename()
                self.seal()
        self.flush_name()
        self.register()

    def flush(self) -> None:
        """Wait until the contents are on the disk."""
        with storage("flush", self.location):
            flush_tree(self.location, self._writer.entries)

    def record(self) -> None:
        """Note in our database that the path is about to be there."""
        self._target.state.record(self.pin, int(self._target.clock()))

    def rename(self) -> None:
        """Give the path its name in the store directory: from here on it is committed."""
        with storage("rename into place", self._committed):
            self.location.rename(self._committed)

    def seal(self) -> None:
        """Take write permission from a root directory, which it needed for being renamed."""
        with storage("set the mode of", self._committed):
            seal(self._committed)

    def flush_name(self) -> None:
        """Wait until the name is on the disk."""
        with storage("flush", self._target.layout.real):
            flush_directory(self._target.layout.real)

    def register(self) -> None:
        """Tell Nix's database of the path, and of those that waited for it, if their closures are complete."""
        self._target.registration.register([self.pin.ordinal])

    @property
    def _committed(self) -> Path:
        return self._target.layout.real / self._name

    def _is_there(self) -> bool:
        """Tell whether somebody has committed this very path; the path's lock is held."""
        with storage("look for", self._committed):
            if not is_there(self._committed):
                return False
        path, expected = self.pin.info.store_path, self.pin.info.nar_hash
        recorded = self._target.state.recorded(path)
        valid = None if recorded else self._target.nix.valid_path_info(path)
        found = recorded.info.nar_hash if recorded else valid.nar_hash if valid else None
        if found is None:
            self._move_unknown_away()
        elif found != expected:
            raise ContentMismatch(
                f"{path} is in the store with NAR hash {found}, and now came with {expected}"
            )
        elif recorded is None:  # real Nix has added it
            self.record()
        return found is not None

    def _move_unknown_away(self) -> None:
        """Free the name of something that neither we nor Nix ever finished."""
        logger.warning("removing %s: neither recorded nor valid", self._committed)
        with storage("move away", self._committed):
            move_away(self._committed, self._staging.path / UNKNOWN)
