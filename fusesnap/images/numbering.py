"""Turns a merged tree into numbered columns."""

from __future__ import annotations

from array import array

from fusesnap.images.growing_tree import Directory, GrowingTree
from fusesnap.images.rootfs import Columns


def number(tree: GrowingTree) -> Columns:
    """Number what is reachable in ``tree``: breadth first, names in the order of their bytes."""
    rows, names, parents = array("I", [tree.root]), [b""], array("I", [0])
    first_children, child_counts = array("I"), array("I")
    index = 0
    while index < len(rows):
        directory = tree.directories.get(rows[index])
        children = sorted(directory.names.items()) if directory is not None else []
        first_children.append(len(rows))
        child_counts.append(len(children))
        for name, row in children:
            rows.append(row)
            names.append(name)
            parents.append(index)
        index += 1
    inodes = _first_nodes(rows)
    files = {row: file for file, row in enumerate(rows[node] for node in inodes)}
    kept = [rows[node] for node in inodes]
    return Columns(
        table=tree.table.select(kept),
        files=array("I", (files[row] for row in rows)),
        names=names,
        parents=parents,
        first_children=first_children,
        child_counts=child_counts,
        inodes=inodes,
        nlinks=_link_counts(tree, rows, files),
        hidden={inodes[files[row]]: frozenset(hidden) for row, hidden in tree.hidden.items()},
        opaque=frozenset(inodes[files[row]] for row in tree.opaque),
    )


def _first_nodes(rows: array[int]) -> array[int]:
    """The first node of each row, in the order of nodes."""
    seen: set[int] = set()
    first = array("I")
    for node, row in enumerate(rows):
        if row not in seen:
            seen.add(row)
            first.append(node)
    return first


def _link_counts(tree: GrowingTree, rows: array[int], files: dict[int, int]) -> array[int]:
    counts = array("I", bytes(4 * len(files)))
    for row in rows:
        directory = tree.directories.get(row)
        counts[files[row]] += 1 if directory is None else 2 + _subdirectories(tree, directory)
    return counts


def _subdirectories(tree: GrowingTree, directory: Directory) -> int:
    return sum(row in tree.directories for row in directory.names.values())
