"""Where snapshots are on disk: ``snapshots/<id>/`` with ``fs`` (the layer), ``work`` (overlay's) and ``base``.

``base`` is there for a layer that adds to store paths of a layer below: they are whole in it, as they were below.
``shifted`` is there for a snapshot that containerd rewrites for a user namespace (see ``owners``).

The functions here make single system calls in a given order and keep no state; the metastore's transaction around them
says which directories are owned.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from fusesnap.errors import StorageFailure
from fusesnap.snapshots.interface import Kind
from fusesnap.store.storage_errors import storage

# Names that no id has: what is being made, and what is being removed. Both are nobody's after a crash.
NEW: Final = "new-"
REMOVED: Final = "rm-"

SHIFTED: Final = "shifted"

# Two who remove the same directory may be in each other's way, a few times.
ATTEMPTS: Final = 16

FS_MODE: Final = 0o755  # containerd's: a container's / is that of its upper directory
WORK_MODE: Final = 0o711


class Directories:
    """The snapshot directories of one state directory."""

    def __init__(self, root: Path) -> None:
        """Create ``root`` where it is missing. Raises ``StorageFailure``."""
        self._root = root
        with storage("create", root):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def fs(self, id_: int) -> Path:
        """The layer of a snapshot: what it changes of its parent."""
        return self._root / str(id_) / "fs"

    def work(self, id_: int) -> Path:
        """Overlay's work directory for an active snapshot."""
        return self._root / str(id_) / "work"

    def base(self, id_: int) -> Path:
        """The layer directly below ``fs``, of a snapshot whose layer is completed."""
        return self._root / str(id_) / "base"

    def shifted_to(self, id_: int) -> tuple[int, int] | None:
        """Which user and group the root of a snapshot was given, if it was rewritten for a user namespace."""
        if not os.path.lexists(self._root / str(id_) / SHIFTED):
            return None
        owner = self.fs(id_).lstat()
        return owner.st_uid, owner.st_gid

    def create(
        self,
        id_: int,
        kind: Kind,
        parent: int | None,
        *,
        owner: tuple[int, int] | None = None,
        shifted: bool = False,
    ) -> None:
        """Make the directory of a new snapshot, durably. Raises ``StorageFailure``.

        The ``owner`` of its root is the parent's if none is given, as containerd's overlayfs snapshotter has it.
        ``shifted``: it is to be rewritten for a user namespace.
        """
        temporary = self._root / f"{NEW}{secrets.token_hex(8)}"
        with storage("create", temporary):
            try:
                temporary.mkdir(mode=0o700)
                self._fill(temporary, kind, owner or self._owner(parent))
                if shifted:
                    (temporary / SHIFTED).mkdir()
                self._take_place(temporary, id_)
            except BaseException:
                with suppress(StorageFailure):  # the error that led here is the one to be told
                    remove_tree(temporary)
                raise

    def _owner(self, parent: int | None) -> tuple[int, int] | None:
        if parent is None:
            return None
        owner = self.fs(parent).lstat()
        return owner.st_uid, owner.st_gid

    def _fill(self, directory: Path, kind: Kind, owner: tuple[int, int] | None) -> None:
        fs = directory / "fs"
        fs.mkdir()
        if owner is not None:
            os.chown(fs, *owner)
        fs.chmod(FS_MODE)  # whatever the umask
        if kind is Kind.ACTIVE:
            (directory / "work").mkdir()
            (directory / "work").chmod(WORK_MODE)

    def _take_place(self, temporary: Path, id_: int) -> None:
        place = self._root / str(id_)
        if (
            place.exists()
        ):  # a transaction that was rolled back had this id; its directory is nobody's
            place.rename(self._root / f"{REMOVED}{secrets.token_hex(8)}")
        temporary.rename(place)
        _sync(self._root)

    def set_orphans_aside(self, ids: set[int]) -> dict[Path, Path]:
        """Rename what no snapshot of ``ids`` owns to names that none will have. Raises ``StorageFailure``.

        Returns what each was before. Only right within a transaction that writes: directories are made in one.
        """
        owned = {str(id_) for id_ in ids}
        aside = {}
        with storage("list", self._root):
            # Names: there are thousands of snapshots, and all wait for this.
            for name in sorted(set(os.listdir(self._root)) - owned):
                entry = self._root / name
                if name.startswith(REMOVED):
                    aside[entry] = entry
                else:
                    aside[entry.rename(self._root / f"{REMOVED}{secrets.token_hex(8)}")] = entry
        return aside

    def missing(self, ids: set[int]) -> list[int]:
        """Those of ``ids`` that have no directory."""
        return sorted(id_ for id_ in ids if not self.fs(id_).is_dir())


def remove_tree(path: Path) -> None:
    """Remove a directory that others may be removing too. Raises ``StorageFailure``.

    A container nests directories deeper than a path may be long, or than recursion goes. So nothing descends: a
    directory that is found is first moved up, to be a neighbour of the one it was found in.
    """
    with storage("remove", path):
        for _ in range(ATTEMPTS):
            if _removed(path):
                return
        _vanish(path.rmdir)


def _removed(path: Path) -> bool:
    """Remove what is there now. False where another who removes it too has moved something up meanwhile."""
    waiting = [path]
    while waiting:
        _empty(waiting.pop(), path, waiting)
    try:
        for directory in sorted(path.glob(f"{REMOVED}*")) if path.exists() else ():
            _vanish(directory.rmdir)
        _vanish(path.rmdir)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        return False
    return True


def _empty(directory: Path, top: Path, waiting: list[Path]) -> None:
    try:
        with os.scandir(directory) as listing:
            entries = list(listing)
    except FileNotFoundError:
        return
    for entry in entries:
        if not entry.is_dir(follow_symlinks=False):
            _vanish(Path(entry.path).unlink)
        elif directory != top or not entry.name.startswith(REMOVED):
            moved = top / f"{REMOVED}{secrets.token_hex(8)}"
            _vanish(partial(os.rename, entry.path, moved))
            waiting.append(moved)
        else:
            waiting.append(Path(entry.path))


def _vanish(step: Callable[[], object]) -> None:
    with suppress(FileNotFoundError):  # another was faster at it
        step()


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
