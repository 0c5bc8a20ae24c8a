"""Trees as their NARs have them."""

from __future__ import annotations

from fusesnap.nix.nar import NarParser, NeedData
from fusesnap.nix.tree import Tree, TreeBuilder


def tree_of(nar: bytes) -> Tree:
    parser, builder = NarParser(), TreeBuilder()
    parser.receive_data(nar)
    while not isinstance(event := parser.next_event(), NeedData):
        builder.receive(event)
    return builder.tree()
