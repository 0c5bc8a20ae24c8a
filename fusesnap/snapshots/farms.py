"""Farms: immutable directories of redirects, which put store paths above an image's layers.

A closure farm is a layer of an overlay with ``redirect_dir=follow``. Its store directory has, for each store path that
is a directory, an empty directory with the extended attribute ``trusted.overlay.redirect`` = ``/.fusesnap-store/<base
name>``: overlayfs goes on in the layers below under that name, and finds the committed store in the store layer. Single
files are hard links, links are copies. A lazy farm has the same for directories that are missing, with
``/.fusesnap-lazy/<base name>``, in the layer that FUSE serves.

Each hides the reserved name that it redirects to from the container with a whiteout, and no other: a whiteout between a
redirect and its target would end the search. Overlayfs shows the metadata of the topmost layer that has a directory, so
the root and the store directory in a farm look as the image has them.

A farm is named by what is in it, built under another name and renamed, never changed, shared by all who want the same,
and removed only when no snapshot refers to it and no mount uses it.

Source: Linux, ``Documentation/filesystems/overlayfs.rst``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from fusesnap.errors import Unsupported
from fusesnap.nix.tree import STORE_MTIME_NS
from fusesnap.snapshots.directories import NEW, REMOVED, remove_tree
from fusesnap.snapshots.layer_content import OPAQUE_XATTR
from fusesnap.snapshots.mountinfo import OverlayMount
from fusesnap.store.storage_errors import storage

STORE_NAME: Final = ".fusesnap-store"
LAZY_NAME: Final = ".fusesnap-lazy"
REDIRECT_XATTR: Final = "trusted.overlay.redirect"
OVERLAY_XATTRS: Final = "trusted.overlay."

STORE_ROOT_MODE: Final = 0o555

_FORMAT: Final = "2"  # part of every name: a farm that another version built is another farm
_NAME_LENGTH: Final = (
    32  # hexadecimal digits; the names of all lower directories must fit into a page
)


@dataclass(frozen=True, slots=True)
class DirectoryMetadata:
    """How a directory looks. ``mtime`` in ns; ``xattrs`` without overlay's own."""

    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: int = STORE_MTIME_NS
    xattrs: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True)
class Farm:
    """What is in a farm.

    ``parents``: how the root, and each directory down to the store directory, looks. ``reserved``: the name at the root
    that directories redirect into and that a whiteout hides. ``directories`` and ``files``: base names of store paths;
    a file (or link) is in ``content``, a directory of the same file system, under its base name.
    """

    parents: tuple[tuple[str, DirectoryMetadata], ...]
    reserved: str
    directories: tuple[str, ...]
    files: tuple[str, ...] = ()
    content: Path | None = None

    @cached_property
    def key(self) -> str:
        """The farm's name: a digest of what is in it."""
        digest = hashlib.sha256()
        for word in (_FORMAT, self.reserved, *map(repr, self.parents)):
            digest.update(word.encode(errors="surrogateescape") + b"\0")
        digest.update("\n".join(self.directories).encode() + b"\0")
        digest.update("\n".join(self.files).encode() + b"\0")
        return digest.hexdigest()[:_NAME_LENGTH]


