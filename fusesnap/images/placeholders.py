"""The Nix layer of an image that is built: a placeholder for each store path, and links in the root.

As nix-snapshotter lays it out (``pkg/nix2container/generate.go`` there): an empty directory of mode 0755 for a path
that is a directory, or a link to one, and an empty file of mode 0555 for any other, on which it mounts the path;
``copyToRoot`` gives the root the directories of a path, and a link for all else that is in it.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from fusesnap.errors import InvalidArgument, InvalidData
from fusesnap.fetch.kinds import Root
from fusesnap.images.base_tree import BaseTree
from fusesnap.images.layer import FileKind
from fusesnap.images.layer_writer import NewEntry, directories, layer_tar
from fusesnap.images.links import Links
from fusesnap.nix.quoting import quote
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.tree import EntryKind, Tree

_DIRECTORY_MODE: Final = 0o755
_FILE_MODE: Final = 0o555
_LINK_MODE: Final = 0o777


async def placeholder_kinds(
    roots: Mapping[StorePath, Root], links: Links
) -> Mapping[StorePath, FileKind]:
    """Say what the placeholder of each path is. A link that leads nowhere in the closure gets a file."""
    return {path: await _kind(path, roots, links) for path in roots}


async def _kind(path: StorePath, roots: Mapping[StorePath, Root], links: Links) -> FileKind:
    seen = {path}
    root = roots[path]
    while root.kind is EntryKind.SYMLINK:
        target = links.target(path, b"", root.target)
        if target is None or target[0] in seen:
            return FileKind.REGULAR
        path, inner = target
        if inner:
            return _placeholder(await links.kind_of(path, inner))
        seen.add(path)
        root = roots[path]
    return _placeholder(root.kind)


def _placeholder(kind: EntryKind | None) -> FileKind:
    return FileKind.DIRECTORY if kind is EntryKind.DIRECTORY else FileKind.REGULAR


def nix_layer_tar(
    kinds: Mapping[StorePath, FileKind],
    copied: Mapping[StorePath, Tree],
    store_dir: StoreDir,
    base: BaseTree | None = None,
) -> bytes:
    """Return the layer's tar: placeholders of these ``kinds``, and links to what is in the trees of ``copied``.

    They go to where the directories of the base image ``base`` are. Raises InvalidArgument where a path that is copied
    is no directory, would put something into the store directory, or has a name that another has too; InvalidData for
    a name that is not UTF-8.
    """
    entries = {entry.path: entry for entry in directories(store_dir.path)}
    for path in sorted(kinds):
        kind = kinds[path]
        mode = _DIRECTORY_MODE if kind is FileKind.DIRECTORY else _FILE_MODE
        name = store_dir.format(path).lstrip("/")
        entries[name] = NewEntry(name, kind, mode)
    placed: dict[str, StorePath] = {}
    for path, tree in copied.items():
        for entry in _links_to(path, tree, store_dir):
            _place(_moved(entry, base), path, entries, placed, store_dir)
    return layer_tar(sorted(entries.values(), key=lambda entry: entry.path.split("/")))


def _moved(entry: NewEntry, base: BaseTree | None) -> NewEntry:
    """The entry where the base image has its directory, which keeps its mode."""
    if base is None:
        return entry
    if entry.kind is FileKind.DIRECTORY:
        place = base.place(entry.path)
        mode = base.mode(place)
        return replace(entry, path=place, mode=entry.mode if mode is None else mode)
    directory, slash, name = entry.path.rpartition("/")
    return replace(entry, path=posixpath.join(base.place(directory), name)) if slash else entry


def _place(
    entry: NewEntry,
    path: StorePath,
    entries: dict[str, NewEntry],
    placed: dict[str, StorePath],
    store_dir: StoreDir,
) -> None:
    there = entries.get(entry.path)
    if there is not None and {there.kind, entry.kind} != {FileKind.DIRECTORY}:
        other = placed.get(entry.path)
        raise InvalidArgument(
            f"{store_dir.format(path)} cannot be copied to the root: {quote(entry.path)} is there already,"
            f" {f'from {store_dir.format(other)}' if other else 'where store paths are'}"
        )
    if f"{entry.path}/".startswith(f"{store_dir.path.strip('/')}/") and there is None:
        raise InvalidArgument(
            f"{store_dir.format(path)} cannot be copied to the root: it has {quote(entry.path)}"
        )
    entries[entry.path] = entry
    placed[entry.path] = path


def _links_to(path: StorePath, tree: Tree, store_dir: StoreDir) -> Iterable[NewEntry]:
    if tree.kind(0) is not EntryKind.DIRECTORY:
        raise InvalidArgument(
            f"{store_dir.format(path)} cannot be copied to the root: expected a directory"
        )
    for index in range(1, len(tree)):
        name = _text(path, tree.path(index))
        if tree.kind(index) is EntryKind.DIRECTORY:
            yield NewEntry(name, FileKind.DIRECTORY, _DIRECTORY_MODE)
        else:
            target = f"{store_dir.format(path)}/{name}"
            yield NewEntry(name, FileKind.SYMLINK, _LINK_MODE, target)


def _text(path: StorePath, name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidData(
            f"{path}: {quote(name)} is not UTF-8: it cannot be copied to the root"
        ) from None
