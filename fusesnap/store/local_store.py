"""The local store: what the other rooms see of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from fusesnap.nix.narinfo import NarInfo
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.store.layout import StateLayout
from fusesnap.store.locks import directory_lock
from fusesnap.store.nix_database import NixDatabase, ValidPathInfo
from fusesnap.store.recovery import RecoveryReport, recover
from fusesnap.store.registration import Registration
from fusesnap.store.staging import CommitTarget, StagedPath
from fusesnap.store.state_database import PathState, Pin, StateDatabase
from fusesnap.store.storage_errors import storage
from fusesnap.store.store_entry import is_there

__all__ = ["LocalStore", "Pin", "StagedPath", "StoreCounts", "ValidPathInfo"]

logger = logging.getLogger(__name__)


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
        self._target = target
        self.store_dir = store_dir
        self.layer = target.layout.layer
        self.real = target.layout.real
        self.recovered = report
        self.overlay_ready = ready
        self._known: set[StorePath] = set()  # recorded or valid, seen once

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
            target = CommitTarget(layout, database, nix, registration)
            report = recover(target)
            opened.pop_all()
        return cls(target, store_dir, report, ready=ready)

    def close(self) -> None:
        """Close the databases."""
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
            there = {path for path in paths if is_there(f"{real}/{path.base_name}")}
        # A name in the directory is not enough: real Nix writes a path under its final name.
        unsure = {path.base_name: path for path in there - self._known}
        if unsure:
            known = self._target.state.recorded_among(unsure)
            known |= self._target.nix.valid_among(unsure.keys() - known)
            self._known |= {unsure[name] for name in known}
            there -= {path for name, path in unsure.items() if name not in known}
        return there

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
            pin = self.pin(_as_narinfo(valid, self.store_dir))
        return pin

    def pin_of(self, ordinal: int) -> Pin | None:
        """Return the pin that has ``ordinal``."""
        return self._target.state.pin_of(ordinal)

    def valid_path_info(self, path: StorePath) -> ValidPathInfo | None:
        """Return what Nix's database says of ``path``, None where it is not valid."""
        return self._target.nix.valid_path_info(path)

    def valid_closure(self, path: StorePath) -> list[StorePath]:
        """Return the closure of ``path``, sorted, from Nix's database; empty if it is not valid."""
        return self._target.nix.closure(path)

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


def _as_narinfo(valid: ValidPathInfo, store_dir: StoreDir) -> NarInfo:
    """What Nix's database knows of a path, as a cache would have said it. No file has this URL: none is asked for."""
    return NarInfo(
        store_path=valid.store_path,
        url=f"nar/{valid.store_path.hash_part}.nar",
        compression="none",
        file_hash=None,
        file_size=None,
        nar_hash=valid.nar_hash,
        nar_size=valid.nar_size,
        references=valid.references,
        deriver=valid.deriver,
        system=None,
        signatures=valid.signatures,
        ca=valid.ca,
        unknown=(),
        store_dir=store_dir,
    )
