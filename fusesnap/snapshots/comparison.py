"""Which layer lies between two states, going by the mounts that show them, and what it changes.

Whoever wants a diff gives the mounts that a snapshotter answered: those of a view of the parent, and those of the
snapshot. Ours differ in the topmost image layer. The layers of the local store that are above the image in either are
no part of a diff: a layer that stands for store paths is written as it came, with placeholders.
"""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fusesnap.errors import NotOurs
from fusesnap.snapshots.changes import changes
from fusesnap.snapshots.id_mapping import IdMapping
from fusesnap.snapshots.interface import Info, Mount
from fusesnap.snapshots.layer_tar import LayerTar
from fusesnap.snapshots.metastore import Metastore
from fusesnap.snapshots.mountinfo import IDMAPPED_NAME
from fusesnap.store.storage_errors import storage

# include/uapi/linux/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MNT_DETACH = 1, 2, 4, 8, 2

# Of the state directory: image layers, and an idmapped clone of it (see ``idmapped``).
_LAYER: Final = re.compile(r"snapshots/[0-9]+/(fs|base)")
_CLONE: Final = re.compile(rf"{IDMAPPED_NAME}/[0-9]+/(?:state/|(?=lazy/))")
_LOWER: Final = "lowerdir="
_UPPER: Final = "upperdir="
# Of the state directory: what is above the image layers in a mount.
_STORE: Final = ("farms/", "layer/", "lazy/")
_MAPPED: Final = ("uidmap=", "gidmap=")
_PREFIX: Final = "compare-"
_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_PATH: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Comparison:
    """``layer`` is what ``below`` does not have.

    ``overlay``: it is written as overlayfs writes an upper directory. ``mapped``: it is the upper directory of a
    container with a user namespace, and the layers below it are mapped into that.
    """

    layer: Path
    below: Mount | None
    overlay: bool
    mapped: bool = False


class Comparer:
    """Finds what snapshots of one state directory change."""

    def __init__(self, root: Path, metastore: Metastore) -> None:
        """Take the state directory, and remove what a killed process has left mounted there.

        Raises ``StorageFailure``.
        """
        self._root = root
        self._metastore = metastore
        for leftover in root.glob(f"{_PREFIX}*"):
            if not Path("/proc", leftover.name.split("-")[1]).exists():
                with storage("remove", leftover):
                    _unmount(leftover)

    def check_is_ours(self, mounts: Sequence[Mount]) -> None:
        """Raise ``NotOurs`` for other mounts than those that we answer with."""
        self._image_layers(mounts)

    def comparison(self, left: Sequence[Mount], right: Sequence[Mount]) -> Comparison:
        """What is to be compared. Raises ``NotOurs`` for other mounts than those that we answer with."""
        (older, older_mapped), (newer, mapped) = self._image_layers(left), self._image_layers(right)
        if older_mapped:
            raise NotOurs("the older state is mapped into a user namespace")
        if len(older) == 1 and older[0] not in newer and _is_empty(older[0]):
            older = ()  # a view without a parent
        own = newer[: len(newer) - len(older)]
        # A layer may be followed by what completes it, which the state below shows as well.
        if (
            not own
            or newer[len(own) :] != older
            or {Path(one).parent for one in own} != {Path(own[0]).parent}
        ):
            raise NotOurs("the mounts are not those of a snapshot and of its parent")
        layer = Path(own[0])
        below = left[0] if older else None
        return Comparison(layer, below, right[0].type == "overlay", mapped)

    def namespace(self, comparison: Comparison) -> str:
        """containerd's namespace that the layer is of: the first part of its snapshot's key. Raises ``NotOurs``."""
        namespace, slash, _ = self._info(comparison).name.partition("/")
        if not slash:
            raise NotOurs(f"{comparison.layer}: expected a snapshot in a namespace of containerd's")
        return namespace

    def _ids(self, comparison: Comparison) -> IdMapping:
        ids = IdMapping.of_labels(self._info(comparison).labels)
        if ids is None:
            raise NotOurs(f"{comparison.layer}: expected labels that say how its ids are mapped")
        return ids

    def _info(self, comparison: Comparison) -> Info:
        id_ = int(comparison.layer.parent.name)
        with self._metastore.reading() as transaction:
            for snapshot in transaction.snapshots():
                if snapshot.id == id_:
                    return snapshot.info
        raise NotOurs(f"{comparison.layer}: no snapshot has it")

    def layer_tar(self, comparison: Comparison, latest: int | None) -> Iterator[bytes]:
        """The layer, as an archive; ``latest`` as for :class:`LayerTar`. Raises ``StorageFailure``, ``NotOurs``."""
        ids = self._ids(comparison) if comparison.mapped else None
        with ExitStack() as stack, storage("compare", comparison.layer):
            upper = os.open(comparison.layer, _OPEN)
            stack.callback(os.close, upper)
            below = None
            if comparison.below is not None:
                below = stack.enter_context(self._opened(comparison.below))
            found = changes(upper, below, overlay=comparison.overlay, ids=ids)
            yield from LayerTar(latest).pieces(found)

    def _image_layers(self, mounts: Sequence[Mount]) -> tuple[tuple[str, ...], bool]:
        """The image layers that the mounts show, topmost first, and whether they are mapped. Raises ``NotOurs``."""
        layers = []
        mapped = any(word.startswith(_MAPPED) for mount in mounts for word in mount.options)
        for directory in _directories(mounts):
            relative = directory.removeprefix(f"{self._root}/")
            clone = _CLONE.match(relative)
            if clone is not None:
                relative = relative[clone.end() :]
            if relative != directory and _LAYER.fullmatch(relative):
                layers.append(f"{self._root}/{relative}")
                mapped |= clone is not None
            elif not f"{relative}/".startswith(_STORE):
                raise NotOurs(f"{directory}: not a directory of ours")
        return tuple(layers), mapped

    @contextmanager
    def _opened(self, mount: Mount) -> Iterator[int]:
        """A descriptor of the root of what a mount shows. The mount is nowhere, and ends with the descriptor."""
        bind = mount.type == "bind"
        descriptor = os.open(mount.source, _OPEN) if bind else self._mounted(mount)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _mounted(self, mount: Mount) -> int:
        place = Path(tempfile.mkdtemp(dir=self._root, prefix=f"{_PREFIX}{os.getpid()}-"))
        try:
            _mount(mount, place)
            return os.open(place, _OPEN)
        finally:
            _unmount(place)


