"""Which files make a store path an image. Most are packages, and to know that no image is opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from fusesnap.images.disk import open_regular, refusals
from fusesnap.images.uncompressed import compression_of
from fusesnap.nix.tree import EntryKind, Tree

# What lists the images in an archive of Docker's, see ``docker_archive``.
MANIFEST_NAME: Final = "manifest.json"

# A tar's magic, in its first block; of old tars without one the checksum would have to do, and nobody writes those.
_TAR_MAGIC_AT: Final = 257
_TAR_MAGIC: Final = b"ustar"


def is_image(tree: Tree, location: Path) -> bool:
    """Whether a path is to be read as an image, rather than as a package."""
    kind = tree.kind(0)
    if kind is EntryKind.DIRECTORY:
        if tree.child(0, b"oci-layout") is not None:
            return True
        names = (b"index.json", MANIFEST_NAME.encode())
        return tree.child(0, b"bin") is None and any(
            tree.child(0, name) is not None for name in names
        )
    if kind is not EntryKind.REGULAR:
        return False
    descriptor = open_regular(location, follow=False)
    try:
        with refusals(location):
            start = os.pread(descriptor, _TAR_MAGIC_AT + len(_TAR_MAGIC), 0)
    finally:
        os.close(descriptor)
    return compression_of(start) != "none" or start[_TAR_MAGIC_AT:] == _TAR_MAGIC
