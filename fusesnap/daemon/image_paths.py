"""Which store paths the layers of an image stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import trio

from fusesnap.daemon.build import Node
from fusesnap.daemon.path_source import LocalPathSource
from fusesnap.images.blobs import spooled
from fusesnap.images.layer import LayerTar
from fusesnap.images.layout import ImageLayer
from fusesnap.images.nix_layer import Held, recognise
from fusesnap.images.opening import OpenImage
from fusesnap.images.uncompressed import uncompressed
from fusesnap.nix.store_path import StorePath
from fusesnap.snapshots.nix_layer import NixLayers

# A layer of nothing but placeholders, of the largest closure that is taken, has less when it is compressed.
MAX_LOOKED_INTO: Final = 8 * 1024 * 1024


async def paths_of_image(node: Node, image: OpenImage) -> Sequence[StorePath]:
    """All store paths that an image stands for, each once."""
    found: dict[StorePath, None] = {}
    for layer in image.image.layers:
        found |= dict.fromkeys(await paths_of_layer(node, image, layer))
    return list(found)


async def paths_of_layer(node: Node, image: OpenImage, layer: ImageLayer) -> Sequence[StorePath]:
    """The store paths of one layer: by its labels, or by what is in it. A closure's list is fetched for it."""
    named = await paths_of_labels(node, layer.annotations)
    if named or not node.settings.recognise_by_content or layer.size > MAX_LOOKED_INTO:
        return named
    return await trio.to_thread.run_sync(_recognised, node, image, layer)


async def paths_of_labels(node: Node, labels: Mapping[str, str]) -> Sequence[StorePath]:
    """The store paths that a layer's labels name. Raises InvalidArgument for labels that cannot be used."""
    nix_layers = NixLayers(
        node.store,
        LocalPathSource(node.realiser),
        node.store_dir,
        by_content=node.settings.recognise_by_content,
    )
    return await nix_layers.named(labels)


def _recognised(node: Node, image: OpenImage, layer: ImageLayer) -> Sequence[StorePath]:
    name = str(layer)
    pieces = uncompressed(image.blob(layer), name)
    with LayerTar(spooled(pieces, name, node.settings.root), layer.diff_id, name) as tar:
        held = [
            Held(entry.path, None if entry.hard_link else entry.kind, entry.size)
            for entry in tar.entries()
        ]
    found = recognise(held, node.store_dir) or ()
    return [placeholder.path for placeholder in found]
