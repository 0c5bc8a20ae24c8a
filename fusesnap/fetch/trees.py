"""The trees of committed paths, kept while memory allows."""

from __future__ import annotations

from collections import OrderedDict

from fusesnap.nix.tree import Tree


class Trees:
    """The most recently used trees by ordinal, bounded by the number of their entries.

    A tree that was dropped costs a walk of its committed directory to have again, nothing else.
    """

    def __init__(self, capacity: int = 400_000) -> None:
        self._capacity = capacity
        self._held = 0
        self._trees: OrderedDict[int, Tree] = OrderedDict()

    def get(self, ordinal: int) -> Tree | None:
        """The tree, now the most recently used one, if it is still here."""
        tree = self._trees.get(ordinal)
        if tree is not None:
            self._trees.move_to_end(ordinal)
        return tree

    def drop(self, ordinal: int) -> None:
        """Let go of a tree, if it is here."""
        old = self._trees.pop(ordinal, None)
        self._held -= len(old.entries) if old is not None else 0

    def put(self, ordinal: int, tree: Tree) -> None:
        """Keep ``tree``, and let go of the least recently used ones beyond the capacity (never of this one)."""
        old = self._trees.pop(ordinal, None)
        self._held += len(tree.entries) - (len(old.entries) if old is not None else 0)
        self._trees[ordinal] = tree
        while self._held > self._capacity and len(self._trees) > 1:
            _, dropped = self._trees.popitem(last=False)
            self._held -= len(dropped.entries)
