"""Idmapped mounts: the layers of a mount as a container with a user namespace is to see them.

What is root's on disk must be the container's root's, and that is another id of the host. An idmapped mount shows it so
without a change on disk (mount_setattr(2)). containerd 2 makes them itself where a mount has the options
``uidmap=`` and ``gidmap=``: of the directory that all lower directories have in common, without the mounts below it. So
for a mount that has FUSE in it we make them, and the mount names them as any other lower directories::

    <root>/idmapped/<snapshot's id>/state   <root>
    <root>/idmapped/<snapshot's id>/lazy    the FUSE mount at <root>/lazy

They are read-only, and there until the snapshot is removed: a client mounts later than it asks.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Final, Self

from fusesnap.errors import InvalidArgument, Unsupported
from fusesnap.snapshots.id_mapping import IdMapping, IdRange
from fusesnap.snapshots.mountinfo import IDMAPPED_NAME, devices
from fusesnap.store.storage_errors import storage

STATE_NAME: Final = "state"
LAZY_NAME: Final = "lazy"

# include/uapi/asm-generic/unistd.h, the same numbers on every architecture that we could meet: the C library has these
# calls only since glibc 2.36.
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
# include/uapi/linux/mount.h, fcntl.h
_OPEN_TREE_CLONE, _AT_EMPTY_PATH, _MOVE_MOUNT_F_EMPTY_PATH, _MNT_DETACH = 1, 0x1000, 4, 2
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_IDMAP, _MS_PRIVATE = 1, 0x0010_0000, 1 << 18

# A process of its own, because a process with threads cannot enter a user namespace. It ends with us, or before.
_NEW_NAMESPACE: Final = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
failed = libc.unshare(0x10000000)  # CLONE_NEWUSER
os.write(1, b"%d\\n" % (ctypes.get_errno() if failed else 0))
sys.stdin.read()
"""


