"""A store path on its way in: unpacked out of sight, then committed (:mod:`fusesnap.store.commit`).

When it is left without a commit the staging directory goes with what is in it; so it does where the disk is full.
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

from fusesnap.nix.nar import NarEvent
from fusesnap.store.commit import Commit
from fusesnap.store.layout import StateLayout
from fusesnap.store.locks import try_flock
from fusesnap.store.nix_database import NixDatabase
from fusesnap.store.registration import Registration
from fusesnap.store.state_database import Pin, StateDatabase
from fusesnap.store.storage_errors import storage
from fusesnap.store.store_entry import remove_contents
from fusesnap.store.tree_writer import TreeWriter

logger = logging.getLogger(__name__)

# Each one fails only where a start-up pass takes the directory for a leftover in that very moment.
_ATTEMPTS: Final = 16

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
        self.name = pin.info.store_path.base_name
        self._staging = StagingDirectory(target.layout.staging, pin.info.store_path.hash_part)
        self._writer = TreeWriter(self._staging.descriptor, self.name)
        self.location = self._staging.path / self.name  # where the path is unpacked
        self.committed = target.layout.real / self.name  # where it is going
        self.unknown = self._staging.path / UNKNOWN  # where something that has its name is put
        self.is_renamed = False

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

    @property
    def is_complete(self) -> bool:
        """Whether the NAR has ended."""
        return self._writer.is_complete

    @property
    def entries(self) -> int:
        """How many objects were unpacked."""
        return self._writer.entries

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
        Commit([self], self._target).run()
