"""Where a new layer's entries go above a base image whose directories are links: ``/bin`` is ``usr/bin`` in many.

A directory in a layer takes the place of a link below it (OCI image specification, ``layer.md``): an entry ``bin/tool``
would take ``/bin/sh`` away from such an image. So entries go to where the base's links lead.
"""

from __future__ import annotations

import posixpath
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from fusesnap.errors import InvalidArgument
from fusesnap.images.blobs import spooled
from fusesnap.images.disk import Progress, watched
from fusesnap.images.layer import FileKind, LayerTar
from fusesnap.images.merge import MergeLayer, merge_layers
from fusesnap.images.opening import OpenImage
from fusesnap.images.rootfs import RootFs
from fusesnap.images.uncompressed import uncompressed
from fusesnap.nix.quoting import quote
from fusesnap.nix.store_path import StoreDir

_MAX_LINKS: Final = 40  # as Linux


class BaseTree:
    """The merged layers of a base image. To be used as a context, or closed."""

    def __init__(self, rootfs: RootFs) -> None:
        self._rootfs = rootfs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._rootfs.close()

    def place(self, directory: str) -> str:
        """Return where ``directory``, a path from the root, is when the base's links are followed.

        Raises InvalidArgument where they go round in circles, or the base has something else there.
        """
        waiting = directory.split("/")[::-1]
        there: list[str] = []
        links = 0
        while waiting:
            name = waiting.pop()
            if name in ("", "."):
                continue
            if name == "..":
                del there[-1:]
                continue
            found = self._rootfs.find("/".join([*there, name]).encode())
            node = self._rootfs.node(found) if found is not None else None
            if node is None or node.kind is FileKind.DIRECTORY:
                there.append(name)
                continue
            links += 1
            if node.kind is not FileKind.SYMLINK or links > _MAX_LINKS:
                raise InvalidArgument(
                    f"{quote(directory)} cannot be a directory: the base image has something else there"
                )
            target = node.target.decode("utf-8", "replace")
            if target.startswith("/"):
                there = []
            waiting += target.split("/")[::-1]
        return posixpath.join("", *there)

    def mode(self, directory: str) -> int | None:
        """Return the twelve permission bits of a directory that the base has; None where it has none."""
        found = self._rootfs.find(directory.encode())
        return None if found is None else self._rootfs.node(found).mode


def open_base_tree(
    image: OpenImage, name: str, store_dir: StoreDir, scratch: Path, progress: Progress
) -> BaseTree:
    """Read the names of a base image, whose layers are unfolded into files without a name in ``scratch``.

    ``progress`` is told of bytes, and may raise to stop. Raises InvalidData, ContentMismatch, StorageFailure.
    """
    with ExitStack() as opened:
        layers = []
        for layer in image.image.layers:
            where = f"{name}: {layer}"
            pieces = watched(uncompressed(image.blob(layer), where), progress)
            tar = LayerTar(spooled(pieces, where, scratch), layer.diff_id, where)
            layers.append(MergeLayer(opened.enter_context(tar)))
        tree = BaseTree(merge_layers(layers, store_dir, recognise_content=False))
        opened.pop_all()  # the tree's from here on
    return tree
