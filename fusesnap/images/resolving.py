"""Which store path a reference names."""

from __future__ import annotations

from fusesnap.errors import PathNotFound
from fusesnap.fetch.realiser import Realiser
from fusesnap.images.reference import NixReference
from fusesnap.nix.store_path import StorePath


async def resolve(realiser: Realiser, reference: NixReference) -> StorePath:
    """Return the store path that ``reference`` names.

    Where no cache has one with its hash part it is the path of that spelling: perhaps it can be built, and whoever
    fetches it says that it cannot be had. Raises InvalidArgument where its name is another one, and as
    ``Realiser.resolve``.
    """
    try:
        path = await realiser.resolve(reference.hash_part)
    except PathNotFound:
        if reference.spelling is None:
            raise
        return StorePath(reference.hash_part.hash_part, reference.spelling)
    reference.check(path)
    return path
