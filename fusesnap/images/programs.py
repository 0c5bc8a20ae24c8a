"""Which programs a package has, and which of them a container of it starts with.

Known are the package's name and the names in its ``bin``: not what its author would call its main program
(``meta.mainProgram`` of nixpkgs is in no binary cache).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from fusesnap.errors import InvalidData
from fusesnap.images.links import Links, TreeOf
from fusesnap.nix.store_path import StoreDir, StorePath
from fusesnap.nix.tree import Entry, EntryKind, Tree

_BIN: Final = b"bin"
_SHOWN: Final = 8  # programs in one message


@dataclass(frozen=True, slots=True)
class Programs:
    """The programs of a package: their ``directory``, None where the package itself is one, and their names, sorted."""

    directory: str | None
    names: tuple[str, ...]


def package_name(path: StorePath) -> str:
    """Return the name without version and output: of ``redis-7.0.15`` it is ``redis``.

    As ``builtins.parseDrvName`` of Nix: the version begins at the first hyphen that no letter follows.
    """
    version = re.search(r"-(?![A-Za-z])", path.name)
    return path.name[: version.start()] if version and version.start() else path.name


def main_program(path: StorePath, programs: Programs) -> str | None:
    """Return the only program, or the one that is named like the package; None where neither is there."""
    if len(programs.names) == 1:
        return programs.names[0]
    name = package_name(path)
    return name if name in programs.names else None


def why_none(path: StorePath, programs: Programs) -> str:
    """Say, without a slash, why there is no :func:`main_program`, and what to do."""
    names = programs.names
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"{path.name} has {len(names)} programs and none of them is called {package_name(path)}:"
        f" give the container a command, one of {', '.join(names[:_SHOWN])}{more}"
    )


class ProgramFinder:
    """Looks for programs in one closure. ``tree_of`` realises a path of it and gives its tree."""

    def __init__(
        self, closure: Collection[StorePath], tree_of: TreeOf, store_dir: StoreDir
    ) -> None:
        self._tree_of = tree_of
        self._store_dir = store_dir
        self._links = Links(closure, tree_of, store_dir)

    async def find(self, root: StorePath) -> Programs:
        """Return the programs of ``root``.

        Links are followed, also into other paths of the closure, which are realised where one is followed through:
        a ``bin`` that is elsewhere; a program that is elsewhere is a program without a look. What begins with a dot
        is what wrappers hide, and is none.

        Raises InvalidData, saying what was looked for, where there are no programs, and what ``tree_of`` raises.
        """
        top = await self._entry(await self._links.follow(root, b""))
        if top is not None and top.kind is EntryKind.REGULAR:
            if top.executable:
                return Programs(None, (root.name,))
            raise InvalidData(
                f"{self._store_dir.format(root)}: expected an image archive, or a package with programs in bin, got a"
                " file that is neither archive nor program"
            )
        directory = await self._links.follow(root, _BIN)
        if directory is None:
            raise self._nothing(root, "has no bin")
        path, index = directory
        found = await self._tree_of(path)
        names = [
            found.entries[child].name
            for child in found.children(index)
            if await self._is_program(path, found, child)
        ]
        if not names:
            raise self._nothing(root, "has no programs in bin")
        return Programs(f"{self._store_dir.format(root)}/bin", tuple(sorted(map(_text, names))))

    def _nothing(self, root: StorePath, what: str) -> InvalidData:
        return InvalidData(
            f"{self._store_dir.format(root)}: expected an image archive, or a package with programs in bin; it is no"
            f" archive and {what}"
        )

    async def _is_program(self, path: StorePath, tree: Tree, index: int) -> bool:
        entry = tree.entries[index]
        if entry.name.startswith(b".") or not _is_text(entry.name):
            return False
        if entry.kind is not EntryKind.SYMLINK:
            return entry.kind is EntryKind.REGULAR and entry.executable
        target = self._links.target(path, tree.path(index), entry.target)
        if target is None:
            return False
        if target[0] != path:
            return bool(target[1])
        there = await self._entry(await self._links.follow(*target))
        return there is not None and there.kind is EntryKind.REGULAR and there.executable

    async def _entry(self, place: tuple[StorePath, int] | None) -> Entry | None:
        return None if place is None else (await self._tree_of(place[0])).entries[place[1]]


def _is_text(name: bytes) -> bool:
    try:
        return name.decode("utf-8").isprintable()
    except UnicodeDecodeError:
        return False


def _text(name: bytes) -> str:
    return name.decode("utf-8")
