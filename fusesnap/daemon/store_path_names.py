"""Store paths as people write them."""

from __future__ import annotations

import trio

from fusesnap.daemon.build import Node
from fusesnap.errors import InvalidArgument, InvalidData
from fusesnap.images.reference import parse_reference
from fusesnap.images.resolving import resolve
from fusesnap.nix.quoting import quote
from fusesnap.nix.store_path import StorePath


async def store_path(node: Node, text: str) -> StorePath:
    """Read a store path, a reference to one, or a link to one, as ``nix build`` leaves it.

    Raises InvalidArgument, and what looking for a hash part raises.
    """
    reference = parse_reference(text, node.store_dir)
    if reference is not None:
        return await resolve(node.realiser, reference)
    full = text
    if not text.startswith(f"{node.store_dir}/"):
        full = str(await trio.Path(text).resolve())
    try:
        return node.store_dir.parse(full)
    except InvalidData as error:
        raise InvalidArgument(f"{quote(text)}: expected a store path: {error}") from error


def is_in_store(node: Node, text: str) -> bool:
    """Whether ``text`` names an image by a store path."""
    return (
        text.startswith(f"{node.store_dir}/") or parse_reference(text, node.store_dir) is not None
    )
