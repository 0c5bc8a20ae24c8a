"""Merges layers into one tree, as OCI says that they are to be applied.

Source: OCI image specification, ``layer.md``, "Applying Changesets" and "Whiteouts". Where it is
silent, this does what containerd and umoci do when they unpack: a path through a symbolic link goes
where the link points, within the root; directories that nobody declared are made; a directory over a
directory takes over its children and brings its own metadata.

A layer's whiteouts hide what *lower* layers have, never what the same layer has, wherever in the tar
they stand. So they are all applied before any entry of the layer is placed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fusesnap.errors import InvalidData
from fusesnap.images.growing_tree import GrowingTree
from fusesnap.images.layer import MAX_ENTRIES, LayerEntry, LayerTar
from fusesnap.images.nix_layer import (
    Held,
    NixLayer,
    Placeholder,
    placeholders,
    recognise,
    store_prefix,
)
from fusesnap.images.numbering import number
from fusesnap.images.rootfs import RootFs
from fusesnap.images.store_overrides import StoreOverrides
from fusesnap.images.whiteout import NotAWhiteout, Whiteout, parse_whiteout
from fusesnap.nix.quoting import quote
from fusesnap.nix.store_path import StoreDir, StorePath


@dataclass(frozen=True, slots=True)
class MergeLayer:
    """A layer and, where its labels state them, the store paths that it stands for."""

    tar: LayerTar
    store_paths: tuple[StorePath, ...] | None = None


def merge_layers(
    layers: Sequence[MergeLayer], store_dir: StoreDir, *, recognise_content: bool = True
) -> RootFs:
    """Merge ``layers``, from the lowest, into one tree; it owns the layers' files from then on.

    With ``recognise_content``, a layer without labels is a Nix layer where its content says so.
    Raises InvalidData, naming layer and entry, for what no runtime could unpack; StorageFailure.
    """
    merge = _Merge(store_dir, recognise_content=recognise_content)
    for position, layer in enumerate(layers):
        merge.apply(position, layer)
    return merge.result([layer.tar for layer in layers])


@dataclass(slots=True)
class _Pending:
    """A layer's entries before they are placed.

    ``entries`` are paths and rows of the table. The row of a hard link is not known yet: it is -1,
    and ``links`` has, by index in ``entries``, the path that it is another name of. ``held`` is
    what lies below the store directory.
    """

    name: str
    entries: list[tuple[bytes, int]] = field(default_factory=list)
    links: dict[int, bytes] = field(default_factory=dict)
    whiteouts: list[Whiteout] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    _holds_below: bool = False

    def hold(self, held: Held, prefix: int) -> None:
        """Keep what is in the store directory; of what is deeper, one entry says enough."""
        below = b"/" in held.path[prefix:]
        if not (below and self._holds_below):
            self.held.append(held)
            self._holds_below |= below


class _Merge:
    def __init__(self, store_dir: StoreDir, *, recognise_content: bool) -> None:
        self._store_dir = store_dir
        self._store_prefix = store_prefix(store_dir)
        self._recognise_content = recognise_content
        self._tree = GrowingTree()
        self._overrides = StoreOverrides(self._tree, store_dir)
        self._nix_layers: list[NixLayer] = []
        self._entries = 0

    def apply(self, position: int, layer: MergeLayer) -> None:
        pending = self._collect(position, layer.tar)
        lower_links = self._lower_links(pending)
        self._hide(pending)
        stated = self._stated(layer, pending)
        if stated is not None:
            self._nix_layers.append(NixLayer(position, stated))
        self._overrides.begin(stated)
        for index, (path, row) in enumerate(pending.entries):
            if row < 0:
                self._link(pending, index, lower_links.get(index))
            else:
                self._place(path, row, pending.name)
        self._mark(pending)

    def result(self, tars: Sequence[LayerTar]) -> RootFs:
        return RootFs(
            number(self._tree),
            tars,
            self._store_dir,
            self._nix_layers,
            frozenset(self._overrides.overridden),
        )

    def _collect(self, position: int, tar: LayerTar) -> _Pending:
        pending = _Pending(tar.name)
        for entry in tar.entries():
            self._entries += 1
            if self._entries > MAX_ENTRIES:
                raise InvalidData(
                    f"{tar.name}: expected at most {MAX_ENTRIES} entries in the image's layers,"
                    " got more"
                )
            self._take(position, entry, pending)
        return pending

    def _take(self, position: int, entry: LayerEntry, pending: _Pending) -> None:
        whiteout = parse_whiteout(entry.path, pending.name)
        if whiteout is NotAWhiteout.IGNORED:
            return
        ordinary = whiteout is NotAWhiteout.ORDINARY
        if entry.path.startswith(self._store_prefix):
            kind = entry.kind if ordinary and entry.hard_link is None else None
            pending.hold(Held(entry.path, kind, entry.size), len(self._store_prefix))
        if isinstance(whiteout, Whiteout):
            pending.whiteouts.append(whiteout)
        elif entry.hard_link is not None:
            pending.links[len(pending.entries)] = entry.hard_link
            pending.entries.append((entry.path, -1))
        else:
            pending.entries.append((entry.path, self._tree.table.add(entry, position)))

    def _stated(self, layer: MergeLayer, pending: _Pending) -> tuple[Placeholder, ...] | None:
        if layer.store_paths is not None:
            return placeholders(layer.store_paths, pending.held, self._store_dir)
        if not self._recognise_content or not pending.held:
            return None
        found = recognise(pending.held, self._store_dir)
        if found is None or not self._overrides.are_news(each.path for each in found):
            return None
        return found

    def _lower_links(self, pending: _Pending) -> dict[int, int]:
        """What hard links name in lower layers, before this one's whiteouts hide it.

        A runtime that goes by the tar's order finds it still there.
        """
        if not pending.whiteouts:
            return {}
        found = (
            (index, self._find(target, pending.name)) for index, target in pending.links.items()
        )
        return {index: row for index, row in found if row is not None}

    def _hide(self, pending: _Pending) -> None:
        if not pending.whiteouts:
            return
        table = self._tree.table
        # A link that this layer replaces with a directory is not followed to what it pointed at.
        replaced = {path for path, row in pending.entries if row >= 0 and table.is_directory(row)}
        for whiteout in pending.whiteouts:
            directory = self._tree.look(whiteout.directory, pending.name, replaced)
            if directory is None:
                continue
            if whiteout.name is None:
                self._tree.clear(directory)
            elif self._tree.get(directory, whiteout.name) is not None:
                self._tree.remove(directory, whiteout.name)

    def _mark(self, pending: _Pending) -> None:
        """Keep what is hidden in the directories of the merged tree, for what a view lays below it."""
        for whiteout in pending.whiteouts:
            directory = self._marked(whiteout, pending.name)
            if directory is None:
                continue
            if whiteout.name is None:
                self._tree.opaque.add(directory)
                self._overrides.emptied(directory)
            else:
                self._tree.hidden.setdefault(directory, set()).add(whiteout.name)
                self._overrides.replaced(directory, whiteout.name)

    def _marked(self, whiteout: Whiteout, where: str) -> int | None:
        directory = self._tree.look(whiteout.directory, where)
        if directory is None and whiteout.directory.startswith(self._store_prefix):
            # Hidden is something in a store path, whose content the tree does not have.
            return self._tree.require(whiteout.directory, where)
        return directory

    def _place(self, path: bytes, row: int, where: str) -> None:
        tree, table = self._tree, self._tree.table
        if not path:
            table.assign(tree.root, row)
            return
        parent, _, name = path.rpartition(b"/")
        directory = tree.require(parent, where)
        present = tree.get(directory, name)
        if not table.is_directory(row):
            self._vacate(directory, name)
        elif present is not None and table.is_directory(present):
            table.assign(present, row)
            return
        elif present is not None:
            # What the file hid (a store path's content, say) does not come back with the directory.
            tree.hidden.setdefault(directory, set()).add(name)
            self._vacate(directory, name)
        tree.put(directory, name, row)

    def _vacate(self, directory: int, name: bytes) -> None:
        self._overrides.replaced(directory, name)
        if self._tree.get(directory, name) is not None:
            self._tree.remove(directory, name)

    def _link(self, pending: _Pending, index: int, lower: int | None) -> None:
        path, target = pending.entries[index][0], pending.links[index]
        what = f"{pending.name}: hard link {quote(path)} to {quote(target)}"
        parent, _, name = path.rpartition(b"/")
        directory = self._tree.require(parent, pending.name)
        # First, as runtimes do: a link to itself, or into what it replaces, has no target.
        self._vacate(directory, name)
        row = self._find(target, pending.name)
        if row is None:
            row = lower
        if row is None:
            raise InvalidData(f"{what}: expected a file of this or a lower layer, there is none")
        if self._tree.table.is_directory(row):
            raise InvalidData(f"{what}: expected a file, got a directory")
        self._tree.put(directory, name, row)

    def _find(self, path: bytes, where: str) -> int | None:
        """The row at ``path``; links are followed on the way, not at its end."""
        parent, _, name = path.rpartition(b"/")
        directory = self._tree.look(parent, where)
        if directory is None:
            return None
        return self._tree.get(directory, name) if name else self._tree.root