class _MountAttr(ctypes.Structure):
    """``struct mount_attr`` of include/uapi/linux/mount.h."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


class Clones:
    """Idmapped mounts that are nowhere yet: descriptors, by the name that each will have. They end when it is left."""

    def __init__(self, trees: dict[str, int]) -> None:
        self._trees = trees

    @property
    def names(self) -> frozenset[str]:
        """The names that they will have."""
        return frozenset(self._trees)

    def attach(self, directory: Path) -> None:
        """Mount each in ``directory``, instead of what an earlier one was. Raises ``StorageFailure``."""
        for name, tree in self._trees.items():
            place = directory / name
            with storage("mount an idmapped layer at", place):
                place.mkdir(parents=True, exist_ok=True)
                _unmount(place)
                _system_call(
                    _MOVE_MOUNT, tree, b"", -1, os.fsencode(place), _MOVE_MOUNT_F_EMPTY_PATH
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for tree in self._trees.values():
            os.close(tree)


class IdmappedMounts:
    """The idmapped mounts of one state directory. Stateless and thread-safe: what is there is what is mounted."""

    def __init__(self, root: Path) -> None:
        """``root`` is the state directory."""
        self._root = root
        self._sources = {STATE_NAME: root, LAZY_NAME: root / LAZY_NAME}

    def clone(self, mapping: IdMapping, *, lazy: bool) -> Clones:
        """The state directory's file system, and with ``lazy`` the FUSE mount's, idmapped.

        Raises ``Unsupported`` where one cannot be, ``InvalidArgument`` for a mapping that the kernel refuses.
        """
        names = (STATE_NAME, LAZY_NAME) if lazy else (STATE_NAME,)
        return clones({name: self._sources[name] for name in names}, mapping)

    def path(self, id_: int, layer: Path) -> Path:
        """Where ``layer``, a directory below the state directory, is seen idmapped for snapshot ``id_``."""
        place = self._place(id_)
        lazy = self._sources[LAZY_NAME]
        if layer.is_relative_to(lazy):
            return place / LAZY_NAME / layer.relative_to(lazy)
        return place / STATE_NAME / layer.relative_to(self._root)

    def attach(self, id_: int, clones_: Clones) -> None:
        """Mount them for snapshot ``id_``, which is there. Raises ``StorageFailure``."""
        top = self._root / IDMAPPED_NAME
        with storage("create", top):
            # What only root may enter is the container's root's below: nobody else may get there.
            top.mkdir(mode=0o700, exist_ok=True)
        clones_.attach(self._place(id_))

    def are_there(self, id_: int, *, lazy: bool) -> bool:
        """Whether a snapshot has its mounts, and that of the FUSE mount is of the one that there is now."""
        mounted = devices()
        place = self._place(id_)
        if place / STATE_NAME not in mounted:
            return False
        return not lazy or mounted.get(place / LAZY_NAME, "") == mounted.get(
            self._sources[LAZY_NAME], mounted[place / STATE_NAME]
        )

    def has_any(self, id_: int) -> bool:
        """Whether a snapshot was given mounts."""
        return (self._place(id_) / STATE_NAME).is_dir()

    def ids(self) -> set[int]:
        """The snapshots that have a place for mounts, whether it has any or not."""
        top = self._root / IDMAPPED_NAME
        with storage("list", top), suppress(FileNotFoundError):
            return {int(entry.name) for entry in top.iterdir()}
        return set()

    def remove(self, id_: int) -> Path:
        """Take away what a snapshot had; says where that was. Who uses it may go on. Raises ``StorageFailure``."""
        place = self._place(id_)
        if not place.exists():
            return place
        # No more than this is ever removed: below are the state directory's own files.
        with storage("remove", place), suppress(FileNotFoundError):
            for name in self._sources:
                _unmount(place / name)
                with suppress(FileNotFoundError):
                    (place / name).rmdir()
            place.rmdir()
        return place

    def _place(self, id_: int) -> Path:
        return self._root / IDMAPPED_NAME / str(id_)


def clones(sources: dict[str, Path], mapping: IdMapping) -> Clones:
    """Idmapped mounts of directories, by name. Raises as :meth:`IdmappedMounts.clone`."""
    with ExitStack() as stack:
        namespace = stack.enter_context(user_namespace(mapping))
        trees = {}
        for name, source in sources.items():
            try:
                trees[name] = _clone(source)
                stack.callback(os.close, trees[name])
                _idmap(trees[name], namespace)
            except OSError as error:
                raise Unsupported(
                    f"{source}: its file system cannot be mounted idmapped: {error.strerror}"
                ) from error
        return Clones({name: os.dup(tree) for name, tree in trees.items()})


def check_overlay(directory: Path) -> None:
    """Mount an overlay of idmapped layers in ``directory``, and take it away.

    Raises ``Unsupported`` where that cannot be, ``StorageFailure`` where ``directory`` cannot be written to. Linux has
    idmapped mounts since 5.12, and overlays of them since 5.19.
    """
    with storage("write in", directory), TemporaryDirectory(dir=directory, prefix="idmap-") as made:
        place = Path(made)
        for name in ("layers/1", "layers/2", "shown"):
            (place / name).mkdir(parents=True)
        with clones({"mapped": place / "layers"}, IdMapping.from_root(100_000, 100_000)) as mapped:
            try:
                mapped.attach(place)
                _mount_overlay(place / "shown", [place / "mapped/1", place / "mapped/2"])
            finally:
                _unmount(place / "shown")
                _unmount(place / "mapped")


def _mount_overlay(place: Path, lowers: Sequence[Path]) -> None:
    options = "lowerdir=" + ":".join(map(str, lowers))
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = b"overlay", os.fsencode(place), b"overlay", ctypes.c_ulong(0), options.encode()
    if libc.mount(*arguments) != 0:
        raise Unsupported(
            f"{place.parent}: overlayfs refuses idmapped layers: {os.strerror(ctypes.get_errno())}:"
            " Linux 5.19 or later is needed"
        )


@contextmanager
def user_namespace(mapping: IdMapping) -> Iterator[int]:
    """A descriptor of a user namespace with that mapping.

    Raises ``Unsupported`` where there can be none, ``InvalidArgument`` for a mapping that the kernel refuses.
    """
    command = [sys.executable, "-I", "-S", "-c", _NEW_NAMESPACE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None  # noqa: S101  # it is a pipe
            number = int(process.stdout.readline() or errno.ECHILD)
            if number:
                raise Unsupported(
                    f"no user namespace can be made: {os.strerror(number)}:"
                    " look at /proc/sys/user/max_user_namespaces"
                )
            own = Path(f"/proc/{process.pid}")
            _map(own / "uid_map", mapping.uids)
            _map(own / "gid_map", mapping.gids)
            namespace = os.open(own / "ns/user", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            process.kill()
    try:
        yield namespace
    finally:
        os.close(namespace)


def _map(file: Path, ranges: Sequence[IdRange]) -> None:
    text = "".join(f"{each.inside} {each.outside} {each.length}\n" for each in ranges)
    try:
        file.write_text(text)  # one write: the kernel takes no second
    except OSError as error:
        said = ",".join(map(str, ranges))
        raise InvalidArgument(
            f"user namespace: the kernel refuses the mapping {said}: {error.strerror}"
        ) from error


def _clone(source: Path) -> int:
    return _system_call(_OPEN_TREE, -1, os.fsencode(source), _OPEN_TREE_CLONE | os.O_CLOEXEC)


def _idmap(tree: int, namespace: int) -> None:
    # Private: where "/" is shared, everything that is mounted later would be mounted in the clone, too, also clones.
    flags = _MOUNT_ATTR_IDMAP | _MOUNT_ATTR_RDONLY
    attributes = _MountAttr(flags, 0, _MS_PRIVATE, namespace)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _system_call(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, ctypes.byref(attributes), size)


def _unmount(place: Path) -> None:
    while place in devices():
        if ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(place), _MNT_DETACH):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def _system_call(number: int, *arguments: object) -> int:
    """Call the kernel. Raises ``OSError``."""
    result: int = ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