class Farms:
    """The farms of one state directory. Stateless and thread-safe: what is there is what is on disk."""

    def __init__(self, root: Path) -> None:
        """Create ``root`` where it is missing. Raises ``StorageFailure``."""
        self._root = root
        with storage("create", root):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        """Where the farm ``key`` is."""
        return self._root / key

    def are_there(self, keys: Iterable[str]) -> bool:
        """Whether all these farms are built."""
        return all(self.path(key).is_dir() for key in keys)

    def ensure(self, farm: Farm) -> str:
        """Build a farm unless it is there; returns its key. Raises ``StorageFailure``."""
        key = farm.key
        place = self.path(key)
        if place.is_dir():
            return key
        temporary = self._root / f"{NEW}{secrets.token_hex(8)}"
        with storage("build", place):
            try:
                temporary.mkdir(mode=0o700)
                with _locked(temporary):
                    _build(farm, temporary)
                    _rename_unless_there(temporary, place)
            finally:
                remove_tree(temporary)
        return key

    def set_aside_unused(
        self, referenced: set[str], mounts: Callable[[], Sequence[OverlayMount]]
    ) -> Iterator[Path]:
        """Rename every farm away that nothing refers to and no mount uses; yields what is to be removed.

        ``mounts`` says which there are; it is asked only where something may have to go. Only right within a
        transaction that writes: a farm is referred to in the transaction that answers with it.
        """
        with storage("list", self._root):
            names = sorted(entry.name for entry in self._root.iterdir())
        unreferenced = [
            name for name in names if not name.startswith(NEW) and name not in referenced
        ]
        found = mounts() if unreferenced else ()
        for name in unreferenced:
            if name.startswith(REMOVED):
                yield self._root / name
            elif not any(name in mount.options for mount in found):
                aside = self._root / f"{REMOVED}{secrets.token_hex(8)}"
                with storage("remove", self._root / name):
                    (self._root / name).rename(aside)
                yield aside

    def remove_unfinished(self) -> list[Path]:
        """Remove farms that were being built when their process died; says which. Raises ``StorageFailure``."""
        removed = []
        with storage("list", self._root):
            leftovers = sorted(self._root.glob(f"{NEW}*"))
        for leftover in leftovers:
            with suppress(BlockingIOError, FileNotFoundError), _locked(leftover):
                remove_tree(leftover)
                removed.append(leftover)
        return removed


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a lock that ends with the process: what is not locked is nobody's work. Raises ``BlockingIOError``."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def check_store_layer(layer: Path) -> None:
    """Overlayfs looks below a redirect's target in every further layer: only the opaque mark ends that search.

    Raises ``Unsupported`` where the store layer has none, so that an image could reach into store paths.
    """
    path = layer / STORE_NAME
    with storage("read", path):
        try:
            opaque = os.getxattr(path, OPAQUE_XATTR)
        except OSError as error:
            raise Unsupported(
                f"{path}: expected the extended attribute {OPAQUE_XATTR}: {error.strerror}"
            ) from error
    if opaque != b"y":
        raise Unsupported(f"{path}: expected {OPAQUE_XATTR} = 'y', got {opaque!r}")


def read_metadata(layers: Iterable[Path], name: str) -> DirectoryMetadata:
    """How the directory ``name`` of these layers, topmost first, looks in their overlay. Raises ``StorageFailure``.

    It has the metadata of the topmost layer that has it. Where no layer does, it is an ordinary directory of root's.
    """
    for layer in layers:
        path = layer / name
        with storage("read", path):
            try:
                status = _lstat_below(layer, name)
            except (FileNotFoundError, NotADirectoryError):
                continue
            if status is None:
                break
            xattrs = tuple(
                (key, os.getxattr(path, key, follow_symlinks=False))
                for key in sorted(os.listxattr(path, follow_symlinks=False))
                if not key.startswith(OVERLAY_XATTRS)
            )
        mode = stat.S_IMODE(status.st_mode)
        return DirectoryMetadata(mode, status.st_uid, status.st_gid, status.st_mtime_ns, xattrs)
    return DirectoryMetadata()


def _lstat_below(layer: Path, name: str) -> os.stat_result | None:
    """The status of directory ``name``; ``None`` where something else is there or above it."""
    path = layer
    status = path.lstat()
    for part in Path(name).parts:
        path = path / part
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            return None
    return status


def _build(farm: Farm, top: Path) -> None:
    os.mknod(top / farm.reserved, stat.S_IFCHR, os.makedev(0, 0))
    store = top / farm.parents[-1][0]
    store.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in farm.directories:
            _redirect(descriptor, str(store), name, f"/{farm.reserved}/{name}")
    finally:
        os.close(descriptor)
    for name in farm.files:
        assert farm.content is not None  # noqa: S101  # files come with the place that they are in
        os.link(farm.content / name, store / name, follow_symlinks=False)
    for name, metadata in reversed(farm.parents):  # the root last: its entries change its mtime
        _dress(top / name, metadata)


def _redirect(store: int, path: str, name: str, target: str) -> None:
    os.mkdir(name, dir_fd=store)
    os.setxattr(f"{path}/{name}", REDIRECT_XATTR, target.encode())
    os.chmod(name, STORE_ROOT_MODE, dir_fd=store)  # whatever the umask
    os.utime(name, ns=(STORE_MTIME_NS, STORE_MTIME_NS), dir_fd=store)


def _dress(directory: Path, metadata: DirectoryMetadata) -> None:
    os.chown(directory, metadata.uid, metadata.gid)
    directory.chmod(metadata.mode)
    for key, value in metadata.xattrs:
        os.setxattr(directory, key, value)
    os.utime(directory, ns=(metadata.mtime, metadata.mtime))


def _rename_unless_there(temporary: Path, place: Path) -> None:
    try:
        temporary.rename(place)
    except OSError:
        if not place.is_dir():  # another built the same meanwhile: what is there is as good
            raise
