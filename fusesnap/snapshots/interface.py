"""What a snapshotter is: the words, the values and the calls.

The contract is containerd's (``core/snapshots/snapshotter.go`` there), and so are the words:

snapshot
    The state of a directory tree. It is stored as what it changes of its parent's state.
key
    The name of an *active* snapshot: one that is still being written to (kind ``ACTIVE``), or that shows a state
    read-only (kind ``VIEW``). It lives until Commit or Remove.
name
    The name of a *committed* snapshot. It never changes and may be the parent of others. Keys and names are one name
    space; containerd puts its own namespace in front of both, so that its namespaces never meet here.
parent
    The committed snapshot that a snapshot's changes are relative to; ``""`` is the empty directory.
chain
    A committed snapshot, its parent, that one's parent, and so on: the layers of an image, topmost first.
mount
    One call of mount(2) that shows a snapshot. A snapshotter only says how to mount; its client mounts, later, and
    perhaps several times.

The life of an image's layer: ``prepare(key, parent)`` gives a place to write to, the client unpacks the layer there,
``commit(name, key)`` makes it a parent for the next. The life of a container: ``prepare(key, image)`` when it is
created, ``mounts(key)`` whenever its task starts, ``remove(key)`` at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Protocol

from fusesnap.nix.store_path import StorePath
from fusesnap.store.roots import Roots


class Kind(Enum):
    """What may be done with a snapshot. The values are the words of containerd's filters."""

    VIEW = "view"
    ACTIVE = "active"
    COMMITTED = "committed"


@dataclass(frozen=True, slots=True)
class Info:
    """What is known of a snapshot. ``created`` and ``updated`` are nanoseconds since the epoch, UTC."""

    name: str
    parent: str
    kind: Kind
    created: int
    updated: int
    labels: Mapping[str, str]

    def with_labels(self, labels: Mapping[str, str]) -> Info:
        """This, with other labels."""
        return replace(self, labels=labels)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a snapshot itself takes on disk, its parents and the shared store not counted. ``size`` is in bytes."""

    size: int
    inodes: int

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.size + other.size, self.inodes + other.inodes)


@dataclass(frozen=True, slots=True)
class Mount:
    """One call of mount(2). ``options`` are in the style of fstab: flags and data mixed."""

    type: str
    source: str
    options: tuple[str, ...]


class Snapshots(Protocol):
    """What a snapshotter answers. All errors are :class:`fusesnap.errors.FusesnapError`.

    Any call raises ``Unavailable`` where its key or parent is removed and made anew before it ends; made again it meets
    the new one.
    """

    async def stat(self, key: str) -> Info:
        """Say what is known of the snapshot of that key or name. Raises ``NotFound``."""
        ...

    async def update(self, info: Info, fields: Sequence[str] = ()) -> Info:
        """Change what may change of the snapshot ``info.name``, its labels, and say what it is then.

        ``fields`` is a field mask: ``labels`` replaces all labels, ``labels.<key>`` sets or (where ``info`` lacks it)
        drops one. Without fields all labels are replaced. Raises ``NotFound``, and ``InvalidArgument`` for a field
        that cannot change.
        """
        ...

    async def usage(self, key: str) -> Usage:
        """Say what a snapshot takes on disk: counted now if it is active, as counted at Commit if it is committed.

        Raises ``NotFound``.
        """
        ...

    async def mounts(self, key: str) -> Sequence[Mount]:
        """Say again how to mount the active snapshot or view ``key``.

        Raises ``NotFound``, and ``FailedPrecondition`` for a committed snapshot.
        """
        ...

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount]:
        """Create the active snapshot ``key`` on ``parent``, and say how to mount it for writing.

        Once mounted it shows the parent's state; what is then written belongs to the snapshot alone. Raises
        ``AlreadyExists`` if the key is taken, by whatever kind; ``NotFound`` if there is no such parent;
        ``InvalidArgument`` if the parent is not committed or the labels cannot be used; ``ClosureUnavailable`` and its
        kin if labels name store paths that cannot be had.
        """
        ...

    async def view(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount]:
        """Create the view ``key`` of ``parent``: as :meth:`prepare`, but read-only, and never to be committed."""
        ...

    async def commit(
        self, name: str, key: str, labels: Mapping[str, str], parent: str = ""
    ) -> None:
        """Turn the active snapshot ``key`` into the committed snapshot ``name``; the key is free then.

        Labels are not inherited: the committed snapshot has ``labels`` and no others. ``parent`` may give a parent to
        a snapshot that was prepared without one. Raises ``NotFound`` for the key; ``AlreadyExists`` for the name;
        ``FailedPrecondition`` if the key is not an active snapshot; ``InvalidArgument`` if it has another parent or
        labels cannot be used; ``ClosureUnavailable`` and its kin if the layer stands for store paths that cannot be
        had. The snapshot then stays active.
        """
        ...

    async def remove(self, key: str) -> None:
        """Forget the snapshot of that key or name, and free what it takes.

        Raises ``NotFound``, and ``FailedPrecondition`` while it is another's parent.
        """
        ...

    async def walk(self, matches: Callable[[Info], bool] | None = None) -> Sequence[Info]:
        """List the snapshots that ``matches`` is true for; all of them without it. It is called in a thread."""
        ...

    async def cleanup(self) -> None:
        """Free what removed snapshots have left on disk."""
        ...


class PromptSnapshots(Protocol):
    """What a snapshotter can answer without waiting for anybody. Its methods block, shortly, and are called in threads.

    ``None``, and any error, says that the same call of :class:`Snapshots` is to be made: nothing has been done.
    """

    def stat(self, key: str) -> Info | None:
        """See :class:`Snapshots`."""
        ...

    def mounts(self, key: str) -> Sequence[Mount] | None:
        """See :class:`Snapshots`."""
        ...

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount] | None:
        """See :class:`Snapshots`."""
        ...


class CommittedStore(Protocol):
    """The part of the local store that a snapshotter looks at. Its methods are called in threads."""

    @property
    def roots(self) -> Roots:
        """What the collector must leave alone."""
        ...

    @property
    def layer(self) -> Path:
        """The overlay layer in which ``.fusesnap-store``, marked opaque, holds the committed store paths."""
        ...

    def committed_among(self, paths: Sequence[StorePath]) -> set[StorePath]:
        """Those of ``paths`` whose verified content is there. It stays there if it is kept by a root."""
        ...

    def location(self, path: StorePath) -> Path:
        """Where a committed path's content is."""
        ...


