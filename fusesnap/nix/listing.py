"""The listing of a NAR, ``<hash part>.ls`` of a binary cache: JSON, unsigned.

Source: ``src/libstore/nar-accessor.cc`` of Nix (``listNar``); Nix manual, "Nix Archive (NAR) listing".
"""

from __future__ import annotations

import json
from typing import Any

from fusesnap.errors import InvalidData
from fusesnap.nix.quoting import quote
from fusesnap.nix.tree import EntryKind, Tree

_VERSION = 1


def write_listing(tree: Tree) -> bytes:
    """Return the listing of ``tree``.

    Raises :class:`InvalidData` where a name or a target is not UTF-8: JSON cannot say it.
    """
    nodes: list[dict[str, Any]] = []
    for index, entry in enumerate(tree.entries):
        node: dict[str, Any]
        match entry.kind:
            case EntryKind.DIRECTORY:
                node = {"type": "directory", "entries": {}}
            case EntryKind.REGULAR:
                node = {"type": "regular", "size": entry.size, "narOffset": entry.offset}
                if entry.executable:
                    node["executable"] = True
            case EntryKind.SYMLINK:
                node = {"type": "symlink", "target": _text(entry.target)}
        if index:
            nodes[entry.parent]["entries"][_text(entry.name)] = node
        nodes.append(node)
    return json.dumps({"version": _VERSION, "root": nodes[0]}, separators=(",", ":")).encode()


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidData(f"listing: {quote(data)} is not UTF-8") from None
