"""The merged tree of an image's layers, immutable, its nodes numbered.

Numbers go breadth first with names in the order of their bytes: the same layers give the same
numbers in every process, the root is 0, and the children of a directory are consecutive.

**Store paths.** Nix layers (:mod:`fusesnap.images.nix_layer`) stand for store paths whose content is
not in the image. This tree holds what the *image* has and says how the rest is to be laid over it;
a view does that:

* A path in :attr:`RootFs.overridden` was replaced, whited out or made opaque by a layer above its
  Nix layer. It is the image's own from then on: the tree is all there is of it.
* Of any other path X of :attr:`RootFs.nix_layers` the store's content shows at the place
  :meth:`RootFs.store_node` (None where the image has no entry of that name at all: X is listed in
  the store directory nonetheless). The node there is a placeholder (:meth:`RootFs.placeholder`):
  X's kind and metadata are the store's. What lower layers held at X is gone from the tree.
* Where that node has children, layers above added them, and they merge as in an overlay. For a
  directory that both have, the view shows the image's children, and those of the store that are
  neither among them nor in :meth:`RootFs.hidden`; none of the store's if
  :meth:`RootFs.opaque`. Two directories of one name merge again, unless that name is hidden. A
  merged directory whose :attr:`Node.layer` is None (it is there because something is in it) has the
  store's metadata, otherwise the image's.
"""

from __future__ import annotations

import stat
from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from fusesnap.errors import InvalidArgument
from fusesnap.images.file_table import FileTable
from fusesnap.images.layer import FileKind, LayerTar, Segments, Xattrs
from fusesnap.images.nix_layer import NixLayer, store_prefix
from fusesnap.nix.quoting import quote
from fusesnap.nix.store_path import StoreDir, StorePath