def _is_empty(directory: str) -> bool:
    with storage("look at", directory), os.scandir(directory) as listing:
        return next(listing, None) is None


def _directories(mounts: Sequence[Mount]) -> Sequence[str]:
    """The directories that mounts show, topmost first. Raises ``NotOurs`` for what we do not answer with."""
    if not mounts:
        return ()
    mount = mounts[0]
    if len(mounts) > 1 or mount.type not in ("bind", "overlay"):
        raise NotOurs("expected one mount, a bind mount or an overlay")
    if mount.type == "bind":
        return (mount.source,)
    upper = [word.removeprefix(_UPPER) for word in mount.options if word.startswith(_UPPER)]
    return (*upper, *_lowers(mount))


def _lowers(mount: Mount) -> Sequence[str]:
    lists = [word.removeprefix(_LOWER) for word in mount.options if word.startswith(_LOWER)]
    return lists[0].split(":") if lists else ()


def _mount(mount: Mount, place: Path) -> None:
    """Mount a view. Raises ``OSError``.

    Layers are named by their descriptors, which are short: mount(2) takes a page of options.
    """
    with ExitStack() as stack:
        layers = []
        for layer in _lowers(mount):
            layers.append(os.open(layer, _PATH))
            stack.callback(os.close, layers[-1])
        words = [f"{_LOWER}{':'.join(f'/proc/self/fd/{layer}' for layer in layers)}"]
        words += [word for word in mount.options if not word.startswith(_LOWER)]
        _libc(
            "mount",
            b"overlay",
            os.fsencode(place),
            b"overlay",
            ctypes.c_ulong(MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC),
            ",".join(words).encode(),
        )


def _unmount(place: Path) -> None:
    """Take a mount out of sight, if it is there, and its mount point away. Raises ``OSError``."""
    with suppress(OSError):  # EINVAL: nothing is mounted; what is, and stays, keeps rmdir from it
        _libc("umount2", os.fsencode(place), MNT_DETACH)
    place.rmdir()


def _libc(function: str, *arguments: object) -> None:
    """Call a function of libc that answers 0. Raises ``OSError``."""
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
