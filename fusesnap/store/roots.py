"""Roots: what the collector of garbage must leave alone, with all that it references.

A *permanent* root lives until it is removed: ours are directories ``gcroots/fusesnap/<name>/`` in Nix's state
directory, with an empty file for each path, named as the path. That is a form that Nix knows (``findRoots`` in
``src/libstore/gc.cc``), and hard links of one empty file cost neither inodes nor blocks, where a symbolic link to each
path would cost both. A *temporary* root lives as long as its process, see :mod:`fusesnap.store.temporary_roots`.

Nix follows a permanent root only to a valid path. So the process that adds permanent roots holds the same paths as
temporary ones too: as long as it lives, real Nix collects nothing that is committed and not valid yet.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from fusesnap.errors import InvalidData
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.store.durability import flush_directory
from fusesnap.store.storage_errors import storage
from fusesnap.store.temporary_roots import TemporaryRoots

_OWN: Final = "fusesnap"  # the directory of ours in gcroots
_UNFINISHED: Final = "."  # names that begin so are being made or removed
_PROCESS: Final = "process"  # the owner of temporary roots that end with the process


class Roots:
    """The roots of one store. For any number of threads and processes; methods raise :class:`StorageFailure`.

    ``used`` is told of the base names that a root which is removed has kept: until then they were in use.
    """

    def __init__(
        self, nix_state: Path, temporary: TemporaryRoots, used: Callable[[Iterable[str]], None]
    ) -> None:
        self._directory = nix_state / "gcroots" / _OWN
        self._temporary = temporary
        self._used = used

    def names(self) -> set[str]:
        """The names of our permanent roots."""
        with storage("list", self._directory):
            try:
                names = os.listdir(self._directory)
            except FileNotFoundError:
                return set()
        return {name for name in names if not name.startswith(_UNFINISHED)}

    def add(self, name: str, paths: Iterable[StorePath]) -> None:
        """Keep ``paths``, committed or not, until the root ``name`` is removed; one of that name is replaced.

        When this returns no collector will take what is there of them.
        """
        base_names = sorted({path.base_name for path in paths})
        self._temporary.hold(_owner(name), base_names)
        place = self._directory / name
        unfinished = self._aside()
        with storage("write", place):
            unfinished.mkdir(parents=True)
            _fill(unfinished, base_names)
            flush_directory(unfinished)
            self._set_aside(name)
            unfinished.rename(place)
            flush_directory(self._directory)

    def remove(self, name: str) -> None:
        """Let go of what the root ``name`` keeps, if there is one."""
        place = self._directory / name
        with storage("remove", place):
            with suppress(FileNotFoundError):
                self._used(os.listdir(place))
            self._set_aside(name)
        self._temporary.drop(_owner(name))

    def guard(self) -> None:
        """Hold what is in our permanent roots for as long as this process lives, valid or not; tidy up."""
        for name in self.names():
            with storage("read", self._directory / name):
                self._temporary.hold(_owner(name), os.listdir(self._directory / name))
        if self._directory.exists():
            for leftover in self._directory.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def keep(self, paths: Iterable[StorePath]) -> None:
        """Keep ``paths`` until this process ends."""
        self._temporary.hold(_PROCESS, (path.base_name for path in paths))

    @contextmanager
    def keeping(
        self, paths: Iterable[StorePath]
    ) -> Iterator[Callable[[Iterable[StorePath]], None]]:
        """Keep ``paths`` meanwhile, and what the function is called with that this gives."""
        lease = self.lease()
        lease.keep(paths)
        try:
            yield lease.keep
        finally:
            lease.end()

    def lease(self) -> Lease:
        """Something that keeps paths, none yet."""
        return Lease(self._temporary)

    def _set_aside(self, name: str) -> None:
        aside = self._aside()
        with suppress(FileNotFoundError):
            (self._directory / name).rename(aside)
            shutil.rmtree(aside)

    def _aside(self) -> Path:
        return self._directory / f"{_UNFINISHED}{secrets.token_hex(8)}"


class Lease:
    """Keeps paths until it ends. Methods may wait for a collector, but for those whose name says that they do not."""

    def __init__(self, temporary: TemporaryRoots) -> None:
        self._temporary = temporary
        self._owner = secrets.token_hex(8)

    def keep(self, paths: Iterable[StorePath]) -> None:
        """Keep ``paths`` too. Raises :class:`StorageFailure`."""
        self._temporary.hold(self._owner, (path.base_name for path in paths))

    def end(self) -> None:
        """Let go of them. Raises :class:`StorageFailure`."""
        self._temporary.drop(self._owner)

    def keep_at_once(self, paths: Iterable[StorePath]) -> bool:
        """As :meth:`keep`, the first time, where others of this process keep them anyway; tell whether it was done."""
        return self._temporary.hold_with_others(self._owner, [path.base_name for path in paths])

    def end_at_once(self) -> bool:
        """As :meth:`end`, where others of this process keep the same anyway; tell whether it was done."""
        return self._temporary.drop_with_others(self._owner)


def read_permanent_roots(nix_state: Path, store_dir: StoreDir) -> set[str]:
    """The base names that anything in ``gcroots`` and ``profiles`` names, as Nix reads them, valid or not.

    Raises :class:`StorageFailure`.
    """
    found: set[str] = set()
    for top in (nix_state / "gcroots", nix_state / "profiles"):
        with storage("read roots in", top):
            waiting = [str(top)]
            while waiting:
                waiting += _read_directory(waiting.pop(), store_dir, found)
    return found


def _read_directory(directory: str, store_dir: StoreDir, found: set[str]) -> list[str]:
    """Add the roots in ``directory`` to ``found``; return its subdirectories."""
    below = []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    below.append(entry.path)
                elif entry.is_symlink():
                    found |= _link_root(entry.path, store_dir)
                else:
                    found |= _named(f"{store_dir.path}/{entry.name}", store_dir)
    except FileNotFoundError:
        return []  # a root that went meanwhile
    return below


def _link_root(link: str, store_dir: StoreDir) -> set[str]:
    """What a link leads to: a store path or something in one, perhaps over one more link elsewhere."""
    for _ in range(2):
        try:
            link = os.path.normpath(os.path.join(os.path.dirname(link), os.readlink(link)))  # noqa: PTH118, PTH120, PTH115
        except OSError:
            return set()
        if link.startswith(store_dir.path + "/"):
            return _named(link, store_dir)
    return set()


def _named(full_path: str, store_dir: StoreDir) -> set[str]:
    name = full_path.removeprefix(store_dir.path + "/").partition("/")[0]
    try:
        return {StorePath.parse_base_name(name).base_name}
    except InvalidData:
        return set()


def _owner(name: str) -> str:
    return f"root {name}"


def _fill(directory: Path, base_names: Iterable[str]) -> None:
    """Make an empty file of each name, all of them links of one as far as the file system lets us."""
    first = None
    for name in base_names:
        place = f"{directory}/{name}"
        if first is None or not _linked(first, place):
            os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
            first = place


def _linked(first: str, place: str) -> bool:
    try:
        os.link(first, place)
    except OSError as error:
        if error.errno != errno.EMLINK:
            raise
        return False
    return True