ROOT: Final = 0
_NOTHING: Final[frozenset[bytes]] = frozenset()


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a file's contents are: ``size`` bytes at ``offset`` of the tar of the layer ``layer``.

    Of a sparse file, ``segments`` are (offset in the file, bytes) of the stretches that lie there
    one after another; the rest are zeros.
    """

    layer: int
    offset: int
    size: int
    segments: Segments | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """One name in the tree and the file that it names.

    ``mode`` are the twelve permission bits. ``size`` is in bytes: of contents or of the target,
    otherwise 0. ``mtime_ns`` is in nanoseconds since 1970. ``inode`` is the number of the first node
    that names the same file, equal for all hard links; ``nlink`` counts those, or for a directory
    its subdirectories and 2. ``layer`` is the position of the layer that gave the metadata, None for
    a directory that no layer has an entry for (0755, root's, of 1970).
    """

    kind: FileKind
    name: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    target: bytes
    rdev: int
    nlink: int
    xattrs: Xattrs
    content: Extent | None
    inode: int
    layer: int | None

    @property
    def st_mode(self) -> int:
        """Kind and permissions as stat(2) has them."""
        return self.kind | self.mode


@dataclass(frozen=True, slots=True)
class Columns:
    """The tree as columns, by node number: what a merge hands over.

    ``files`` are rows of ``table``; ``child_counts`` is 0 for what is no directory. By row of the
    table: ``inodes`` and ``nlinks``. By node: ``hidden`` and ``opaque``.
    """

    table: FileTable
    files: array[int]
    names: Sequence[bytes]
    parents: array[int]
    first_children: array[int]
    child_counts: array[int]
    inodes: array[int]
    nlinks: array[int]
    hidden: Mapping[int, frozenset[bytes]]
    opaque: frozenset[int]


class RootFs:
    """The merged tree. Made by :func:`fusesnap.images.merge.merge_layers`.

    Thread-safe. It owns the layers' open files: use it as a context, or close it.
    """

    def __init__(
        self,
        columns: Columns,
        layers: Sequence[LayerTar],
        store_dir: StoreDir,
        nix_layers: Sequence[NixLayer],
        overridden: frozenset[StorePath],
    ) -> None:
        self._columns = columns
        self._layers = tuple(layers)
        self._nix_layers = tuple(nix_layers)
        self._overridden = overridden
        self._store_directory = self.find(store_prefix(store_dir))
        self._placeholders = {
            node: placeholder.path
            for layer in nix_layers
            for placeholder in layer.placeholders
            if placeholder.path not in overridden
            and (node := self.store_node(placeholder.path)) is not None
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the layers' files."""
        for layer in self._layers:
            layer.close()

    def __len__(self) -> int:
        """Count the nodes; numbers go from 0 to one less."""
        return len(self._columns.names)

    # ------------------------------------------------------------------ tree

    def node(self, index: int) -> Node:
        """Return the node ``index``."""
        columns = self._columns
        table, file = columns.table, columns.files[index]
        kind = table.kind(file)
        return Node(
            kind=kind,
            name=columns.names[index],
            mode=stat.S_IMODE(table.modes[file]),
            uid=table.uids[file],
            gid=table.gids[file],
            mtime_ns=table.mtimes[file],
            size=table.sizes[file],
            target=table.targets.get(file, b""),
            rdev=table.rdevs.get(file, 0),
            nlink=columns.nlinks[file],
            xattrs=table.xattrs.get(file, ()),
            content=self._extent(file) if kind is FileKind.REGULAR else None,
            inode=columns.inodes[file],
            layer=table.layer(file),
        )

    def child(self, index: int, name: bytes) -> int | None:
        """Return the number of ``name`` in the directory ``index``; None if the image has none."""
        children = self.children(index)
        names = self._columns.names
        found = bisect_left(names, name, children.start, children.stop)
        return found if found < children.stop and names[found] == name else None

    def children(self, index: int) -> range:
        """Return the numbers of what is in the directory ``index``, in the order of their names.

        Empty for what is no directory.
        """
        first = self._columns.first_children[index]
        return range(first, first + self._columns.child_counts[index])

    def parent(self, index: int) -> int:
        """Return the directory that ``index`` is in; the root is in itself."""
        return self._columns.parents[index]

    def path(self, index: int) -> bytes:
        """Return the path from the root, ``b""`` for the root itself."""
        parts: list[bytes] = []
        while index != ROOT:
            parts.append(self._columns.names[index])
            index = self._columns.parents[index]
        return b"/".join(reversed(parts))

    def find(self, path: bytes) -> int | None:
        """Return the node at ``path`` from the root; links are not followed, None if there is none."""
        here: int | None = ROOT
        for name in filter(None, path.split(b"/")):
            here = self.child(here, name) if here is not None else None
        return here

    def read(self, index: int, offset: int, size: int) -> bytes:
        """Read at most ``size`` bytes at ``offset`` of the file ``index``; fewer only at its end.

        Raises InvalidArgument for what is no regular file and for negative numbers, ContentMismatch
        and StorageFailure where the cached layer cannot be read.
        """
        file = self._columns.files[index]
        table = self._columns.table
        if table.kind(file) is not FileKind.REGULAR or offset < 0 or size < 0:
            raise InvalidArgument(
                f"{quote(self.path(index))}: expected a regular file and a range, got"
                f" {table.kind(file).name.lower()}, {size} bytes at {offset}"
            )
        size = min(size, table.sizes[file] - offset)
        if size <= 0:
            return b""
        extent = self._extent(file)
        layer = self._layers[extent.layer]
        if extent.segments is None:
            return layer.read(extent.offset + offset, size)
        return _read_sparse(layer, extent.offset, extent.segments, offset, size)

    # ------------------------------------------------------------ store paths

    @property
    def nix_layers(self) -> tuple[NixLayer, ...]:
        """The Nix layers from the lowest, however they were recognised."""
        return self._nix_layers

    @property
    def overridden(self) -> frozenset[StorePath]:
        """Store paths that a layer above their (topmost) Nix layer replaced or hid."""
        return self._overridden

    @property
    def store_directory(self) -> int | None:
        """The node of the store directory. There is one wherever there is a Nix layer below."""
        return self._store_directory

    def store_node(self, path: StorePath) -> int | None:
        """Return the node of that name in the store directory, placeholder or not."""
        if self._store_directory is None:
            return None
        return self.child(self._store_directory, path.base_name.encode())

    def placeholder(self, index: int) -> StorePath | None:
        """Return the store path whose content shows at the node ``index``; None for all others."""
        return self._placeholders.get(index)

    def hidden(self, index: int) -> frozenset[bytes]:
        """Return the names in the directory ``index`` that layers whited out.

        Of such a name nothing lower shows, the store's content included; a child of that name in
        this tree was added again and is not merged with anything.
        """
        return self._columns.hidden.get(index, _NOTHING)

    def opaque(self, index: int) -> bool:
        """Say whether a layer made the directory ``index`` opaque: nothing lower shows in it."""
        return index in self._columns.opaque

    def _extent(self, file: int) -> Extent:
        table = self._columns.table
        segments = table.segments.get(file)
        stored = table.sizes[file] if segments is None else sum(size for _, size in segments)
        layer = table.layer(file)
        assert layer is not None  # noqa: S101 - only directories are implied
        return Extent(layer, table.offsets[file], stored, segments)


def _read_sparse(layer: LayerTar, stored: int, segments: Segments, offset: int, size: int) -> bytes:
    data = bytearray(size)
    for start, length in segments:
        begin, end = max(start, offset), min(start + length, offset + size)
        if begin < end:
            data[begin - offset : end - offset] = layer.read(stored + begin - start, end - begin)
        stored += length
    return bytes(data)
