"""Which store paths a layer of an image stands for.

By its labels (:mod:`fusesnap.nix.closure_labels`), which win; or, where an image carries none, by
what it holds: in the store directory nothing but empty directories and empty files that are named
as store paths, which are the closure's list (DESIGN, section 11). An image whose lower layers have
real content in one of these places is left alone: there the directory only brings new metadata.

Reading the file ``store-paths`` of a closure path takes a substituter, so it is the caller's::

    labels = layer_labels(layer, store_dir)
    match labels:
        case ClosureLabel(path):  paths = parse_store_paths(<its file store-paths>, store_dir)
        case PathLabels(paths):   ...
        case None:                paths = None  # merge_layers() looks at the layer's content
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fusesnap.errors import InvalidData
from fusesnap.images.layer import FileKind
from fusesnap.images.layout import ImageLayer
from fusesnap.nix.closure_labels import ClosureLabel, PathLabels, parse_nix_labels
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.tree import EntryKind

_KINDS = {
    FileKind.DIRECTORY: EntryKind.DIRECTORY,
    FileKind.REGULAR: EntryKind.REGULAR,
    FileKind.SYMLINK: EntryKind.SYMLINK,
}


@dataclass(frozen=True, slots=True)
class Placeholder:
    """A store path that a Nix layer stands for.

    ``kind`` is what the layer's entry of that name is; None where the layer has no such entry, so
    that only the path's NAR or index says it.
    """

    path: StorePath
    kind: EntryKind | None


@dataclass(frozen=True, slots=True)
class NixLayer:
    """The store paths of the layer at ``position`` of its image, in the order of their list."""

    position: int
    placeholders: tuple[Placeholder, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """What a layer holds at ``path``, as far as recognition looks at it.

    ``kind`` is None for what cannot be a placeholder whatever its name: whiteouts, hard links.
    """

    path: bytes
    kind: FileKind | None
    size: int


def layer_labels(layer: ImageLayer, store_dir: StoreDir) -> ClosureLabel | PathLabels | None:
    """Read the labels that the manifest gives ``layer``; raises InvalidData naming layer and label."""
    try:
        return parse_nix_labels(layer.annotations, store_dir)
    except InvalidData as error:
        raise InvalidData(f"{layer}: {error}") from error


def recognise(held: Iterable[Held], store_dir: StoreDir) -> tuple[Placeholder, ...] | None:
    """Return the paths of a layer that has no labels, in the order of its tar; None if it is ordinary."""
    prefix = store_prefix(store_dir)
    found: dict[StorePath, EntryKind] = {}
    for each in held:
        if not each.path.startswith(prefix):
            continue
        path = _base_name(each.path[len(prefix) :])
        if path is None or each.kind not in _KINDS or each.kind is FileKind.SYMLINK or each.size:
            return None
        found[path] = _KINDS[each.kind]
    return tuple(Placeholder(path, kind) for path, kind in found.items()) or None


def placeholders(
    paths: Iterable[StorePath], held: Iterable[Held], store_dir: StoreDir
) -> tuple[Placeholder, ...]:
    """Pair the ``paths`` that labels state with the kinds that the layer's entries show."""
    prefix = store_prefix(store_dir)
    kinds = {
        each.path[len(prefix) :]: _KINDS.get(each.kind)
        for each in held
        if each.kind is not None and each.path.startswith(prefix)
    }
    return tuple(Placeholder(path, kinds.get(path.base_name.encode())) for path in paths)


def store_prefix(store_dir: StoreDir) -> bytes:
    """Return the store directory as the start of a normalised path in a layer: ``nix/store/``."""
    return store_dir.path.strip("/").encode() + b"/"


def _base_name(name: bytes) -> StorePath | None:
    try:
        return StorePath.parse_base_name(name.decode("ascii"))
    except (InvalidData, UnicodeDecodeError):
        return None  # below a store path, or nothing that Nix would have put there
