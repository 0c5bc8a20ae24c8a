"""What a layer means for store paths: which it stands for, and which of the layers below it changes.

A layer stands for store paths if its labels say so (:mod:`fusesnap.nix.closure_labels`), or if there is nothing in its
store directory but placeholders: empty directories and empty files named as store paths, as nix-snapshotter writes them
(``pkg/nix2container/generate.go`` there). What the layer holds elsewhere does not matter: nix-snapshotter puts links
into the root of the same layer. Labels win, because a client may not pass them on (``ctr`` up to 1.7), but never adds
any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from fusesnap.errors import InvalidData
from fusesnap.nix.store_path import StorePath
from fusesnap.snapshots.layer_content import Found, LayerContent
from fusesnap.snapshots.records import PathKind

_PLACEHOLDERS: Final = {Found.EMPTY_DIRECTORY, Found.EMPTY_OPAQUE_DIRECTORY, Found.EMPTY_FILE}
_KIND_OF: Final = {
    Found.EMPTY_DIRECTORY: PathKind.DIRECTORY,
    Found.EMPTY_OPAQUE_DIRECTORY: PathKind.DIRECTORY,
    Found.DIRECTORY: PathKind.DIRECTORY,
    Found.OPAQUE_DIRECTORY: PathKind.DIRECTORY,
    Found.EMPTY_FILE: PathKind.FILE,
    Found.FILE: PathKind.FILE,
}


@dataclass(frozen=True, slots=True)
class Recognition:
    """What a layer means.

    ``paths``: store paths that it stands for. ``hidden``: paths of the chain below that it replaces or whites out.
    ``added_to``: paths of the chain below that it has a directory for, which merges with theirs if they are
    directories.
    """

    paths: Mapping[StorePath, PathKind]
    hidden: frozenset[StorePath]
    added_to: frozenset[StorePath]


def recognise(
    content: LayerContent,
    labelled: Iterable[StorePath],
    below: Mapping[StorePath, PathKind],
    *,
    by_content: bool,
) -> Recognition:
    """Say what a layer with this content and these paths in its labels means above a chain with ``below``."""
    entries = dict(_store_paths(content))
    listed = list(labelled)
    if not listed and by_content and _only_placeholders(content, entries, below):
        listed = list(entries)
    paths = {path: _kind(entries.get(path)) for path in listed}
    if content.hides_below:
        return Recognition(paths, frozenset(below.keys() - paths.keys()), frozenset())
    changed = {path: found for path, found in entries.items() if path in below}
    for path in paths.keys() & changed.keys():
        del changed[path]
    added_to = frozenset(path for path, found in changed.items() if _merges(found, below[path]))
    unchanged = {path for path, found in changed.items() if _says_nothing(found, below[path])}
    return Recognition(paths, frozenset(changed.keys() - added_to - unchanged), added_to)


def _store_paths(content: LayerContent) -> Iterable[tuple[StorePath, Found]]:
    for name, found in content.entries.items():
        try:
            yield StorePath.parse_base_name(name), found
        except InvalidData:
            continue  # an ordinary entry, such as .links


def _only_placeholders(
    content: LayerContent,
    entries: Mapping[StorePath, Found],
    below: Mapping[StorePath, PathKind],
) -> bool:
    if not entries or len(entries) != len(content.entries):
        return False
    return all(
        found in _PLACEHOLDERS and not (path in below and _contradicts(found, below[path]))
        for path, found in entries.items()
    )


def _contradicts(found: Found, kind: PathKind) -> bool:
    """Whether this changes a path that was there before, and so is no placeholder for it.

    Overlayfs marks every directory that is new in its parent as opaque, so the mark alone says nothing. Where there was
    a directory before, it means that the directory was emptied.
    """
    if found is Found.EMPTY_OPAQUE_DIRECTORY:
        return True
    return kind is not PathKind.UNKNOWN and kind is not _KIND_OF[found]


def _kind(found: Found | None) -> PathKind:
    return _KIND_OF.get(found, PathKind.UNKNOWN) if found is not None else PathKind.UNKNOWN


def _merges(found: Found, kind: PathKind) -> bool:
    if found is Found.DIRECTORY:
        return kind is not PathKind.FILE
    return found is Found.EMPTY_DIRECTORY and kind is PathKind.UNKNOWN


def _says_nothing(found: Found, kind: PathKind) -> bool:
    """An archive lists the directories above its entries; an empty one changes nothing of a directory below."""
    return found is Found.EMPTY_DIRECTORY and kind is PathKind.DIRECTORY