class PathSource(Protocol):
    """Where store paths come from that are not committed yet."""

    async def expect(self, root: StorePath) -> object:
        """``root``, of which nothing is known, is wanted, and soon what it references. Does not fail.

        Returns when it is known whether a cache tells of all that at once.
        """
        ...

    async def admit(
        self, paths: Collection[StorePath], shown: Collection[StorePath]
    ) -> Mapping[StorePath, int]:
        """Make sure that every path can be had: a trusted narinfo is found, and pinned.

        ``shown`` are the paths that containers above the layer show: a cache may tell of all of them at once.
        Returns how many bytes the NAR of each path that is not committed has.
        Raises ``ClosureUnavailable``, which names the paths and what each cache said.
        """
        ...

    async def realise(self, path: StorePath) -> object:
        """Return when the path is committed. Raises as fetching it fails."""
        ...

    def prefetch(self, paths: Sequence[StorePath]) -> object:
        """Take the hint that these will be wanted soon. Does not wait, and does not fail."""
        ...


class LazyLayer(Protocol):
    """The mount that serves store paths which are not committed yet, fetching what is read.

    Its directory ``.fusesnap-lazy`` must answer getxattr of ``trusted.overlay.opaque`` with ``y``, and a lookup there
    of a path that turns out to be no directory with an error: overlayfs shows a redirect whose target is missing, or no
    directory, as an empty directory.
    """

    @property
    def layer(self) -> Path:
        """The overlay layer in which ``.fusesnap-lazy`` holds every path that may be fetched."""
        ...

    async def view(self, paths: frozenset[StorePath]) -> Path:
        """A layer that shows exactly these paths, in the store directory.

        It is the same one for the same paths, and stays valid over restarts.
        """
        ...


class Starts(Protocol):
    """Who wants to know when containers start. Its methods do not wait, and do not fail."""

    def begins(
        self, key: str, upper: Path, paths: frozenset[StorePath], lazy: frozenset[StorePath]
    ) -> object:
        """A container is about to start; of its ``paths`` those in ``lazy`` will be served by the lazy layer.

        ``upper`` is the upper directory of its root. It may be said again for the same ``key``.
        """
        ...

    def foreseen(self, paths: frozenset[StorePath], labels: Mapping[str, str]) -> object:
        """Layers with these ``labels`` are committed, or will be, above which containers show ``paths``.

        It may be said more than once.
        """
        ...

    def admitted(self, name: str, paths: frozenset[StorePath]) -> object:
        """All of ``paths`` can be had, which containers show above the layer that becomes committed as ``name``."""
        ...

    def ended(self, key: str) -> object:
        """The snapshot of such a container is removed."""
        ...
