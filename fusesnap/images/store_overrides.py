"""Which store paths of an image's Nix layers are no longer the store's, because a layer above changed them."""

from __future__ import annotations

from collections.abc import Iterable

from fusesnap.images.growing_tree import GrowingTree
from fusesnap.images.nix_layer import Placeholder, store_prefix
from fusesnap.nix.store_path import StoreDir, StorePath


class StoreOverrides:
    """Follows a merge: told what each layer states, replaces and hides."""

    def __init__(self, tree: GrowingTree, store_dir: StoreDir) -> None:
        self._tree = tree
        self._components = store_prefix(store_dir).split(b"/")[:-1]
        self._visible: dict[bytes, StorePath] = {}
        self._own: set[bytes] = set()  # stated by the layer that is being applied
        self.overridden: set[StorePath] = set()

    def begin(self, placeholders: Iterable[Placeholder] | None) -> None:
        """Start a layer; with placeholders, a Nix layer.

        The store directory is made where the tree has none. What lower layers held at the paths is
        taken out, for the store's content takes its place; where it shows already, what was added
        to it stays, as with any directory over a directory.
        """
        self._own = set()
        if placeholders is None:
            return
        store = self._make_store()
        for placeholder in placeholders:
            name = placeholder.path.base_name.encode()
            self._own.add(name)
            if name not in self._visible and self._tree.get(store, name) is not None:
                self._tree.remove(store, name)
            self._visible[name] = placeholder.path
            self.overridden.discard(placeholder.path)

    def are_news(self, paths: Iterable[StorePath]) -> bool:
        """Say whether a layer without labels that holds nothing but these names tells of any path.

        It does not where the image has content of its own in one of the places, or the store's
        shows in all of them already: then its bare directories are no placeholders, but bring new
        metadata (a build step's chmod, say).
        """
        names = {path.base_name.encode() for path in paths} - self._visible.keys()
        return bool(names) and not any(map(self._has_content, names))

    def replaced(self, directory: int, name: bytes) -> None:
        """Note that the layer puts something at, or takes away, ``name`` in ``directory``."""
        if not self._visible:
            return
        chain = self._chain()
        if directory == chain[-1] and len(chain) > len(self._components):
            self._cover(name)
        elif any((directory, name) == step for step in zip(chain, self._components, strict=False)):
            self._cover_all()

    def emptied(self, directory: int) -> None:
        """Note that the layer makes ``directory`` opaque."""
        if not self._visible:
            return
        chain = self._chain()
        own = self._tree.directories[directory]
        if directory in chain:
            self._cover_all()
        elif own.parent == chain[-1] and len(chain) > len(self._components):
            self._cover(own.name)

    def _has_content(self, name: bytes) -> bool:
        chain = self._chain()
        row = self._tree.get(chain[-1], name) if len(chain) > len(self._components) else None
        if row is None:
            return False
        directory = self._tree.directories.get(row)
        return directory is None or bool(directory.names)

    def _cover(self, name: bytes) -> None:
        if name in self._visible and name not in self._own:
            self.overridden.add(self._visible.pop(name))

    def _cover_all(self) -> None:
        for name in self._visible.keys() - self._own:
            self._cover(name)

    def _chain(self) -> list[int]:
        """The directories from the root to the store directory, as far as they are there."""
        chain = [self._tree.root]
        for name in self._components:
            row = self._tree.get(chain[-1], name)
            if row is None or not self._tree.table.is_directory(row):
                break
            chain.append(row)
        return chain

    def _make_store(self) -> int:
        chain = self._chain()
        for name in self._components[len(chain) - 1 :]:
            if self._tree.get(chain[-1], name) is not None:
                # A link or a file, which the Nix layer's own directories will not have merged with.
                self._tree.remove(chain[-1], name)
            chain.append(self._tree.imply(chain[-1], name))
        return chain[-1]
